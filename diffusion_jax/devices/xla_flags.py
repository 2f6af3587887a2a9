"""XLA_FLAGS: what they say, and what a program that trains on a CPU adds to them as it starts.

XLA reads them once, when JAX starts its first device. Importing this package never changes them.
"""

import importlib.metadata
import importlib.util
import os
import sys

# YNNPACK keeps products and sums. Eigen convolves a whole batch at once for the gradient of a
# kernel, where YNNPACK needs it in parts that fit a core's cache.
CONVOLUTIONS_BY_EIGEN = (
    "--xla_cpu_experimental_ynn_fusion_type=-LIBRARY_FUSION_TYPE_INDIVIDUAL_CONVOLUTION"
)
# The versions of jaxlib that know the flag and were measured with it. XLA ends the process over a
# flag that it does not know.
FIRST_VERSION, FIRST_UNKNOWN_VERSION = (0, 12), (0, 13)


def given(*names: str) -> bool:
    """Say whether XLA_FLAGS hold one of these flags, with any value."""
    return any(name in os.environ.get("XLA_FLAGS", "") for name in names)


def eigen_convolves() -> bool:
    """Say whether XLA_FLAGS leave the convolutions of a CPU to Eigen."""
    return CONVOLUTIONS_BY_EIGEN in os.environ.get("XLA_FLAGS", "").split()


def add_cpu_flags() -> str | None:
    """Add to XLA_FLAGS what makes training on a CPU faster; return it, None where nothing is added.

    Nothing is added for other devices, for a jaxlib that may not know the flag, where XLA_FLAGS
    hold it already, or once JAX is imported, because its devices may have been started.
    """
    name = CONVOLUTIONS_BY_EIGEN.partition("=")[0]
    known = FIRST_VERSION <= _jaxlib_version() < FIRST_UNKNOWN_VERSION
    if "jax" in sys.modules or given(name) or not known or not computes_on_a_cpu():
        return None
    flags = [os.environ.get("XLA_FLAGS", ""), CONVOLUTIONS_BY_EIGEN]
    os.environ["XLA_FLAGS"] = " ".join(filter(None, flags))
    return CONVOLUTIONS_BY_EIGEN


def _jaxlib_version() -> tuple[int, ...]:
    major, minor = importlib.metadata.version("jaxlib").split(".")[:2]
    return int(major), int(minor)


def computes_on_a_cpu() -> bool:
    """Find out without starting JAX: it is asked for, or no plugin for other devices is there."""
    platforms = os.environ.get("JAX_PLATFORMS", "")
    if platforms:
        return platforms.split(",")[0] == "cpu"
    plugins = importlib.metadata.entry_points(group="jax_plugins")
    return not plugins and not any(map(importlib.util.find_spec, ("jax_plugins", "libtpu")))
