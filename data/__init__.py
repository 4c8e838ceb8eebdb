"""Files -> shards -> batches. Knows nothing of models or DeepSpeed."""
