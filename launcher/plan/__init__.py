"""What a run takes: memory, time, ranks."""
