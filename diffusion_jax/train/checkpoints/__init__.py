"""Checkpoints: written, read, checked, and started from."""
