"""Samples into shards: how each is stored, what a set shares, the writer, parts of one set."""
