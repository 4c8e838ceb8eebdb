"""What runs on every rank: models, objectives, the training loop, and the stages."""
