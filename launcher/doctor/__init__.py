"""Whether machines can do a run."""
