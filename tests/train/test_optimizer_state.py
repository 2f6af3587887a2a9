"""Schedule-free optimizers are evaluated where optax says, and all begin from loaded parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

from diffusion_jax.train.ema import ema_params, reset_ema
from diffusion_jax.train.optimizer import make_optimizer
from diffusion_jax.train.optimizer_state import evaluation_params, is_schedule_free, restarted

FIRST = {"network": {"w": jnp.array([1.0, -2.0, 3.0])}, "conditioner": {"b": jnp.array([0.5])}}
OTHER = {"network": {"w": jnp.array([4.0, 0.5, -1.0])}, "conditioner": {"b": jnp.array([-0.25])}}
# The optimizers of optax.contrib that keep a copy of the first parameters.
KEEPERS = ("prodigy", "madgrad", "cocob", "schedule_free_sgd", "schedule_free_adamw", "dog", "dowg")
# By default dog's first distance follows from the norm of the parameters.
DISTANCE = {"dog": {"init_step": ("distance", 1e-3)}}


def quadratic(params):
    """Half of a sum of squares with curvatures 1 and 3."""
    return 0.5 * jnp.sum(params["network"]["w"] ** 2) + 1.5 * jnp.sum(
        params["conditioner"]["b"] ** 2
    )


def descend(tx, params, state, steps):
    for _ in range(steps):
        value, gradient = jax.value_and_grad(quadratic)(params)
        updates, state = tx.update(gradient, state, params, value=value)
        params = optax.apply_updates(params, updates)
    return params, state


def assert_equal(one, other, **tolerance):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), one, other)


@pytest.mark.parametrize("name", ["prodigy", "dog", "dowg"])
def test_what_finds_its_step_is_optaxs_on_a_quadratic(name):
    tx = make_optimizer(name, learning_rate=1.0, ema_decay=None).tx
    ours, _ = descend(tx, FIRST, tx.init(FIRST), 20)
    theirs = optax.with_extra_args_support(getattr(optax.contrib, name)(1.0))
    want, _ = descend(theirs, FIRST, theirs.init(FIRST), 20)
    assert_equal(ours, want, rtol=1e-6)
    assert quadratic(ours) < quadratic(FIRST)


@pytest.mark.parametrize("name", ["schedule_free_sgd", "schedule_free_adamw"])
def test_what_is_evaluated_is_what_optax_evaluates(name):
    """Without a decay the average is x itself, to the last bit."""
    tx = make_optimizer(name, learning_rate=0.1, b1=0.9, ema_decay=None).tx
    params, state = descend(tx, FIRST, tx.init(FIRST), 12)
    theirs = getattr(optax.contrib, name)(0.1, b1=0.9)
    trained, their_state = descend(theirs, FIRST, theirs.init(FIRST), 12)
    want = optax.contrib.schedule_free_eval_params(their_state, trained)
    assert_equal(params, trained, rtol=1e-6)
    assert_equal(evaluation_params(state, params), want, rtol=1e-6)
    assert_equal(ema_params(state), evaluation_params(state, params), rtol=0)
    assert np.abs(want["network"]["w"] - trained["network"]["w"]).max() > 0.01


def test_an_average_follows_what_is_evaluated():
    """A decay of 1/2 over x_1, x_2, ..., beside averages of other lengths."""
    options = dict(learning_rate=0.1, ema_decay=0.5, ema_use_num_updates=False, power=(0.1, 0.2))
    tx = make_optimizer("schedule_free_sgd", **options).tx
    params, state, want = FIRST, tx.init(FIRST), FIRST
    assert set(state) == {"clip", "optimizer", "ema", "power_ema"}
    for _ in range(5):
        params, state = descend(tx, params, state, 1)
        x = evaluation_params(state, params)
        want = jax.tree.map(lambda average, new: 0.5 * (average + new), want, x)
    assert_equal(ema_params(state), want, rtol=1e-5)


def test_parameters_that_are_not_trained_are_evaluated_as_they_are():
    tx = make_optimizer("schedule_free_sgd", learning_rate=0.1, ema_decay=None, trainable="/w").tx
    params, state = FIRST, tx.init(FIRST)
    for _ in range(3):
        gradient = {**jax.grad(quadratic)(params), "conditioner": {"b": jnp.zeros(1)}}
        updates, state = tx.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    np.testing.assert_array_equal(ema_params(state)["conditioner"]["b"], [0.5])
    assert np.all(ema_params(state)["network"]["w"] != params["network"]["w"])


def test_other_optimizers_are_evaluated_where_they_train():
    tx = make_optimizer("adamw").tx
    assert evaluation_params(tx.init(FIRST), OTHER) is OTHER
    assert not is_schedule_free("adamw") and is_schedule_free("schedule_free_adamw")


@pytest.mark.parametrize("name", KEEPERS)
def test_training_from_loaded_parameters_begins_there(name):
    """A restarted state is the state that the loaded parameters would have made."""
    options = DISTANCE[name] if name in DISTANCE else {}
    tx = make_optimizer(name, learning_rate=0.1, ema_decay=0.9, **options).tx
    state = reset_ema(restarted(tx.init(FIRST), OTHER), OTHER)
    assert_equal(state, tx.init(OTHER), rtol=0)
    assert_equal(descend(tx, OTHER, state, 9)[0], descend(tx, OTHER, tx.init(OTHER), 9)[0], rtol=0)
    if name == "prodigy":  # whose estimate does not move here either way
        return
    # Without it, the first step would lead away from what was loaded.
    wrong = descend(tx, OTHER, reset_ema(tx.init(FIRST), OTHER), 20)[0]
    right = descend(tx, OTHER, tx.init(OTHER), 20)[0]
    assert np.any(wrong["network"]["w"] != right["network"]["w"])


def test_copies_of_parts_are_found():
    """Of a pattern, of some names, and of what lies under one name, as first stages have them."""
    masked = make_optimizer("prodigy", ema_decay=None, trainable="/w").tx
    assert_equal(restarted(masked.init(FIRST), OTHER), masked.init(OTHER), rtol=0)
    tx = make_optimizer("prodigy", ema_decay=None).tx
    part, below = {"network": FIRST["network"]}, FIRST["conditioner"]
    state = restarted({"one": tx.init(part), "other": tx.init(below)}, OTHER)
    want = {"one": tx.init({"network": OTHER["network"]}), "other": tx.init(OTHER["conditioner"])}
    assert_equal(state, want, rtol=0)


def test_a_momentum_of_zero_is_refused():
    with pytest.raises(ValueError, match="b1 = 0.0 should be above 0 with schedule_free_sgd"):
        make_optimizer("schedule_free_sgd", b1=0.0)
