"""Hooks of the training loop: one factory per file, each returns a (due, act) pair."""
