"""Pages that need nothing else: their figures, and what an evaluation shows."""
