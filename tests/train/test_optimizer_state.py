"""Schedule-free optimizers are evaluated where optax says, and all begin from loaded parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

from diffusion_jax.train.ema import ema_params
from diffusion_jax.train.optimizer import OPTIMIZERS, make_optimizer
from diffusion_jax.train.optimizer_state import evaluation_params, is_schedule_free, restarted

leaves = jax.tree.leaves
FIRST = {"network": {"w": jnp.array([1.0, -2.0, 3.0])}, "conditioner": {"b": jnp.array([0.5])}}
OTHER = {"network": {"w": jnp.array([4.0, 0.5, -1.0])}, "conditioner": {"b": jnp.array([-0.25])}}
# The optimizers of optax.contrib that keep a copy of the first parameters.
KEEPERS = ("prodigy", "madgrad", "cocob", "schedule_free_sgd", "schedule_free_adamw", "dog", "dowg")


def numbers(state):
    """Show the keys of random numbers as numbers."""
    is_key = lambda leaf: jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return jax.tree.map(lambda leaf: jax.random.key_data(leaf) if is_key(leaf) else leaf, state)


def is_dog(node):
    return "max_dist" in getattr(node, "_fields", ())


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


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_training_from_loaded_parameters_begins_there(name):
    """A restarted state is the state that the loaded parameters would have made."""
    tx = make_optimizer(name, learning_rate=0.1, ema_decay=0.9).tx
    first, want = tx.init(FIRST), tx.init(OTHER)
    state = restarted(first, OTHER, tx.init)
    assert_equal(numbers(state), numbers(want), rtol=1e-6)
    assert [leaf.dtype for leaf in leaves(state)] == [leaf.dtype for leaf in leaves(first)]
    changed = jax.tree.map(lambda a, b: bool(np.any(a != b)), numbers(first), numbers(want))
    assert any(leaves(changed["optimizer"])) == (name in KEEPERS)
    # What does not depend on the parameters is not computed again: moments are large.
    same = jax.tree.map(lambda a, b: a is b, state, first)
    assert leaves(same) == [not moved for moved in leaves(changed)]


def test_a_restart_traces_the_optimizer_once():
    tx, traced = make_optimizer("prodigy", ema_decay=0.9).tx, []

    def init(params):
        traced.append(params)
        return tx.init(params)

    restarted(tx.init(FIRST), OTHER, init)
    assert len(traced) == 1
    assert restarted({}, OTHER, init) == {} and len(traced) == 1


def test_what_dog_begins_with_is_a_share_of_the_norm_of_what_was_loaded():
    """Ivgi et al. 2023, section 4.1: r = 1e-6 (1 + |x_0|), here of numbers a thousand times."""
    loaded = jax.tree.map(lambda leaf: 1000 * leaf, OTHER)
    tx = make_optimizer("dog", learning_rate=1.0, ema_decay=None).tx
    state = restarted(tx.init(FIRST), loaded, tx.init)
    (distance,) = [n.max_dist for n in leaves(state, is_leaf=is_dog) if is_dog(n)]
    norm = 1000 * np.sqrt(4.0**2 + 0.5**2 + 1.0**2 + 0.25**2)
    np.testing.assert_allclose(distance, 1e-6 * (1 + norm), rtol=1e-6)
    # Its first step from there is as long as the distance, whatever the gradient.
    moved = descend(tx, loaded, state, 1)[0]
    steps = leaves(jax.tree.map(lambda a, b: np.sum((a - b) ** 2), moved, loaded))
    np.testing.assert_allclose(np.sqrt(sum(steps)), distance, rtol=0.1)  # float32 near 4000


def test_parts_of_the_parameters_begin_there_too():
    """Of a pattern, and of several optimizers, as first stages have them."""
    masked = make_optimizer("prodigy", ema_decay=None, trainable="/w").tx
    state = restarted(masked.init(FIRST), OTHER, masked.init)
    assert_equal(state, masked.init(OTHER), rtol=0)
    tx = make_optimizer("prodigy", ema_decay=None).tx
    init = lambda params: {"one": tx.init(params["network"]), "other": tx.init(params)}
    assert_equal(restarted(init(FIRST), OTHER, init), init(OTHER), rtol=0)
    assert restarted({}, OTHER, init) == {}


def test_a_momentum_of_zero_is_refused():
    with pytest.raises(ValueError, match="b1 = 0.0 should be above 0 with schedule_free_sgd"):
        make_optimizer("schedule_free_sgd", b1=0.0)
