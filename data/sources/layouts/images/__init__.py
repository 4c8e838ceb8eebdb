"""Layouts of image sets, a module each."""
