"""Trained models at work: one loaded from a run or an export, and what it says of inputs."""
