"""What a network may see besides its input: embedders, text and image towers, routing."""
