"""To be imported before JAX: sets XLA_FLAGS as the program does that trains on a CPU."""

from diffusion_jax.devices.xla_flags import add_cpu_flags

add_cpu_flags()
