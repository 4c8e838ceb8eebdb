"""Small real sets made on the spot: digits, and docstrings of installed packages."""
