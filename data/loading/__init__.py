"""From shards to batches, in six steps: order, reader, codec, datasets, batches, loader.

Beside the first stand the windows of long texts.
"""
