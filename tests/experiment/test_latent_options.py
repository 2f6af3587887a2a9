"""The latent_cache section is checked against the data and the network that would use it."""

import jax
import pytest

from diffusion_jax.experiment import make_experiment
from diffusion_jax.experiment.config.binding import ConfigError
from diffusion_jax.experiment.config.files import load_config
from diffusion_jax.experiment.config.options import LatentCacheOptions

FOLDER = "latent_cache.folder=x"


def build(config, *overrides):
    given = [f"--config.{override}" for override in overrides]
    return make_experiment(load_config(config, given), devices=jax.devices()[:1])


def test_a_cache_has_defaults_and_none_is_none():
    assert build("emoji_ldm:tiny").latent_cache is None
    assert build("emoji_ldm:tiny", FOLDER).latent_cache == LatentCacheOptions("x")
    assert LatentCacheOptions("x")[1:] == (True, "float16", 512, 16)


@pytest.mark.parametrize(
    ("config", "overrides", "message"),
    [
        ("emoji_ldm:tiny", ["latent_cache.text=False"], r"config\.latent_cache\.folder is missing"),
        ("emoji_ldm:tiny", [FOLDER, "latent_cache.dtype=int8"], r"dtype = 'int8' should be one of"),
        (
            "emoji_ldm:tiny",
            [FOLDER, "latent_cache.shard_size=0"],
            "shard_size = 0 should be at lea",
        ),
        (
            "emoji_ldm:tiny",
            [FOLDER, "latent_cache.shards=1"],
            r"shards = 1 is not an option; did y",
        ),
        (
            "sdxl:tiny",
            [FOLDER, "data.batches.crop=center", "data.batches.tags=', '"],
            r"tags = ', ' should be left out, or config\.latent_cache\.text be False",
        ),
        (
            "emoji_ldm:tiny",
            [FOLDER, "data.batches.crop=random"],
            "crop = 'random' should be 'center'",
        ),
        (
            "emoji_ldm:tiny",
            [
                FOLDER,
                "conditioning.key=hybrid",
                "conditioning.embedders.low={'name': 'low_resolution', 'factor': 2, 'channels': 4}",
            ],
            r"config\.conditioning\.embedders\.low reads the image, which training from",
        ),
        (
            "emoji_ldm:tiny",
            [FOLDER, "data.batches.loss_mask=alpha"],
            r"config\.data\.batches\.loss_mask = 'alpha' should be left out with config\.latent_c",
        ),
        ("sd15:inpaint_tiny", [FOLDER], r"embedders\.mask reads the mask, which training from"),
        ("mnist:tiny", [FOLDER], r"config\.latent_cache needs config\.first_stage"),
    ],
)
def test_what_does_not_fit_is_told(config, overrides, message):
    with pytest.raises(ConfigError, match=message):
        build(config, *overrides)
