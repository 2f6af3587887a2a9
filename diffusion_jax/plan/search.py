"""Find the largest batch that fits, in few compilations: memory is close to affine in the batch."""

import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import ml_collections

from diffusion_jax.plan.compiling import DoesNotFit, Plan, make_plan, with_remat
from diffusion_jax.plan.topology import Topology

_log = logging.getLogger(__name__)
MAX_TRIES = 8
# A line through small batches predicts batches that are many times as large badly.
MAX_STEP = 32
_NAMES = {False: "none", True: "full"}  # a config may give these two policies as booleans


class Found(NamedTuple):
    """The largest batch per device that fits with a remat policy (0: none does), and its plan."""

    remat: bool | str
    per_device_batch: int
    plan: Plan | None


def largest_batch(needed: Callable[[int], int], available: int) -> int:
    """Find the largest batch whose needed bytes are available; 0 if a batch of 1 needs too many.

    needed(batch) is expensive. It is called for 1 and 2, and then for the batch that a line through
    two known points predicts, until the prediction is the largest batch known to fit.
    """
    points = {1: needed(1)}
    if points[1] > available:
        return 0
    newest = 2
    for _ in range(MAX_TRIES):
        points[newest] = needed(newest)
        fits = max(batch for batch, size in points.items() if size <= available)
        too_large = [batch for batch, size in points.items() if size > available]
        # The two known points nearest to what is available.
        (a, at_a), (b, at_b) = sorted(points.items(), key=lambda p: abs(p[1] - available))[:2]
        slope = (at_b - at_a) / (b - a)
        guess = fits if slope <= 0 else int(a + (available - at_a) / slope)
        guess = max(fits, min(guess, MAX_STEP * max(points), *(batch - 1 for batch in too_large)))
        if guess == fits:
            return fits
        newest = guess
    return max(batch for batch, size in points.items() if size <= available)


def find_batches(
    config: ml_collections.ConfigDict, topology: Topology, policies: Sequence[bool | str]
) -> list[Found]:
    """Find the largest batch per device for each remat policy.

    Raises ValueError when the memory of the devices is not known.
    """
    if topology.memory is None:
        raise ValueError(
            f"topology = {topology.name!r} should be a TPU or GPU, with memory to fill"
        )
    return [_find_batch(with_remat(config, remat), topology, remat) for remat in policies]


def _find_batch(config: ml_collections.ConfigDict, topology: Topology, remat: bool | str) -> Found:
    assert topology.memory is not None
    plans: dict[int, Plan] = {}

    @functools.cache
    def needed(batch: int) -> int:
        _log.info("remat %s, %d per device", remat, batch)
        try:
            plans[batch] = make_plan(config, topology, batch)
        except DoesNotFit as error:
            _log.info("%s", error)
            return error.needed
        return plans[batch].total

    batch = largest_batch(needed, topology.memory)
    return Found(remat, batch, plans[batch] if batch else None)


def remat_policies(config: ml_collections.ConfigDict) -> list[Any]:
    """List the policies to try: nothing computed again, what is cheap, the config's, everything."""
    own = [config.model.remat] if "remat" in config.model else []
    named = [_NAMES[policy] if isinstance(policy, bool) else policy for policy in own]
    return list(dict.fromkeys(["none", "dots", *named, "full"]))
