"""What ranks send each other, and weak scaling: `python -m benchmarks.scale`."""
