"""The loader against its limit and its peers: `python -m benchmarks.loader`."""
