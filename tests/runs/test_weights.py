"""The frozen networks of a run are saved once; what was trained is read back raw or averaged."""

import jax
import numpy as np
import pytest
from support.experiments import built, trained
from support.trees import drawn

from diffusion_jax.experiment.config.binding import ConfigError
from diffusion_jax.runs.weights import (
    has_frozen,
    load_checkpoint_file,
    load_trained,
    make_frozen,
    run_frozen,
    start_frozen,
)
from diffusion_jax.train.checkpoints.saving import open_checkpoints
from diffusion_jax.train.ema import ema_params

LDM, MNIST, VAE = (f"configs/{name}.py:tiny" for name in ("emoji_ldm", "mnist", "emoji_vae"))


def same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def saved(workdir, experiment, step=3):
    """A run whose averages are other numbers than its parameters."""
    state = drawn(experiment.abstract_state())
    checkpoints = open_checkpoints(workdir / "checkpoints")
    checkpoints.save(step, state, {})
    checkpoints.close()
    return state


def test_frozen_networks_are_saved_once_and_read_by_every_later_start(workdir):
    experiment, frozen = built(LDM), trained(LDM).frozen
    assert not has_frozen(workdir)
    with pytest.raises(FileNotFoundError):
        run_frozen(experiment, workdir)
    same(start_frozen(experiment, workdir, frozen), frozen)
    assert has_frozen(workdir)
    # A later start takes what is there, whatever it is given.
    other = {**frozen, "first_stage": drawn(frozen["first_stage"], 9)}
    same(start_frozen(experiment, workdir, other), frozen)
    same(run_frozen(experiment, workdir), frozen)


def test_the_constants_of_a_config_are_not_saved_but_made_anew(workdir):
    experiment = built(LDM)
    names = experiment.task.constants.keys()
    start_frozen(experiment, workdir, trained(LDM).frozen)
    changed = built(LDM, "--config.schedule.num_timesteps=500")
    found = run_frozen(changed, workdir)
    assert "schedule" in names and len(found["schedule"].betas) == 500


def test_a_model_without_frozen_networks_has_no_folder(workdir):
    frozen = start_frozen(built(MNIST), workdir)
    assert not workdir.exists()
    same(frozen, run_frozen(built(MNIST), workdir))


def test_without_weights_nothing_is_frozen():
    with pytest.raises(ConfigError, match=r"config\.first_stage\.weights is not set"):
        make_frozen(built(LDM, "--config.first_stage.weights=None"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("path", "options"),
    [(MNIST, ()), (MNIST, ("--config.optimizer.ema_dtype=bfloat16",)), (VAE, ())],
)
def test_what_was_trained_is_read_raw_or_with_averages(workdir, path, options):
    experiment = built(path, *options)
    state = saved(workdir, experiment)
    start_frozen(experiment, workdir, trained(path).frozen)
    raw = load_trained(experiment, workdir, ema=False)
    same(raw.params, state.params)
    averaged = load_trained(experiment, workdir)
    same(averaged.params, {**state.params, **ema_params(state.opt_state)})
    # Running statistics have no averages, nor has the discriminator.
    same(jax.tree.leaves(averaged.mutable), jax.tree.leaves(state.mutable))
    with pytest.raises(FileNotFoundError, match="5"):
        load_trained(experiment, workdir, step=5)


def test_a_released_file_is_read_as_the_model_of_a_config(tmp_path):
    path = "configs/sd15.py:tiny"
    experiment, weights = built(path), trained(path)
    file = tmp_path / "x.safetensors"
    experiment.task.export_file(weights, file)
    found, absent = load_checkpoint_file(experiment, file)
    same(found.params, weights.params)
    same(found.frozen["conditioner"], weights.frozen["conditioner"])
    assert absent == []
    averages, _ = load_checkpoint_file(experiment, file, ema=True)
    same(averages.params["network"], weights.ema["network"])
