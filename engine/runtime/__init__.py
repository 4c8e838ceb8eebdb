"""The ranks, their devices and their process group."""
