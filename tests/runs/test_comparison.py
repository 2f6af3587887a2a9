"""What may differ between configs of one run: where files lie always, what is computed never."""

import ml_collections
import pytest

from diffusion_jax.experiment.config.binding import ConfigError
from diffusion_jax.runs.comparison import (
    MAY_CHANGE,
    MAY_CHANGE_LATER,
    check_keys,
    differences,
    with_whole_paths,
)


def config(**changes):
    made = ml_collections.ConfigDict(
        dict(
            train=dict(num_steps=10, batch_size=8, ckpt_path=None),
            data=dict(source=dict(name="image_folder", folder="pictures", data_dir="~/data")),
            first_stage=dict(name="autoencoder_kl", weights="vae.safetensors", tile=None),
            conditioning=dict(embedders=dict(text=dict(name="clip_text", weights="random"))),
            latent_cache=dict(folder="latents"),
            sampler=dict(name="ddim"),
        )
    )
    made.train.twice = made.train.get_oneway_ref("num_steps")
    with made.ignore_type():
        made.update_from_flattened_dict(changes)
    return made


@pytest.mark.parametrize(
    ("path", "value", "on_going_on", "later"),
    [
        ("train.num_steps", 20, ["train.twice: 10 -> 20"], 2),
        ("train.batch_size", 4, ["train.batch_size: 8 -> 4"], 0),
        ("data.source.folder", "elsewhere", [], 0),
        ("data.source.name", "cifar10", ["data.source.name: 'image_folder' -> 'cifar10'"], 0),
        ("first_stage.weights", "moved.ckpt", [], 0),
        ("conditioning.embedders.text.weights", "moved.ckpt", [], 0),
        ("train.ckpt_path", "/moved", [], 0),
        ("latent_cache.folder", "moved", [], 0),
        ("sampler.name", "euler", [], 0),
        ("first_stage.tile", 32, ["first_stage.tile: None -> 32"], 0),
    ],
)
def test_only_what_is_computed_counts(path, value, on_going_on, later):
    changed = config(**{path: value})
    assert differences(config(), changed, MAY_CHANGE) == on_going_on
    assert len(differences(config(), changed, MAY_CHANGE_LATER)) == later
    assert differences(config(), changed, (*MAY_CHANGE, "train", path)) == []


def test_relative_paths_become_whole_if_they_are_there(tmp_path, monkeypatch):
    (tmp_path / "pictures").mkdir()
    monkeypatch.chdir(tmp_path)
    original = config()
    found = with_whole_paths(original)
    assert found.data.source.folder == str(tmp_path / "pictures")
    assert found.latent_cache.folder == str(tmp_path / "latents")
    assert found.first_stage.weights == "vae.safetensors"  # is not there, or is a name
    assert found.data.source.data_dir == "~/data" and found.train.ckpt_path is None
    assert original.data.source.folder == "pictures"
    found.train.num_steps = 30
    assert found.train.twice == 30


def test_an_unknown_section_is_named_with_its_like():
    with pytest.raises(ConfigError, match="--config.trian is not a section; did you mean 'train'"):
        check_keys(config(), config(**{"trian": 3}))
    check_keys(config(), config(**{"guidance": 3}))
