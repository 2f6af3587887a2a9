"""The network of a config: its embedders, its inputs, its parts and adapters."""
