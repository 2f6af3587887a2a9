"""The prior section is checked against the data and the model, and batches leave room for it."""

import jax
import numpy as np
import pytest
from support.experiments import built

from diffusion_jax.experiment.config.binding import ConfigError
from diffusion_jax.experiment.config.options import PriorOptions
from diffusion_jax.experiment.prior import rows_of

CONFIG = "configs/sdxl.py:tiny"
FITTING = ("data.batches.buckets=False", "prior.prompt='a fox'")


def build(*overrides, config=CONFIG):
    return built(config, *(f"--config.{override}" for override in overrides))


def test_a_part_of_each_batch_is_left_to_the_images_of_the_model():
    assert build().prior is None
    experiment = build(*FITTING, "train.batch_size=4", "prior.share=0.25")
    assert experiment.prior == PriorOptions("a fox", share=0.25)
    assert rows_of(experiment.prior, 4) == 1
    assert experiment.abstract_batch()["weight"] == jax.ShapeDtypeStruct((4,), np.float32)
    source = [{"image": np.zeros((32, 32, 3), np.uint8), "caption": "x"} for _ in range(5)]
    batch = next(experiment.train_batches(source).iterate(0))
    assert len(batch["image"]) == 3


@pytest.mark.parametrize(
    ("config", "overrides", "message"),
    [
        (CONFIG, ["prior.weight=1"], r"config\.prior\.prompt is missing"),
        (CONFIG, ["prior.prompt='a fox'"], r"buckets = True should be False with config\.prior"),
        (CONFIG, [*FITTING, "prior.weight=-1"], r"prior\.weight = -1\.0 should be at least 0"),
        (CONFIG, [*FITTING, "prior.share=1.0"], r"prior\.share = 1\.0 should be above 0 and below"),
        (
            CONFIG,
            [*FITTING, "train.batch_size=4", "prior.share=0.3"],
            r"share = 0\.3 of config\.train\.batch_size = 4 should be a whole number of samples",
        ),
        (
            CONFIG,
            [*FITTING, "train.batch_size=8", "prior.num_images=3"],
            r"num_images = 3 should be at least 4, which a batch has",
        ),
        (
            CONFIG,
            [*FITTING, "data.batches.crop=center", "latent_cache.folder=x"],
            r"config\.latent_cache does not go with config\.prior",
        ),
        (CONFIG, [*FITTING, "data.batches.loss_mask=mask_image"], "whose images have no masks"),
        ("configs/mnist.py:tiny", ["prior.prompt=7"], r"prior\.prompt = 7 should be str"),
        ("configs/mnist.py:tiny", ["prior.prompt=x"], "needs a model that reads text"),
        ("configs/emoji_vae.py:tiny", ["prior.prompt=x"], r"config\.prior is for diffusion models"),
    ],
)
def test_what_does_not_fit_is_told(config, overrides, message):
    with pytest.raises(ConfigError, match=message):
        build(*overrides, config=config)
