"""The losses of diffusion models as functions of a batch."""
