"""Text encoders: transformers' own models, and their weights."""
