"""What a new run begins from; released and native files have tests of their own."""

import jax
import numpy as np
import pytest
from support.experiments import built, trained

from diffusion_jax.convert.weights.exporting import export_params, save_weights
from diffusion_jax.runs.beginning.first_weights import first_weights, frozen_encoders
from diffusion_jax.runs.weights import FROZEN_FOLDER
from diffusion_jax.train.checkpoints.saving import open_checkpoints

CONFIG = "configs/sdxl.py:tiny"
TRAINED = "--config.train.trainable=^conditioner/clip/"


def same(found, wanted):
    jax.tree.map(np.testing.assert_array_equal, found, wanted)


def save(folder, step, tree):
    checkpoints = open_checkpoints(folder, keep_last=1)
    checkpoints.save(step, tree, {"what": "a test"})
    checkpoints.close()


@pytest.mark.slow
def test_an_encoder_that_was_frozen_in_another_run_is_taken_from_it(tmp_path):
    other = trained(CONFIG)
    frozen = {"conditioner": other.frozen["conditioner"]}
    save(tmp_path / "checkpoints", 3, {"params": other.params})
    assert frozen_encoders(tmp_path, ["clip"]) == {}
    save(tmp_path / FROZEN_FOLDER, 0, frozen)
    experiment = built(CONFIG, TRAINED, f"--config.train.ckpt_path={tmp_path}")
    own = trained(CONFIG, TRAINED)
    state = experiment.abstract_state()._replace(params=own.params, opt_state={})
    found, said = first_weights(experiment, state)
    same(found.params["network"], other.params["network"])
    same(found.params["conditioner"], {"clip": other.frozen["conditioner"]["clip"]})
    assert said[0].endswith(": 0 parameters not loaded")


def test_an_encoder_that_is_trained_is_read_from_its_own_file(tmp_path):
    own, path = trained(CONFIG, TRAINED), tmp_path / "clip.safetensors"
    wanted = trained(CONFIG).frozen["conditioner"]["clip"]
    save_weights(path, [export_params(wanted, "clip_text_hf", "")])
    file = f"--config.conditioning.embedders.clip.weights={path}"
    experiment = built(CONFIG, TRAINED, file)
    state = experiment.abstract_state()._replace(params=own.params, opt_state={})
    found, said = first_weights(experiment, state)
    same(found.params["conditioner"]["clip"], wanted)
    same(found.params["network"], own.params["network"])
    assert said == []
