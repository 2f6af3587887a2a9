"""Drawing: a call of a Pipeline on devices, and what is kept of it."""
