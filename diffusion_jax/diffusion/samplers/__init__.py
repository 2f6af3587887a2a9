"""Samplers as pairs of pure functions, and the one loop that runs them."""
