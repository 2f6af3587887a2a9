"""What a latent cache is told by: each field of its encoders that changes a number, no other."""

import numpy as np
import pytest
from support.experiments import built, trained

from diffusion_jax.runs.latent_key import cache_options, cached_embedders, describe_cache

SMALL = ("configs/sdxl.py:tiny", "--config.data.batches.crop=center")
SMALL += ("--config.latent_cache.folder=x",)
SOURCE = [{"image": np.full((32, 32, 3), n, np.uint8), "caption": f"picture {n}"} for n in range(3)]


def test_without_the_section_the_option_is_named():
    with pytest.raises(ValueError, match=r"latent_cache is not set.*--config\.latent_cache\.folde"):
        cache_options(built("configs/sdxl.py:tiny"))
    assert cache_options(built(*SMALL)).folder == "x"


def test_only_frozen_encoders_of_captions_are_kept():
    assert set(cached_embedders(built(*SMALL))) == {"clip", "open_clip"}
    trains = built(*SMALL, "--config.conditioning.embedders.clip.trainable=True")
    assert set(cached_embedders(trains)) == {"open_clip"}
    assert cached_embedders(built(*SMALL, "--config.latent_cache.text=False")) == {}


def test_a_key_names_paths_of_the_config_and_every_weight():
    frozen = trained(*SMALL).frozen
    found = describe_cache(built(*SMALL), frozen, SOURCE)
    assert found["the number of records"] == 3 and found["config.data.batches.image_size"] == 32
    assert found["config.first_stage.ch_mult"] == [1, 2]
    assert found["config.conditioning.embedders.clip.width"] == 32
    assert found["config.train.batch_size"] == 8  # it fills buckets
    # That gradients are computed again, or where a module stands, changes no number.
    silent = ("remat", "name", "parent")
    assert not [key for key in found if key.rpartition(".")[2] in silent and "source" not in key]
    for part in ("config.first_stage", "config.conditioning.embedders.clip"):
        assert len(found[f"the weights of {part}"]) == 16


def test_another_weight_or_picture_is_another_key():
    experiment, frozen = built(*SMALL), trained(*SMALL).frozen
    found = describe_cache(experiment, frozen, SOURCE)
    tower = frozen["conditioner"]["clip"]
    moved = {**frozen, "conditioner": {**frozen["conditioner"], "clip": bump(tower)}}
    other = describe_cache(experiment, moved, SOURCE)
    assert {key for key in found if found[key] != other[key]} == {
        "the weights of config.conditioning.embedders.clip"
    }
    pictures = [SOURCE[0], SOURCE[2], SOURCE[1]]
    other = describe_cache(experiment, frozen, pictures)
    assert {k for k in found if found[k] != other[k]} == {"the digest of the data set"}


def bump(tree):
    """Add to the first leaf alone."""
    first = next(iter(tree))
    if isinstance(tree[first], dict):
        return {**tree, first: bump(tree[first])}
    return {**tree, first: tree[first] + 1}
