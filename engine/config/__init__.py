"""Options: their schema, recipes and help."""
