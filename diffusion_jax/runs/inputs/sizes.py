"""How large images of a call are, and in how many steps they are drawn: defaults and checks."""

import logging

import numpy as np

from diffusion_jax.experiment import Experiment
from diffusion_jax.experiment.guiders import GuidanceScale, check_scale
from diffusion_jax.experiment.network.network import Network
from diffusion_jax.experiment.sampling import check_steps
from diffusion_jax.experiment.task import Drawing
from diffusion_jax.runs.inputs.arrays import Whole, whole_number

_log = logging.getLogger(__name__)


def check_num_steps(
    drawing: Drawing, num_steps: Whole | None, guidance_scale: GuidanceScale | None
) -> tuple[int, int]:
    """Check both options of a call -> (num_steps, how many steps the sampler takes).

    num_steps: the config's when None. Raises ValueError for a number of steps that the sampler
    cannot take, and for scales of guidance that do not fit its steps.
    """
    num_steps = drawing.num_steps if num_steps is None else num_steps
    num_steps = whole_number("num_steps", num_steps)
    check_steps(num_steps, "num_steps")
    total = drawing.count_steps(num_steps)
    if guidance_scale is not None:
        scale = check_scale(guidance_scale, total, drawing.guides)
        if np.any(scale == 0.0):
            _log.warning("guidance_scale = 0 ignores the conditions; 1 is without guidance")
    return num_steps, total


def check_size(
    experiment: Experiment, height: Whole | None, width: Whole | None, *, of_image: bool = False
) -> tuple[int, int]:
    """Check the size that a call asks for -> (height, width), the config's where they are None.

    of_image: an image is given, which is fitted to any size. Raises ValueError for a size below 1
    and, without an image, for one that the network cannot work on.
    """
    default = experiment.data.image_shape[:2]
    size = (
        default[0] if height is None else whole_number("height", height),
        default[1] if width is None else whole_number("width", width),
    )
    factor = experiment.network.size_multiple()
    if min(size) < 1 or (not of_image and (size[0] % factor or size[1] % factor)):
        raise ValueError(
            f"height = {size[0]}, width = {size[1]} should be multiples of {factor} pixels"
        )
    return size


def check_sizes(
    experiment: Experiment, height: Whole | None, width: Whole | None, *, of_image: bool
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Check the size that a call asks for -> (that size, the size that the network works on)."""
    asked = check_size(experiment, height, width, of_image=of_image)
    return asked, size_in_multiples(experiment.network, asked)


def size_in_multiples(network: Network, size: tuple[int, int]) -> tuple[int, int]:
    """Round a size (height, width) up to what the network can work on."""
    multiple = network.size_multiple()
    return (size[0] + -size[0] % multiple, size[1] + -size[1] % multiple)
