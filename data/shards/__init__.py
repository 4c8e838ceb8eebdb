"""Tars with an index: written, checked, read by place."""
