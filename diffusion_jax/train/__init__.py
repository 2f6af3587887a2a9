"""Training: losses, state, optimizer with EMA, step, loop, hooks, checkpoints and writers."""
