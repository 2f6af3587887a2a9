"""Pictures of prompts are the ones that sampling draws, with their captions beside them."""

import jax
import numpy as np
import pytest
from support.experiments import built

from diffusion_jax import Pipeline, load_config, train_run
from diffusion_jax.experiment.config.binding import ConfigError
from diffusion_jax.experiment.config.options import PromptOptions
from diffusion_jax.runs.drawing.prompt_pictures import build_prompts
from diffusion_jax.train.ema import reset_ema
from diffusion_jax.train.pictures import to_pixels

NAMES = tuple("zero one two three four five six seven eight nine".split())
TINY = ("configs/mnist.py:tiny", "--config.sampler.num_steps=2")


@pytest.fixture(scope="module")
def experiment():
    return built(*TINY)


@pytest.fixture(scope="module")
def frozen(experiment):
    return experiment.random_frozen()


def test_pictures_are_those_of_a_pipeline_with_the_averages(experiment, frozen):
    """And the same at every step while the weights stay."""
    state = experiment.init_state()
    wave = lambda leaf: 0.05 * np.sin(np.arange(leaf.size)).reshape(leaf.shape)  # noqa: E731
    moved = jax.tree.map(lambda leaf: leaf + wave(leaf), state.params)
    state = state._replace(opt_state=reset_ema(state.opt_state, moved))
    options = PromptOptions(("seven", 3), seed=5, guidance_scale=2.0)
    log_images = build_prompts(experiment, frozen, NAMES, options)
    shown = log_images(state, {})
    assert shown["conditioning"] == ["seven", "3"]
    pipe = Pipeline(experiment, moved, frozen, NAMES)
    want = pipe(["seven", 3], seed=5, guidance_scale=2.0)
    np.testing.assert_array_equal(to_pixels(shown["samples"]), want)
    np.testing.assert_array_equal(log_images(state, {})["samples"], shown["samples"])


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (PromptOptions(("ten",)), "config.hooks.prompts: .*ten"),
        (PromptOptions((11,)), "config.hooks.prompts: .*11"),
        (PromptOptions((1,), guidance_scale=np.nan), "config.hooks.prompts: guidance_scale = nan"),
    ],
)
def test_what_cannot_be_drawn_is_told_before_training(experiment, frozen, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        build_prompts(experiment, frozen, NAMES, options)


def test_a_run_reads_its_prompts_before_anything_is_made(tmp_path):
    given = "--config.hooks.prompts={'prompts': (7, 'ten')}"
    said = []
    with pytest.raises(ValueError, match="config.hooks.prompts: class 'ten' is unknown; choose"):
        train_run(load_config(TINY[0], [given]), tmp_path / "run", on_event=said.append)
    assert not said and not (tmp_path / "run").exists()


def test_a_config_says_what_to_draw_and_how_often():
    given = "--config.hooks.prompts={'prompts': (7, 'three'), 'every': 10, 'seed': 3}"
    (options,) = built(*TINY, given).hooks.hooks["prompts"]
    assert PromptOptions(**options) == PromptOptions((7, "three"), seed=3, every=10)
    for prompts, sentence in ((), "should hold a prompt or a class"), ((1.5,), "prompts"):
        with pytest.raises(ConfigError, match=sentence):
            built(*TINY, f"--config.hooks.prompts={{'prompts': {prompts}}}")
    with pytest.raises(
        ConfigError, match="hooks.prompts needs a model that draws images of a text"
    ):
        built("configs/emoji_vae.py:tiny", given)
    with pytest.raises(ConfigError, match=r"hooks.prompts.every = 0 should be at least 1"):
        built(*TINY, "--config.hooks.prompts={'prompts': (7,), 'every': 0}")
