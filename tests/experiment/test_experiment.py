"""An experiment from a shipped config: one loss curve for any number of devices or
micro-batches."""

import functools

import jax
import numpy as np
import pytest
from support.experiments import built
from support.trees import drawn

from diffusion_jax.data.batches import Batches
from diffusion_jax.data.latent_cache import LatentCache
from diffusion_jax.experiment import make_experiment
from diffusion_jax.experiment.config.binding import ConfigError
from diffusion_jax.experiment.config.files import load_config
from diffusion_jax.experiment.data import Data
from diffusion_jax.train.ema import ema_params
from diffusion_jax.train.step import jit_train_step

STEPS = 3


build = functools.partial(built, "configs/mnist.py:tiny")


def host_batch(step):
    generator = np.random.default_rng(step)
    return {
        "image": generator.uniform(-1, 1, (8, 28, 28, 1)).astype(np.float32),
        "label": generator.integers(0, 10, 8).astype(np.int32),
        "caption": np.array(["not a number"] * 8),
    }


def losses(experiment):
    state = experiment.init_state()
    step_fn = jit_train_step(experiment.train_step, experiment.abstract_state())
    frozen, found = experiment.random_frozen(), []
    for step in range(STEPS):
        state, metrics = step_fn(state, experiment.to_devices(host_batch(step)), frozen)
        found.append(float(metrics["loss"]))
    return np.array(found), state


@pytest.fixture(scope="module")
def one_device():
    return losses(build())


@pytest.mark.parametrize(
    "devices",
    [pytest.param(2, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow), 8],
)
def test_the_loss_curve_is_that_of_one_device(one_device, devices):
    found, state = losses(build(devices=devices))
    np.testing.assert_allclose(found, one_device[0], rtol=2e-5)
    for ours, theirs in zip(
        jax.tree.leaves(ema_params(state.opt_state)),
        jax.tree.leaves(ema_params(one_device[1].opt_state)),
        strict=True,
    ):
        np.testing.assert_allclose(ours, theirs, atol=2e-4)


@pytest.mark.slow
def test_the_loss_curve_is_that_of_one_micro_batch(one_device):
    found, _ = losses(build("--config.train.accumulate=4", devices=2))
    np.testing.assert_allclose(found, one_device[0], rtol=2e-5)


@pytest.mark.slow
def test_learned_logvar_trains():
    _, state = losses(build("--config.loss.learn_logvar=true", "--config.loss.logvar_init=0.5"))
    logvar = np.asarray(state.params["logvar"])
    assert logvar.shape == (1000,) and np.any(logvar != 0.5)


def test_scale_lr_multiplies_by_the_batch_size():
    plain, scaled = build(), build("--config.train.scale_lr=True")
    np.testing.assert_allclose(scaled.task.lr_at(5), 8 * plain.task.lr_at(5), rtol=1e-6)


def test_scale_lr_also_scales_the_default():
    config = load_config("configs/mnist.py:tiny", ["--config.train.scale_lr=True"])
    with config.unlocked():
        del config.optimizer.learning_rate
    scaled = make_experiment(config, devices=jax.devices()[:1])
    np.testing.assert_allclose(
        scaled.task.lr_at(2) / scaled.task.lr_at(4), build().task.lr_at(2) / build().task.lr_at(4)
    )
    np.testing.assert_allclose(
        scaled.task.lr_at(4) / 1e-4, 8 * build().task.lr_at(4) / 2e-3, rtol=1e-5
    )


def test_initialisation_shares_no_key_with_training():
    experiment = build()
    root = jax.random.key(experiment.seed)
    steps = jax.vmap(jax.random.fold_in, (None, 0))(root, np.arange(64, dtype=np.uint32))
    used = {tuple(row) for row in np.asarray(jax.random.key_data(steps))}
    first = jax.random.key_data(experiment._init_key())
    children = jax.random.key_data(jax.random.split(experiment._init_key(), 4))
    assert not used & {tuple(row) for row in np.asarray([first, *children])}


