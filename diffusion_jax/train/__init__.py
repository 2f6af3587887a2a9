"""Training: state, optimizer with EMA, train step, loop, checkpoints and writers."""
