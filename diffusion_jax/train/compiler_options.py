"""What XLA's compiler is asked for besides its defaults, where XLA_FLAGS does not say otherwise."""

import os
from typing import Any

from jax.sharding import Mesh

# Without this estimator XLA hides no exchange between GPUs unless it is asked to.
_ESTIMATOR = "xla_gpu_enable_analytical_sol_latency_estimator"


def options_for_what_runs_once(mesh: Mesh) -> dict[str, Any]:
    """Let a CPU's compiler optimise little: the numbers are the same, the waiting is not.

    There each leaf becomes a function of its own, 700 in the demo's state. Level 0 would round some
    numbers otherwise.
    """
    name = "xla_backend_optimization_level"
    return {} if _given(name) or _platform(mesh) != "cpu" else {name: 1}


def options_for_gpus(mesh: Any) -> dict[str, Any] | None:
    """Keep XLA from hiding the sum of gradients over GPUs behind the backward pass.

    To do so it puts the gradients of kernels off until all else is done, and holds what they are
    made of: two levels of SVD, two clips on each of 8 H100, took 57.8 GiB instead of 17.4. Where
    parameters are split as well, there is more to hide, and it may.
    """
    several = mesh.size > 1 and _platform(mesh) == "gpu"
    split = any(mesh.shape[axis] > 1 for axis in ("fsdp", "tensor") if axis in mesh.shape)
    given = _given(_ESTIMATOR, "xla_gpu_enable_latency_hiding_scheduler")
    return {_ESTIMATOR: False} if several and not split and not given else None


def _platform(mesh: Any) -> str:
    return mesh.devices.flat[0].platform


def _given(*names: str) -> bool:
    return any(name in os.environ.get("XLA_FLAGS", "") for name in names)
