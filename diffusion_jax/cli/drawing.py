"""What `sample` does alike for images and for videos: draw, write, and say what happened."""

import argparse
import sys
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np

from diffusion_jax.pipeline import NonFiniteWarning, Pipeline
from diffusion_jax.runs.conditions import Conditions

# Flags of every model that draws, which have the names of options of a call.
_SHARED = (
    *("guidance_scale", "seed", "batch_size", "height", "width"),
    *("num_frames", "fps", "motion_bucket_id", "cond_aug"),
)


def draw(
    pipe: Pipeline,
    conditions: Conditions,
    arguments: argparse.Namespace,
    write: Callable[[np.ndarray], str],
    **options: Any,
) -> int:
    """Draw, write and print; return 0, or 1 if anything that was drawn is not finite.

    write: writes what was drawn, and says so in words. options: of the call, beside the flags that
    all models have.
    """
    shared = {name: getattr(arguments, name) for name in _SHARED}
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", NonFiniteWarning)
        drawn = pipe(conditions, num_steps=arguments.steps, **shared, **options)
    print(write(drawn))
    for warning in told:
        print(f"warning: {warning.message}", file=sys.stderr)
    return int(any(warning.category is NonFiniteWarning for warning in told))
