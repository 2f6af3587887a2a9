"""To be imported before JAX: does to the process what the program does when it trains on a CPU."""

import os

from diffusion_jax.devices.host_memory import keep_freed_memory
from diffusion_jax.devices.xla_flags import add_cpu_flags

if os.environ.get("BENCHMARK_WORK") == "train":
    add_cpu_flags()
    keep_freed_memory()
