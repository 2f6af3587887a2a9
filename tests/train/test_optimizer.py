"""The chain: every row of the table, the mask, clipping, the schedule, and sentences for typos."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support.compilations import times_compiled

from diffusion_jax.devices.mesh import batch_sharding, make_mesh
from diffusion_jax.devices.partition import fsdp, tree_shardings
from diffusion_jax.train.ema import ema_params, has_ema
from diffusion_jax.train.lr_schedules import LR_SCHEDULES, with_warmup
from diffusion_jax.train.optimizer import (
    NOT_OPTIMIZERS,
    OPTIMIZERS,
    kernels_mask,
    make_optimizer,
    only_trainable,
    scaled_learning_rate,
)
from diffusion_jax.train.state import init_sharded, init_state
from diffusion_jax.train.step import jit_train_step, make_train_step

FEW = ("adamw", "adafactor", "lion", "muon", "sophia", "noisy_sgd")
REST = tuple(sorted(set(OPTIMIZERS) - set(FEW)))


def params():
    return {
        "dense": {"kernel": jnp.full((4, 6), 0.3), "bias": jnp.full((6,), 0.1)},
        "norm": {"scale": jnp.ones((4,))},
    }


def loss_fn(p, mutable, frozen, batch, keys, *, train):
    x = batch["x"] * p["norm"]["scale"][None]
    out = x @ p["dense"]["kernel"] + p["dense"]["bias"][None]
    return jnp.mean((out - 1.0) ** 2), ({}, mutable)


def train(name, num_steps=4):
    tx, _ = make_optimizer(name, learning_rate=1e-2, ema_decay=0.9)
    mesh = make_mesh(devices=jax.devices()[:1])
    state = init_sharded(lambda: init_state(params(), tx), mesh)
    step = jit_train_step(make_train_step(loss_fn, tx, seed=0), state)
    batch = {"x": jax.device_put(np.sin(np.arange(64.0)).reshape(16, 4), batch_sharding(mesh))}
    losses, before = [], times_compiled("train_step")
    for _ in range(num_steps):
        state, metrics = step(state, batch, {})
        losses.append(float(metrics["loss"]))
    return state, losses, times_compiled("train_step") - before


def check_row(name):
    state, losses, compiled = train(name)
    assert compiled == 1
    assert np.isfinite(losses).all()
    assert losses[-1] <= losses[0]
    dtypes = {leaf.dtype for leaf in jax.tree.leaves((state.params, ema_params(state.opt_state)))}
    assert dtypes == {jnp.dtype("float32")}


@pytest.mark.parametrize("name", FEW)
def test_row_trains_and_compiles_once(name):
    check_row(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", REST)
def test_every_row_trains_and_compiles_once(name):
    check_row(name)


def test_table_holds_the_optimizers_of_optax():
    assert {"adam", "adamw", "sgd", "lion", "lamb", "adafactor", "rmsprop"} <= set(OPTIMIZERS)
    assert {"muon", "prodigy", "ademamix", "sophia", "schedule_free_adamw"} <= set(OPTIMIZERS)
    assert {"dog", "dowg", "momo", "cocob", "dadapt_adamw"} <= set(OPTIMIZERS)
    assert not {"ema", "chain", "scale_by_adam", "constant_schedule"} & set(OPTIMIZERS)


def test_defaults_are_adamw_as_in_torch_with_an_average():
    tx, lr_at = make_optimizer()
    reference = optax.adamw(1e-4, b1=0.9, b2=0.999, eps=1e-8, weight_decay=1e-2)
    p, gradients = params(), jax.tree.map(lambda leaf: jnp.sin(leaf + 1.0), params())
    state = tx.init(p)
    updates, state = tx.update(gradients, state, p)
    expected, _ = reference.update(gradients, reference.init(p), p)
    jax.tree.map(np.testing.assert_array_equal, updates, expected)
    assert has_ema(state) and list(state) == ["clip", "optimizer", "ema"]
    assert float(lr_at(0)) == float(lr_at(10**6)) == pytest.approx(1e-4)


def test_average_follows_the_updated_parameters():
    tx, _ = make_optimizer("sgd", learning_rate=0.1, ema_decay=0.0, ema_use_num_updates=False)
    p = params()
    updates, state = tx.update(jax.tree.map(jnp.ones_like, p), tx.init(p), p)
    jax.tree.map(np.testing.assert_array_equal, ema_params(state), optax.apply_updates(p, updates))
    assert not has_ema(make_optimizer(ema_decay=None).tx.init(p))


def test_clipping():
    tx, _ = make_optimizer("sgd", learning_rate=1.0, gradient_clip_norm=0.5, ema_decay=None)
    p = params()
    for scale in (100.0, 1e-3):
        gradients = jax.tree.map(lambda leaf: jnp.full_like(leaf, scale), p)  # noqa: B023
        updates, _ = tx.update(gradients, tx.init(p), p)
        norm = float(optax.tree.norm(gradients))
        assert float(optax.tree.norm(updates)) == pytest.approx(min(norm, 0.5), rel=1e-5)


def test_clipping_leaves_the_structure_of_the_state():
    with_clip = make_optimizer(gradient_clip_norm=1.0).tx.init(params())
    without = make_optimizer().tx.init(params())
    assert jax.tree.structure(with_clip) == jax.tree.structure(without)


def test_schedule_drives_the_updates():
    multiplier = with_warmup(LR_SCHEDULES["linear"](transition_steps=10), 2)
    tx, lr_at = make_optimizer("sgd", learning_rate=0.5, lr_multiplier=multiplier, ema_decay=None)
    p = {"w": jnp.zeros(())}
    state = tx.init(p)
    for n in range(5):
        updates, state = jax.jit(tx.update)({"w": jnp.ones(())}, state, p)
        expected = 0.5 * min((n + 1) / 2, 1) * (1 - n / 10)
        assert float(-updates["w"]) == pytest.approx(expected, rel=1e-6)
        assert float(lr_at(n)) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("name", ["adamw", "adafactor", "muon", "ademamix"])
def test_kernels_mask_spares_biases_and_scales(name):
    option = "weight_decay_rate" if name == "adafactor" else "weight_decay"
    p = params()
    zero = jax.tree.map(jnp.zeros_like, p)
    decay = {option: 0.1}
    for mask, spared in (("kernels", True), ("all", False)):
        tx, _ = make_optimizer(name, learning_rate=1.0, weight_decay_mask=mask, **decay)
        updates, _ = tx.update(zero, tx.init(p), p)
        if name != "muon":  # decays vectors by an option of its own, adam_weight_decay
            moved = float(jnp.abs(updates["dense"]["bias"]).max()) > 0
            assert moved == (not spared)
        assert float(jnp.abs(updates["dense"]["kernel"]).min()) > 0


def test_kernels_mask():
    stacked = {"scan": {"bias": jnp.zeros((3, 4)), "kernel": jnp.zeros((3, 4, 4))}}
    tree = params() | stacked | {"logvar": jnp.zeros((10,)), "embedding": jnp.zeros((10, 4))}
    assert kernels_mask(tree) == {
        "dense": {"kernel": True, "bias": False},
        "norm": {"scale": False},
        "scan": {"bias": False, "kernel": True},
        "logvar": False,
        "embedding": True,
    }


def test_options_reach_the_factory():
    tx, _ = make_optimizer("adamw", mu_dtype="bfloat16", b1=0.5)
    moments = tx.init(params())["optimizer"][0]
    assert moments.mu["dense"]["kernel"].dtype == jnp.bfloat16
    assert moments.nu["dense"]["kernel"].dtype == jnp.float32


def test_a_second_moment_in_bfloat16_follows_the_one_in_float32():
    options = {"learning_rate": 1e-3, "ema_decay": None}
    chains = [make_optimizer(**options, nu_dtype=dtype).tx for dtype in ("bfloat16", None)]
    p = {"w": jnp.zeros((64, 64))}
    states, moved = [tx.init(p) for tx in chains], [p, p]
    for i in range(40):
        gradients = {"w": jnp.full((64, 64), 1.0 + 0.5 * np.sin(i))}
        for j, tx in enumerate(chains):
            updates, states[j] = jax.jit(tx.update)(gradients, states[j], moved[j])
            moved[j] = optax.apply_updates(moved[j], updates)
    small, exact = (state["optimizer"][0].nu["w"] for state in states)
    assert (small.dtype, exact.dtype) == (jnp.bfloat16, jnp.float32)
    np.testing.assert_allclose(small.astype(jnp.float32).mean(), exact.mean(), rtol=2e-3)
    np.testing.assert_allclose(*(p["w"] for p in moved), rtol=0.03)
    with pytest.raises(
        ValueError, match=r"optimizer\.nu_dtype = 'float16' is unknown; choose from"
    ):
        make_optimizer(nu_dtype=jnp.float16)


@pytest.mark.parametrize(
    ("name", "options", "bytes_a_parameter"),
    [
        ("adamw", {}, 8),
        ("adamw", {"mu_dtype": "bfloat16"}, 6),
        ("adamw", {"mu_dtype": "bfloat16", "nu_dtype": "bfloat16"}, 4),
        ("lion", {"mu_dtype": "bfloat16"}, 2),
        ("adafactor", {}, 0),
        ("adafactor", {"momentum": 0.9, "dtype_momentum": "bfloat16"}, 2),
    ],
    ids=str,
)
def test_moments_are_as_small_as_asked_and_split_and_the_average_is_float32(
    name, options, bytes_a_parameter
):
    shapes = {"dense": {"kernel": (512, 1024)}, "conv": {"kernel": (3, 3, 256, 512)}}
    weights = jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32),
        shapes,
        is_leaf=lambda node: isinstance(node, tuple),
    )
    tx, _ = make_optimizer(name, **options)
    state = jax.eval_shape(lambda weights: init_state(weights, tx), weights)
    placed = tree_shardings(make_mesh(data=1, fsdp=8), state, [("^(params|opt_state)/", fsdp())])

    def in_bytes(tree, shardings, parts):
        shape = lambda leaf, sharding: sharding.shard_shape(leaf.shape) if parts > 1 else leaf.shape
        sizes = jax.tree.map(
            lambda leaf, sharding: math.prod(shape(leaf, sharding)) * leaf.dtype.itemsize,
            tree,
            shardings,
        )
        return sum(jax.tree.leaves(sizes))

    count = sum(leaf.size for leaf in jax.tree.leaves(weights))
    optimizer, average = state.opt_state["optimizer"], state.opt_state["ema"]
    where = placed.opt_state["optimizer"], placed.opt_state["ema"]
    # Factors of a matrix, one number a row and a column, are too small to split.
    for parts in (1, 8):
        size = in_bytes(optimizer, where[0], parts)
        assert size == pytest.approx(bytes_a_parameter * count / parts, abs=0.02 * count)
        size = in_bytes(average, where[1], parts)
        assert size == pytest.approx(4 * count / parts, rel=0.001)


def test_scale_lr():
    assert scaled_learning_rate(1e-6, 96) == pytest.approx(9.6e-5)
    assert scaled_learning_rate(1e-6, 96, scale_lr=False) == 1e-6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"name": "adamW"},
            r"optimizer.name = 'adamW' is unknown; did you mean .*adamw.*choose from",
        ),
        ({"name": "zzz"}, "is unknown; choose from acprop"),
        (
            {"beta1": 0.9},
            "optimizer.beta1 = 0.9 is not an option of adamw; choose from b1, b2, eps",
        ),
        ({"mask": None}, "optimizer.mask = None is not an option of adamw"),
        (
            {"learning_rate": -1.0},
            "optimizer.learning_rate = -1.0 should be at least 0, and finite",
        ),
        ({"learning_rate": float("nan")}, "optimizer.learning_rate = nan should be"),
        ({"learning_rate": 1e300}, r"optimizer.learning_rate = 1e\+300 should be .* in float32"),
        ({"b2": 1.5}, "optimizer.b2 = 1.5 should be at least 0 and below 1"),
        ({"b1": -1}, "optimizer.b1 = -1 should be at least 0 and below 1"),
        ({"b2": float("nan")}, "optimizer.b2 = nan should be finite"),
        ({"weight_decay": float("nan")}, "optimizer.weight_decay = nan should be finite"),
        ({"name": "sgd", "momentum": 1.0}, "optimizer.momentum = 1.0 should be at least 0"),
        ({"gradient_clip_norm": 0.0}, "optimizer.gradient_clip_norm = 0.0 should be above 0"),
        (
            {"weight_decay_mask": "bias"},
            "weight_decay_mask = 'bias' is unknown; choose from all, kernels",
        ),
        ({"name": "sgd", "weight_decay_mask": "kernels"}, "sgd has no mask"),
        ({"ema_decay": 2.0}, "ema decay = 2.0"),
        (
            {"name": "rprop", "lr_multiplier": LR_SCHEDULES["constant"]()},
            "'rprop' takes a constant learning rate only",
        ),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_optimizer(**arguments)


@pytest.mark.parametrize("name", sorted(NOT_OPTIMIZERS))
def test_refused_names_say_why(name):
    assert name not in OPTIMIZERS
    with pytest.raises(ValueError, match="cannot be used: it"):
        make_optimizer(name)


def test_parameters_that_are_not_trainable_keep_their_bits_and_have_no_moments():
    tx = make_optimizer(learning_rate=0.1, weight_decay=0.5, trainable="dense/").tx
    step = jax.jit(make_train_step(only_trainable("dense/", loss_fn), tx, seed=0))
    batch = {"x": jnp.linspace(-1.0, 2.0, 12).reshape(3, 4)}
    state, metrics = step(init_state(params(), tx), batch, {})
    np.testing.assert_array_equal(state.params["norm"]["scale"], params()["norm"]["scale"])
    assert np.all(state.params["dense"]["kernel"] != params()["dense"]["kernel"])
    assert not [
        leaf for leaf in jax.tree.leaves(state.opt_state["optimizer"]) if leaf.shape == (4,)
    ]
    gradient = jax.grad(lambda p: loss_fn(p, {}, {}, batch, None, train=True)[0])(params())
    trained = optax.tree.norm(gradient["dense"])
    np.testing.assert_allclose(metrics["grad_norm"], trained, rtol=1e-6)


def test_a_pattern_that_finds_nothing_is_refused():
    message = "trainable = 'time_' should be found in a parameter's path; there are dense/bias"
    with pytest.raises(ValueError, match=message):
        make_optimizer(trainable="time_").tx.init(params())


def test_encoders_of_conditions_may_learn_more_slowly():
    tree = {"network": jnp.ones(3), "conditioner": {"clip": jnp.ones(3)}}
    plain, slower = (
        make_optimizer("sgd", learning_rate=0.1, ema_decay=None, conditioner_lr_factor=factor).tx
        for factor in (1.0, 0.25)
    )
    assert jax.tree.structure(plain.init(tree)) == jax.tree.structure(slower.init(tree))
    updates, _ = slower.update(tree, slower.init(tree), tree)
    np.testing.assert_allclose(updates["network"], -0.1, rtol=1e-6)
    np.testing.assert_allclose(updates["conditioner"]["clip"], -0.025, rtol=1e-6)
    with pytest.raises(ValueError, match="conditioner_lr_factor = 0.25 should be 1: no encoder"):
        slower.init({"network": jnp.ones(3), "conditioner": {}})
    with pytest.raises(ValueError, match="0.5 should be 1 with schedule_free_sgd"):
        make_optimizer("schedule_free_sgd", conditioner_lr_factor=0.5)
