"""The losses of a diffusion model as functions of a batch."""
