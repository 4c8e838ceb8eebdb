"""Shards behind addresses: fetched once a node, and kept."""
