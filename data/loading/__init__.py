"""From shards to batches: order, reading, decoding, workers."""
