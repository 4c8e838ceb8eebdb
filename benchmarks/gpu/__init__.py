"""What a GPU that is there for ten minutes is asked: `python -m benchmarks.gpu OUT`."""
