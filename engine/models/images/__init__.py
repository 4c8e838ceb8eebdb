"""Image encoders: the network, and every format that its weights come in."""
