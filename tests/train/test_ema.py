"""The average against a plain loop of LitEma's rule, its first decay, its place in a chain."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from diffusion_jax.train.ema import (
    EmaState,
    ema,
    ema_params,
    has_ema,
    late,
    reset_ema,
)

PARAMS = {"conv": {"kernel": jnp.ones((3, 2)), "bias": jnp.zeros((2,))}}


def lit_ema(trajectory, decay, use_num_updates=True):
    """LitEma's loop in float64: the shadow after each of the given parameter values."""
    shadow, n = np.array(trajectory[0], np.float64), 0 if use_num_updates else -1
    for value in trajectory[1:]:
        d = decay
        if n >= 0:
            n += 1
            d = min(decay, (1 + n) / (10 + n))
        shadow = shadow - (1 - d) * (shadow - value)
    return shadow


def run(tx, params, num_steps):
    """Parameters of each step under a chain whose gradient is a fixed function of the step."""
    state, trajectory = tx.init(params), [params]
    for step in range(num_steps):
        gradient = jax.tree.map(lambda p: jnp.full_like(p, np.sin(step + 1.0)), params)  # noqa: B023
        updates, state = jax.jit(tx.update)(gradient, state, params)
        params = optax.apply_updates(params, updates)
        trajectory.append(params)
    return trajectory, state


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.95, 0.9999, 1.0])
@pytest.mark.parametrize("use_num_updates", [True, False])
def test_average_equals_the_plain_loop(decay, use_num_updates):
    tx = optax.chain(optax.sgd(0.1), ema(decay, use_num_updates=use_num_updates))
    trajectory, state = run(tx, PARAMS, 25)
    for name in ("kernel", "bias"):
        expected = lit_ema([p["conv"][name] for p in trajectory], decay, use_num_updates)
        np.testing.assert_allclose(ema_params(state)["conv"][name], expected, rtol=1e-6, atol=1e-6)


def test_first_decay_is_two_elevenths():
    tx = ema(0.9999)
    params = {"w": jnp.zeros(())}
    _, state = tx.update({"w": jnp.ones(())}, tx.init(params), params)
    np.testing.assert_allclose(state.params["w"], 1 - 2 / 11, rtol=1e-7)
    assert int(state.num_updates) == 1


def test_warm_up_ends_at_the_decay():
    tx = ema(0.9999)
    params = {"w": jnp.zeros(())}
    state = EmaState(jnp.asarray(10**6, jnp.int32), {"w": jnp.zeros(())})
    _, state = tx.update({"w": jnp.ones(())}, state, params)
    np.testing.assert_allclose(state.params["w"], 1e-4, rtol=1e-6)


def test_updates_pass_unchanged():
    tx = ema()
    updates = {"w": jnp.arange(3.0)}
    out, _ = tx.update(updates, tx.init(updates), updates)
    np.testing.assert_array_equal(out["w"], updates["w"])


def test_shadow_is_float32_and_follows_the_rounded_parameters():
    params = {"w": jnp.ones((4,), jnp.bfloat16)}
    tx = optax.chain(optax.sgd(1e-4), ema(0.0, use_num_updates=False))
    updates, state = tx.update({"w": jnp.ones((4,), jnp.bfloat16)}, tx.init(params), params)
    assert ema_params(state)["w"].dtype == jnp.float32
    new = optax.apply_updates(params, updates)
    np.testing.assert_array_equal(ema_params(state)["w"], new["w"].astype(jnp.float32))


def test_shadow_keeps_changes_too_small_for_bfloat16():
    params = {"w": jnp.ones((), jnp.bfloat16)}
    tx = ema(0.9999, use_num_updates=False)
    state = tx.init(params)
    _, state = tx.update({"w": jnp.asarray(-1.0, jnp.bfloat16)}, state, params)
    np.testing.assert_allclose(state.params["w"], 0.9999, rtol=1e-6)


@pytest.mark.parametrize("use_num_updates", [True, False])
def test_an_average_in_bfloat16_follows_the_one_in_float32(use_num_updates):
    params = {"w": jnp.ones((64, 64))}
    chains = [
        ema(0.999, use_num_updates=use_num_updates, dtype=dtype)
        for dtype in ("bfloat16", "float32")
    ]
    updates = {"w": jnp.full((64, 64), -0.5)}
    states = [tx.init(params) for tx in chains]
    assert states[0].params["w"].dtype == jnp.bfloat16
    for _ in range(50):
        states = [
            jax.jit(tx.update)(updates, state, params)[1]
            for tx, state in zip(chains, states, strict=True)
        ]
    small, exact = (ema_params(state)["w"] for state in states)
    assert small.dtype == jnp.float32
    # Rounded to the nearest number it would have stayed 1 without a warm-up.
    np.testing.assert_allclose(small.mean(), exact.mean(), atol=2e-4)
    # One number has drawn 50 times, with a standard deviation of 0.009 or less.
    np.testing.assert_allclose(small, exact, atol=0.07)
    new = reset_ema(states[0], params)
    assert new.params["w"].dtype == jnp.bfloat16


