"""The commands as Python functions: what `import selfdistill as sd` gives."""
