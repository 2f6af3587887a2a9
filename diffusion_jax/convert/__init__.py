"""Weights of PyTorch checkpoints <-> our parameter trees, without torch; key maps are data."""
