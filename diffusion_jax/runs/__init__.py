"""A run: its folder, its training and evaluation, its frozen networks and its latent cache."""
