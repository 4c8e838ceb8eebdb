"""What runs after what: the stages of a run."""
