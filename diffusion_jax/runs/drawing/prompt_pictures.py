"""Pictures of the same prompts from the same noise, again and again while a model trains."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from diffusion_jax.experiment.config.options import PromptOptions
from diffusion_jax.experiment.experiment import Experiment
from diffusion_jax.experiment.guiders import check_scale
from diffusion_jax.runs.drawing.draw import draw_rows
from diffusion_jax.runs.inputs.conditions import encode_conditions, encode_negative
from diffusion_jax.runs.inputs.prompts import alike
from diffusion_jax.runs.inputs.seeds import Seeds
from diffusion_jax.train.ema import has_ema
from diffusion_jax.train.state import TrainState
from diffusion_jax.types import PyTree

# The first part of the names of such pictures.
SPLIT = "prompts"


class _Checked(NamedTuple):
    """What sample_fn takes for all prompts, how many they are, and the options of drawing."""

    arrays: dict[str, Any]
    count: int
    asked: dict[str, Any]


def check_prompts(experiment: Experiment, class_names: Sequence[str]) -> None:
    """Read the prompts of hooks.prompts, if the config has it, before anything long begins.

    Raises ValueError for a prompt that is too long, a class that does not exist, and a scale that
    does not fit.
    """
    if "prompts" in experiment.hooks.hooks:
        _check(experiment, class_names, PromptOptions(**experiment.hooks.hooks["prompts"][0]))


def _check(experiment: Experiment, class_names: Sequence[str], options: PromptOptions) -> _Checked:
    network, drawing = experiment.network, experiment.drawing
    names = lambda: class_names  # noqa: E731
    size = experiment.data.image_shape[:2]
    try:
        inputs, count = encode_conditions(network, list(options.prompts), None, names, size)
        inputs, negative = alike(network, inputs, encode_negative(network, options.negative, count))
        steps = drawing.num_steps if options.num_steps is None else options.num_steps
        if options.guidance_scale is not None:
            check_scale(options.guidance_scale, drawing.count_steps(steps), drawing.guides)
    except ValueError as error:
        raise ValueError(f"config.hooks.prompts: {error}") from error
    arrays = {"inputs": inputs} | ({} if negative is None else {"negative": negative})
    return _Checked(arrays, count, {"num_steps": steps, "guidance_scale": options.guidance_scale})


def build_prompts(
    experiment: Experiment, frozen: PyTree, class_names: tuple[str, ...], options: PromptOptions
) -> Callable[[TrainState, Any], Mapping[str, Any]]:
    """Make log_images(state, batch) -> {"samples": images, "conditioning": prompts}.

    The images are what Pipeline draws with the averaged weights and the same prompts, seed, steps
    and scale; the batch is not read.
    Raises ValueError as check_prompts does.
    """
    checked = _check(experiment, class_names, options)

    def log_images(state: TrainState, batch: Any) -> dict[str, Any]:
        del batch
        averages = has_ema(state.opt_state)
        params = experiment.task.averaged(state) if averages else state.params
        seeds = Seeds(options.seed)
        given = (checked.arrays, checked.count, seeds, None)
        drawn = draw_rows(experiment, params, frozen, *given, **checked.asked)
        return {"samples": drawn, "conditioning": [str(prompt) for prompt in options.prompts]}

    return log_images
