"""Pictures and texts as people have them, each read by its place: no packing, no labels."""
