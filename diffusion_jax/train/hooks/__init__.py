"""Hooks of the training loop: each file has a function that makes one."""
