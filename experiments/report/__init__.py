"""A sweep as a page and as Markdown."""
