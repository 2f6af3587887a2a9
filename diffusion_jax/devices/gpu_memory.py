"""The share of a GPU's memory that JAX may have: a program asks for it, and a plan counts on it."""

import os
import sys

from diffusion_jax.devices.xla_flags import computes_on_a_cpu

# JAX's own default is 0.75. What is left is for the CUDA context with its libraries, about 0.6 GiB,
# and for what NCCL takes.
SHARE = 0.95
_NAME = "XLA_CLIENT_MEM_FRACTION"
_NAMES = (_NAME, "XLA_PYTHON_CLIENT_MEM_FRACTION")  # JAX takes one of the two, the second is older


def ask_for_gpu_memory() -> str | None:
    """Let JAX have SHARE of each GPU's memory; return the variable that says so, or None.

    Nothing changes where the user has chosen a share, on a CPU, or once JAX is imported. For other
    devices than GPUs the variable means nothing.
    """
    chosen = any(name in os.environ for name in _NAMES)
    if chosen or "jax" in sys.modules or computes_on_a_cpu():
        return None
    os.environ[_NAME] = str(SHARE)
    return f"{_NAME}={SHARE}"
