"""Another name for a section on the command line: the options of the old name go, typos stay."""

import logging

import numpy as np
import pytest
from PIL import Image

from diffusion_jax.data.sources import folder_content
from diffusion_jax.experiment import make_experiment
from diffusion_jax.experiment.config.binding import ConfigError
from diffusion_jax.experiment.config.files import load_config

MNIST, EMOJI = "configs/mnist.py:tiny", "configs/emoji.py"


def load(path, *overrides):
    return load_config(path, [f"--config.{override}" for override in overrides])


@pytest.fixture
def folder(tmp_path):
    for i in range(3):
        Image.fromarray(np.full((4, 4, 3), i, np.uint8)).save(tmp_path / f"{i}.png")
    return tmp_path


def test_options_of_a_source_go_when_the_source_changes(folder, caplog):
    folder_content.say_once.cache_clear()
    with caplog.at_level(logging.INFO):
        config = load(EMOJI, "data.source.name=image_folder", f"data.source.folder={folder}")
    assert config.data.source.to_dict() == {"name": "image_folder", "folder": str(folder)}
    assert set(config.data.splits.values()) == {"train"}  # three are too few to hold any out
    said = (
        "config.data.source.name was changed from 'openmoji' to 'image_folder', which has no "
        "option size; what the config gave it is not used"
    )
    assert said in caplog.text and "holds images: train 3; classes: none" in caplog.text
    make_experiment(config)


@pytest.mark.parametrize(
    ("path", "overrides", "section", "left"),
    [
        (MNIST, ["sampler.name=euler"], "sampler", {"name", "num_steps"}),
        (MNIST, ["guidance.name=none"], "guidance", {"name"}),
        (MNIST, ["lr_schedule.name=constant"], "lr_schedule", {"name", "warmup_steps"}),
        ("configs/emoji.py:tiny", ["weighting.name=unit"], "weighting", {"name"}),
        (
            "configs/emoji.py:tiny",
            ["conditioning.embedders.text.name=class_label"],
            "conditioning.embedders.text",
            {"name", "ucg_rate"},
        ),
        # A data set of TFDS takes what TFDS knows.
        (EMOJI, ["data.source.name=cifar10"], "data.source", {"name"}),
        # The same name, or an option that stays, is no change.
        (MNIST, ["sampler.name=ddim"], "sampler", {"name", "num_steps", "discretize", "clip_den"}),
    ],
)
def test_the_same_holds_for_every_section_with_a_name(path, overrides, section, left):
    config = load(path, *overrides)
    for key in section.split("."):
        config = config[key]
    assert {key[:8] for key in config} == {key[:8] for key in left}


def test_what_is_given_stays_and_is_wrong_if_it_is_wrong():
    config = load(MNIST, "sampler.name=euler", "sampler.discretize=trailing")
    assert "discretize" in config.sampler and "clip_denoised" not in config.sampler
    with pytest.raises(ConfigError, match="config.sampler.discretize = 'trailing' is not an opt"):
        make_experiment(config)
    with pytest.raises(ConfigError, match="config.sampler.name = 'eulr' is unknown; did you mean"):
        make_experiment(load(MNIST, "sampler.name=eulr"))
    config = load(MNIST, "sampler.num_step=3", "sampler.name=euler")
    with pytest.raises(ConfigError, match="config.sampler.num_step = 3 is not an option"):
        make_experiment(config)


def test_splits_that_a_folder_lacks_are_held_out_of_its_training_split(folder):
    for i in range(20):
        Image.fromarray(np.full((4, 4, 3), i, np.uint8)).save(folder / f"more{i}.png")
    overrides = ["data.source.name=image_folder", f"data.source.folder={folder}"]
    splits = load(MNIST, *overrides).data.splits
    assert splits.to_dict() == {
        "train": "train[:90%]", "validation": "train[90%:95%]", "test": "train[95%:]"
    }  # fmt: skip
    own = load(MNIST, *overrides, "data.splits.train=train[:50%]").data.splits
    assert own.to_dict() == {"train": "train[:50%]", "validation": "validation", "test": "test"}
