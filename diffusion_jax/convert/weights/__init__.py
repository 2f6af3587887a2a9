"""Checkpoint files <-> parameter trees, without torch; the names of layers are tables."""
