"""Checkpoints: saving, reading and checking them, and starting new runs from them."""
