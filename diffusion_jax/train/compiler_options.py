"""What XLA's compiler is asked for besides its defaults, where XLA_FLAGS does not say otherwise."""

import platform
import sys
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh

from diffusion_jax.devices.xla_flags import eigen_convolves, given

# Without this estimator XLA hides no exchange between GPUs unless it is asked to.
_ESTIMATOR = "xla_gpu_enable_analytical_sol_latency_estimator"
_ONEDNN = "xla_cpu_experimental_onednn_custom_call"
_KEPT_FROM = "jax_persistent_cache_min_compile_time_secs"


def options_for_what_runs_once(mesh: Mesh) -> dict[str, Any]:
    """Let a CPU's compiler optimise little: the numbers are the same, the waiting is not.

    There each leaf becomes a function of its own, 700 in the demo's state. Level 0 would round some
    numbers otherwise.
    """
    name = "xla_backend_optimization_level"
    return {} if given(name) or _platform(mesh) != "cpu" else {name: 1}


def options_for_gpus(mesh: Any) -> dict[str, Any] | None:
    """Keep XLA from hiding the sum of gradients over GPUs behind the backward pass.

    To do so it puts the gradients of kernels off until all else is done, and holds what they are
    made of: two levels of SVD, two clips on each of 8 H100, took 57.8 GiB instead of 17.4. Where
    parameters are split as well, there is more to hide, and it may.
    """
    several = mesh.size > 1 and _platform(mesh) == "gpu"
    split = any(mesh.shape[axis] > 1 for axis in ("fsdp", "tensor") if axis in mesh.shape)
    asked = given(_ESTIMATOR, "xla_gpu_enable_latency_hiding_scheduler")
    return {_ESTIMATOR: False} if several and not split and not asked else None


def onednn_convolves(mesh: Any) -> bool:
    """Say whether a training step on these devices has its convolutions computed by oneDNN.

    It does where XLA_FLAGS keep them out of YNNPACK, which would take them first, unless they
    name oneDNN themselves. Only on x86 is oneDNN a part of XLA.
    """
    x86 = sys.platform == "linux" and platform.machine() == "x86_64"
    return x86 and eigen_convolves() and not given(_ONEDNN) and _platform(mesh) == "cpu"


def options_for_onednn() -> dict[str, Any]:
    """Let oneDNN compute convolutions and large products of a program."""
    return {_ONEDNN: True}


def kept_off_disk(step: Callable[..., Any], mesh: Any) -> Callable[..., Any]:
    """Keep a training step that calls oneDNN out of JAX's cache on disk, whenever it is compiled.

    XLA cannot write such a program: it fails as if it were out of memory. Other steps are returned
    as they are.
    """
    if not onednn_convolves(mesh):
        return step

    def call(*args: Any) -> Any:
        kept_from = getattr(jax.config, _KEPT_FROM)
        jax.config.update(_KEPT_FROM, float("inf"))
        try:
            return step(*args)
        finally:
            jax.config.update(_KEPT_FROM, kept_from)

    return call


def _platform(mesh: Any) -> str:
    return mesh.devices.flat[0].platform
