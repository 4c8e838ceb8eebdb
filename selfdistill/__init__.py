"""Self-distillation for further pre-training: the package under which every folder is imported.

In a clone its folders are links to those of the top level; an installed copy holds them themselves.
"""
