"""To be imported before JAX: sets XLA_FLAGS as the program does when it trains on a CPU."""

import os

from diffusion_jax.devices.xla_flags import add_cpu_flags

if os.environ.get("BENCHMARK_WORK") == "train":
    add_cpu_flags()