def test_a_dtype_that_is_not_kept():
    with pytest.raises(ValueError, match=r"ema_dtype = 'float16' is unknown; choose from float32"):
        ema(dtype="float16")


def test_reset():
    tx = optax.chain(optax.adam(0.1), ema(0.99))
    trajectory, state = run(tx, PARAMS, 3)
    new = reset_ema(state, trajectory[-1])
    assert int(new[1].num_updates) == 3
    np.testing.assert_array_equal(
        ema_params(new)["conv"]["kernel"], trajectory[-1]["conv"]["kernel"]
    )
    jax.tree.map(np.testing.assert_array_equal, new[0], state[0])


def test_state_survives_a_round_trip_through_numpy():
    tx = optax.chain(optax.sgd(0.1), ema(0.99))
    _, state = run(tx, PARAMS, 3)
    restored = jax.tree.map(jnp.asarray, jax.tree.map(np.asarray, state))
    gradient = jax.tree.map(jnp.ones_like, PARAMS)
    expected = tx.update(gradient, state, PARAMS)
    jax.tree.map(np.testing.assert_array_equal, tx.update(gradient, restored, PARAMS), expected)


def test_no_buffer_is_shared_with_the_parameters():
    state = ema().init(PARAMS)
    donate = jax.jit(lambda p, s: (p, s), donate_argnums=(0, 1))
    params = jax.tree.map(jnp.copy, PARAMS)
    _, (kept,) = donate(params, reset_ema((state,), params))  # the same buffer twice would raise
    jax.tree.map(np.testing.assert_array_equal, kept.params, PARAMS)


def test_missing_average():
    state = optax.adam(0.1).init(PARAMS)
    assert not has_ema(state)
    with pytest.raises(ValueError, match="holds 0 averages"):
        ema_params(state)
    with pytest.raises(ValueError, match="holds 0 averages"):
        reset_ema(state, PARAMS)
    with pytest.raises(ValueError, match="holds 2 averages"):
        ema_params((ema().init(PARAMS), ema().init(PARAMS)))
    assert has_ema(optax.chain(optax.adam(0.1), ema()).init(PARAMS))


@pytest.mark.parametrize("decay", [-0.1, 1.1, float("nan")])
def test_decay_outside_the_unit_interval(decay):
    with pytest.raises(ValueError, match=r"ema decay = .* should be between 0 and 1"):
        ema(decay)


def test_update_without_parameters():
    tx = ema()
    with pytest.raises(ValueError, match="needs the parameters"):
        tx.update(PARAMS, tx.init(PARAMS))


@pytest.mark.parametrize(("start", "every"), [(4, 1), (0, 3), (4, 3), (30, 2)])
@pytest.mark.parametrize("use_num_updates", [True, False])
def test_an_average_that_begins_later_is_the_plain_loop_from_there(start, every, use_num_updates):
    """It copies until its start, then sees each so-manieth step; its warm-up begins there too."""
    average = ema(0.9, use_num_updates=use_num_updates)
    tx = optax.chain(optax.sgd(0.1), late(average, start_step=start, update_every=every))
    trajectory, state = run(tx, PARAMS, 25)
    seen = [p["conv"]["kernel"] for p in trajectory]
    wanted = [seen[min(start, 25)], *seen[start + every :: every]]
    want = lit_ema(wanted, 0.9, use_num_updates)
    np.testing.assert_allclose(ema_params(state)["conv"]["kernel"], want, rtol=1e-6, atol=1e-6)


def test_an_average_that_begins_later_goes_on_exactly():
    """A state that went through NumPy, as in a checkpoint, gives the same bits, at any step."""
    average = late(ema(0.99), start_step=5, update_every=2)
    whole, params = average.init(PARAMS), PARAMS
    split = whole
    for step in range(12):
        updates = jax.tree.map(lambda p: jnp.full_like(p, np.cos(step)), params)  # noqa: B023
        whole, split = (average.update(updates, s, params)[1] for s in (whole, split))
        split = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf)), split)
        params = optax.apply_updates(params, updates)
    jax.tree.map(np.testing.assert_array_equal, whole, split)
    assert int(whole.seen) == 12 and int(whole.average.num_updates) == 3


def test_an_average_that_begins_at_once_has_the_state_of_before():
    average = ema(0.9)
    assert late(average) is average
    for name, value in (("start_step", -1), ("update_every", 0)):
        with pytest.raises(
            ValueError, match=rf"ema\.{name} = {value} should be at least {value + 1}"
        ):
            late(average, **{name: value})


def test_a_decay_of_zero_copies_to_the_last_bit():
    tx, params = ema(0.0), {"w": jnp.array([1e-8, 3.0])}
    _, state = tx.update({"w": jnp.array([1e-9, 1e8])}, tx.init(params), params)
    np.testing.assert_array_equal(state.params["w"], params["w"] + jnp.array([1e-9, 1e8]))
