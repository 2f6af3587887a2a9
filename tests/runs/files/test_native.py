"""A run in one file: any command reads it without a config, and nothing of it is executed."""

import json

import jax
import numpy as np
import pytest
from support.experiments import built, trained
from support.trees import drawn

from diffusion_jax.convert.weights.exporting import save_weights
from diffusion_jax.convert.weights.native import KEY, export_tree
from diffusion_jax.convert.weights.safetensors import read_metadata
from diffusion_jax.experiment.config.binding import ConfigError
from diffusion_jax.experiment.config.files import load_config
from diffusion_jax.pipeline import Pipeline
from diffusion_jax.runs.beginning.first_weights import first_weights
from diffusion_jax.runs.files import export
from diffusion_jax.runs.files.export import convert_weights
from diffusion_jax.runs.files.native import find_about
from diffusion_jax.runs.files.released import config_for, describe_file
from diffusion_jax.runs.folder import save_config
from diffusion_jax.runs.weights import load_checkpoint_file, make_frozen, start_frozen
from diffusion_jax.train.checkpoints.saving import open_checkpoints
from diffusion_jax.train.ema import ema_params

TINY = "configs/mnist.py:tiny"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run whose averages are other numbers than its parameters, with names for its classes."""
    workdir = tmp_path_factory.mktemp("native") / "run"
    config = load_config(TINY, ["--config.mesh.fsdp=1"])
    save_config(workdir, config)
    checkpoints = open_checkpoints(workdir / "checkpoints")
    state = drawn(built(TINY).abstract_state())
    names = [f"digit {i}" for i in range(10)]
    checkpoints.save(3, state, {"next_batch": 3, "class_names": names})
    checkpoints.close()
    return workdir, state


@pytest.fixture(scope="module")
def file(run, tmp_path_factory):
    target = tmp_path_factory.mktemp("native") / "mnist.safetensors"
    lines = convert_weights(run[0], target, "safetensors")
    assert lines == ["layout native: this program reads it without --config", f"wrote {target}"]
    return target


def said(path):
    about = find_about(path)
    assert about is not None
    return about


def same(found, expected):
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.slow
def test_the_demo_draws_from_its_file_as_from_its_run(run, file, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # nothing beside the file is read
    pipe = Pipeline.from_checkpoint(file)
    same(pipe.params, ema_params(run[1].opt_state))
    assert pipe.class_names == tuple(f"digit {i}" for i in range(10))
    same(pipe.params, Pipeline.from_workdir(run[0]).params)
    assert pipe(["digit 7"], num_steps=1).std() > 1
    other = Pipeline.from_checkpoint(file, overrides=["--config.sampler.num_steps=3"])
    assert other.experiment.drawing.num_steps == 3
    with pytest.raises(ValueError, match="model.patch_size: 2 -> 1: only config.sampler, .* can"):
        Pipeline.from_checkpoint(file, overrides=["--config.model.patch_size=1"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "weights", "averages"),
    [({"raw": True}, "raw", False), ({"with_ema": True}, "raw", True), ({}, "averages", False)],
)
def test_the_weights_that_were_asked_for_are_in_it(run, tmp_path, options, weights, averages):
    target = tmp_path / "x.safetensors"
    convert_weights(run[0], target, "native", **options)
    assert said(target).weights == weights and said(target).step == 3
    own = {"raw": run[1].params, "averages": ema_params(run[1].opt_state)}
    same(load_checkpoint_file(built(TINY), target)[0].params, own[weights])
    if averages:
        same(load_checkpoint_file(built(TINY), target, ema=True)[0].params, own["averages"])
    else:
        with pytest.raises(ValueError, match="has no averages"):
            load_checkpoint_file(built(TINY), target, ema=True)


def test_a_file_says_what_it_is(file):
    text = "\n".join(describe_file(file))
    assert "a native file of this program: unet, " in text and "(float32)" in text
    assert "weights: averages of step 3" in text and "trained on: mnist_subset" in text
    assert "classes: 10 (digit 0, " in text and "no --config is needed" in text


def test_training_begins_from_a_file_as_from_its_run(run, file):
    """The averages are what the file has; a run gives its raw parameters unless asked."""
    experiment = built(TINY, f"--config.train.ckpt_path={file}")
    experiment.task.check_sources()
    found, said = first_weights(experiment, drawn(experiment.abstract_state(), 7))
    same(found.params, ema_params(run[1].opt_state))
    assert said == [f"{file}: 0 parameters not loaded", f"{file}: 0 parameters not used"]


def test_a_frozen_first_stage_is_read_from_the_file_of_its_run(tmp_path):
    path = tmp_path / "vae.safetensors"
    experiment = built("configs/emoji_ldm.py:tiny", f"--config.first_stage.weights={path}")
    own = drawn(experiment.abstract_frozen()["first_stage"], 5)
    raw = drawn(experiment.abstract_frozen()["first_stage"], 6)
    trees = {"params/": {"autoencoder": raw}, "ema/": {"autoencoder": own}}
    save_weights(path, [export_tree(t, p) for p, t in trees.items()], metadata={KEY: "{}"})
    same(make_frozen(experiment)["first_stage"], own)


def test_a_file_becomes_a_run_and_a_smaller_file(file, run, tmp_path, monkeypatch):
    small = tmp_path / "small.safetensors"
    convert_weights(file, small, "safetensors", dtype=np.float16)
    assert said(small)[1:4] == said(file)[1:4]
    assert small.stat().st_size < 0.7 * file.stat().st_size
    written = []
    monkeypatch.setattr(export, "write_run", lambda *parts: written.append(parts))
    convert_weights(file, tmp_path / "back", "run")
    (_, found, config, workdir, known), *_ = written
    same(found.params, ema_params(run[1].opt_state))
    assert config.model == load_config(TINY).model and workdir == tmp_path / "back"
    assert tuple(known["class_names"]) == said(file).class_names


@pytest.mark.slow
def test_a_model_with_frozen_networks_needs_nothing_beside_its_file(tmp_path):
    """What the other layouts cannot name, the codebook's scale among it, is there, and no path."""
    path = "configs/sd15.py:tiny"
    weights = trained(path)
    workdir, target = tmp_path / "run", tmp_path / "x.safetensors"
    overrides = {"first_stage.weights": "/home/me/secret/vae.ckpt", "mesh.fsdp": 4}
    save_config(workdir, load_config(path, overrides))
    checkpoints = open_checkpoints(workdir / "checkpoints")
    checkpoints.save(1, drawn(built(path).abstract_state())._replace(params=weights.params), {})
    checkpoints.close()
    start_frozen(built(path), workdir, weights.frozen)
    convert_weights(workdir, target, "native", raw=True)
    text = read_metadata(target)[KEY]
    assert "secret" not in text and "vae.ckpt" in text and "fsdp" not in text
    found = load_checkpoint_file(built(path), target)[0]
    same(found.frozen, weights.frozen)
    same(found.params, weights.params)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("[]", "holds list and should hold an object"),
        ("{", "no JSON"),
        ("[" * 100_000, "no JSON"),
        ('{"weights": "raw", "step": 1}', "should hold config"),
        ('{"config": {"a": {"$call": 1}}, "weights": "raw", "step": 1}', "holds no config"),
        ('{"config": {"model": {}}}', "is damaged: 'weights'"),
        (f'{{"config": "{"x" * 2**24}"}}', "has more than"),
    ],
)
def test_a_damaged_header_is_one_sentence(tmp_path, header, message):
    path = tmp_path / "x.safetensors"
    save_weights(path, [], {"params/a": np.zeros(1)}, {KEY: header})
    for read in (config_for, describe_file, find_about):
        with pytest.raises(ConfigError, match=message):
            read(path)


def test_a_config_of_a_stranger_calls_nothing_of_the_system(tmp_path, file):
    facts = json.loads(read_metadata(file)[KEY])
    facts["config"]["sampler"] = {"name": "subprocess:run", "args": "x"}
    path = tmp_path / "x.safetensors"
    save_weights(path, [], {"params/a": np.zeros(1)}, {KEY: json.dumps(facts)})
    with pytest.raises(ConfigError, match="should be an object of your own|is unknown"):
        Pipeline.from_checkpoint(path)
