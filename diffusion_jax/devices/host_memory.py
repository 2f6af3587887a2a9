"""Memory of the host for a program that computes on a CPU: what it frees is kept for the next step.

XLA frees the buffers of a step when it ends. The C library gives blocks as large as these back to
the system, so that the next step gets pages that the kernel has to map and clear again: 10 to 20 %
of a training step's processor time. Importing this package never changes how memory is allocated.
"""

import ctypes
import os
import sys

from diffusion_jax.devices.xla_flags import computes_on_a_cpu

# Of mallopt(3), in glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8


def keep_freed_memory() -> bool:
    """Let glibc keep what is freed, where this program computes on a CPU; say whether it does.

    Nothing changes with another C library, where the environment tunes malloc already, or once JAX
    is imported, whose threads may have heaps of their own.
    """
    tuned = any(name.startswith("MALLOC_") for name in os.environ)
    tuned = tuned or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "")
    if tuned or "jax" in sys.modules or not computes_on_a_cpu():
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is None:
        return False
    # Nothing is trimmed, no block is mapped by itself, and all threads share one heap: a heap of
    # another thread is unmapped as soon as it is empty.
    settings = ((_TRIM_THRESHOLD, -1), (_MMAP_MAX, 0), (_ARENA_MAX, 1))
    return all([mallopt(name, value) == 1 for name, value in settings])
