"""Checkpoint files <-> parameter trees; tables say what each layer is called in a file."""
