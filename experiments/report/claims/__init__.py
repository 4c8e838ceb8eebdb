"""Claims, what the cells of a sweep say of each, and in how many words."""
