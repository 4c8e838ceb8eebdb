"""Layouts of text sets, a module each."""