def test_class_dropout_never_reaches_evaluation():
    # With every label dropped in training, evaluation still tells labels apart.
    experiment = build("--config.conditioning.embedders.label.ucg_rate=1.0")
    params = drawn(experiment.abstract_state().params)  # zero outputs would hide the labels
    batch = {key: value for key, value in host_batch(0).items() if key != "caption"}
    other = batch | {"label": (batch["label"] + 1) % 10}
    eval_step = jax.jit(experiment.eval_step)
    first, second = (
        eval_step(params, {}, experiment.random_frozen(), b, 0)["loss"] for b in (batch, other)
    )
    assert float(first) != float(second)


def test_its_repr_is_one_line():
    shown = repr(build())
    assert shown.startswith("Experiment(unet on ") and "steps of" in shown and len(shown) < 120


def test_a_wrong_model_lists_diffusion_models_and_first_stages():
    with pytest.raises(
        ConfigError,
        match=r"model\.name = 'vae' .*choose from autoencoder, autoencoder_video, dit, multiview_",
    ):
        built("configs/mnist.py:tiny", "--config.model.name=vae")


def test_batches_of_every_kind_are_as_large_as_trainings_and_have_what_embedders_read(monkeypatch):
    made, cache = [], LatentCache(None, None, (), (), {})

    def make(self, source, *records, **given):
        assert records in ((), ("records",))
        made.append((source, given))
        return Batches(None, 0, 0, ())

    for kind in ("train_batches", "cached_batches", "eval_batches"):
        monkeypatch.setattr(Data, kind, make)
    monkeypatch.setattr(Data, "source", lambda self, role: f"records of {role}")
    experiment = built("configs/mnist.py:tiny")
    experiment.train_batches("records")
    experiment.cached_batches(cache, "records")
    experiment.eval_batches("test")
    assert [source for source, _ in made] == ["records", cache, "records of test"]
    size, finish = experiment.training.batch_size, experiment.task.with_inputs
    assert all((g["batch_size"], g["finish"]) == (size, finish) for _, g in made)
    assert [g["seed"] for _, g in made if "seed" in g] == [experiment.seed] * 2


def test_training_finds_the_traces_of_the_check_again():
    """The step is traced once in a start, and so are the frozen networks."""
    experiment, traced = build(), []

    def counting(name):
        function = getattr(experiment.task, name)

        def called(*args):
            traced.append(name)
            return function(*args)

        return called

    counted = {name: counting(name) for name in ("train_step", "init_frozen")}
    experiment = experiment._replace(task=experiment.task._replace(**counted))
    state = experiment.check()
    frozen = experiment.random_frozen()
    batch = experiment.to_devices(host_batch(0))
    jit_train_step(experiment.train_step, state).trace(state, batch, frozen)
    assert sorted(traced) == ["init_frozen", "train_step"]


def test_a_loss_mask_is_read_by_the_step_and_refused_by_a_first_stage():
    mask = "--config.data.batches.loss_mask=alpha"
    experiment = build(mask)
    shape = experiment.abstract_batch()["loss_mask"].shape
    assert shape == (experiment.training.batch_size, 28, 28, 1)
    batch = host_batch(0) | {"loss_mask": np.ones((8, 28, 28, 1), np.float32)}
    assert "loss_mask" in experiment.to_devices(batch)
    with pytest.raises(ConfigError, match=r"loss_mask = 'alpha' should be left out: the loss of a"):
        built("configs/emoji_vae.py:tiny", mask)


def test_weights_of_samples_are_read_by_the_step_and_refused_where_all_count_alike():
    weight = "--config.data.batches.weight_key=weight"
    experiment = build(weight)
    assert experiment.abstract_batch()["loss_weight"].shape == (experiment.training.batch_size,)
    assert "loss_weight" in experiment.to_devices(host_batch(0) | {"loss_weight": np.ones(8)})
    experiment.check()
    with pytest.raises(
        ConfigError, match=r"weight_key = 'weight' should be left out: the loss of "
    ):
        built("configs/emoji_vae.py:tiny", weight)
    with pytest.raises(
        ConfigError, match=r"left out: config.loss.name = 'mean_flow' counts all pi"
    ):
        built("configs/mnist.py:meanflow_tiny", weight)
