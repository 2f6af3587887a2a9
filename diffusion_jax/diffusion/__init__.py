"""The maths of diffusion: schedules, conversions, losses and samplers, on jax and numpy alone."""
