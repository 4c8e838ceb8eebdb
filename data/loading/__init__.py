"""From shards to batches, in six steps: order, reader, codec, datasets, batches, loader."""
