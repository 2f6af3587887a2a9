"""Power averages against their closed form, and other lengths against averages of all updates."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from diffusion_jax.train.power_ema import (
    PACKED,
    Profile,
    exponent_of,
    find_tracks,
    fit,
    is_snapshot_step,
    pack,
    power_ema,
    unpack,
)

LENGTHS = (0.05, 0.1)


def direct(trajectory, length):
    """The average of a trajectory [t p] in float64: update s weighs (s^g - (s - 1)^g) / t^g."""
    g, t = exponent_of(length) + 1.0, len(trajectory)
    edges = (np.arange(t + 1, dtype=np.float64) / t) ** g
    return np.diff(edges) @ np.asarray(trajectory, np.float64)


def training(num_steps):
    """A small network that learns a function with Adam: params, trajectory, tracks of each step."""
    x = jnp.linspace(-2.0, 2.0, 64)[:, None]
    keys = jax.random.split(jax.random.key(0), 2)
    params = {"a": jax.random.normal(keys[0], (1, 16)), "b": jax.random.normal(keys[1], (16, 1))}

    def loss(params, key):
        noise = 0.3 * jax.random.normal(key, x.shape)
        return jnp.mean((jnp.tanh(x @ params["a"]) @ params["b"] / 4 - jnp.sin(3 * x) - noise) ** 2)

    tx = optax.chain(optax.adam(optax.cosine_decay_schedule(3e-3, num_steps)), power_ema(LENGTHS))

    def step(carry, key):
        params, state = carry
        updates, state = tx.update(jax.grad(loss)(params, key), state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), (params, find_tracks(state).tracks)

    keys = jax.random.split(jax.random.key(1), num_steps)
    (_, state), (trajectory, tracks) = jax.lax.scan(step, (params, tx.init(params)), keys)
    return state, trajectory, tracks


@pytest.fixture(scope="module")
def trained():
    return jax.device_get(jax.jit(training, static_argnums=0)(3000))


def flat(tree):
    return np.concatenate([np.reshape(leaf, (len(leaf), -1)) for leaf in jax.tree.leaves(tree)], 1)


def test_a_track_weighs_updates_by_a_power_of_their_number(trained):
    state, trajectory, tracks = trained
    assert find_tracks(state).seen == 3000
    for track, length in zip(tracks, LENGTHS, strict=True):
        for t in (1, 2, 700, 3000):
            expected = direct(flat(trajectory)[:t], length)
            np.testing.assert_allclose(flat(track)[t - 1], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("length", [0.01, 0.05, 0.1, 0.25])
def test_the_length_is_the_deviation_of_the_profile(length):
    s = (np.arange(100_000) + 0.5) / 100_000
    weights = s ** exponent_of(length)
    weights /= weights.sum()
    assert np.sqrt(weights @ (s - weights @ s) ** 2) == pytest.approx(length, rel=1e-4)


def test_exponents_are_those_of_the_paper():
    assert exponent_of(0.05) == pytest.approx(16.97, abs=5e-3)
    assert exponent_of(0.10) == pytest.approx(6.94, abs=5e-3)


@pytest.mark.parametrize("at", [3000, 2700])
@pytest.mark.parametrize("length", [0.03, 0.06, 0.075, 0.12])
def test_any_length_is_met_within_a_thousandth(trained, length, at):
    """From what a run keeps: two tracks in the checkpoint and three snapshots in float16."""
    _, trajectory, tracks = trained
    due = [t for t in range(1, at) if is_snapshot_step(t, 50)][-3:]
    short, long = (flat(track) for track in tracks)
    kept = [Profile(at, exponent_of(each)) for each in LENGTHS]
    kept += [Profile(t, exponent_of(LENGTHS[1]), PACKED) for t in due]
    rows = [
        short[at - 1],
        long[at - 1],
        *(np.asarray(unpack(pack(jnp.asarray(long[t - 1])))) for t in due),
    ]
    weights, distance = fit(kept, Profile(at, exponent_of(length)))
    expected = direct(flat(trajectory)[:at], length)
    error = np.linalg.norm(weights @ np.stack(rows) - expected) / np.linalg.norm(expected)
    assert error < 1e-3 and distance < 0.2


def test_averages_of_bfloat16_parameters_do_not_freeze():
    """At update 10^6 an average moves by 2e-5 of the way, far below a step of bfloat16."""
    tx, params = power_ema(LENGTHS), {"w": jnp.ones(4, jnp.bfloat16)}
    state = tx.init(params)._replace(seen=jnp.int32(999_999), tracks=({"w": jnp.zeros(4)},) * 2)
    _, state = tx.update({"w": jnp.zeros(4, jnp.bfloat16)}, state, params)
    for track, length in zip(state.tracks, LENGTHS, strict=True):
        np.testing.assert_allclose(track["w"], (exponent_of(length) + 1) * 1e-6, rtol=1e-4)


def test_a_track_that_is_kept_is_met_exactly_and_what_stands_still_too():
    kept = [Profile(900, exponent_of(0.1)), Profile(500, exponent_of(0.1), PACKED)]
    weights, distance = fit(kept, Profile(900, exponent_of(0.1)))
    np.testing.assert_allclose(weights, [1.0, 0.0], atol=1e-6)
    assert distance < 1e-6
    assert fit(kept, Profile(900, exponent_of(0.2)))[0].sum() == pytest.approx(1.0)


def test_products_of_profiles_are_integrals():
    """The distance that fit reports, by a sum over updates instead of the closed form."""
    kept = [Profile(40_000, 7.0), Profile(30_000, 7.0), Profile(20_000, 3.0)]
    target = Profile(36_000, 12.0)
    weights, distance = fit(kept, target)
    s = np.arange(40_000) + 0.5

    def profile(of):
        return np.where(s < of.step, (of.exponent + 1) / of.step * (s / of.step) ** of.exponent, 0)

    wanted = profile(target)
    met = sum(w * profile(of) for w, of in zip(weights, kept, strict=True))
    expected = np.linalg.norm(met - wanted) / np.linalg.norm(wanted)
    assert distance == pytest.approx(expected, rel=1e-4)


def test_packed_numbers_keep_their_digits_whatever_their_size():
    values = np.random.default_rng(0).standard_normal((64, 32)).astype(np.float32)
    for size in (1e-20, 1.0, 1e20):
        tree = {"w": jnp.asarray(size * values), "zero": jnp.zeros(3), "one": jnp.float32(-size)}
        found = unpack(pack(tree))
        error = np.linalg.norm(found["w"] / size - values) / np.linalg.norm(values)
        assert 1e-5 < error < PACKED
        np.testing.assert_array_equal(found["zero"], 0.0)
        np.testing.assert_allclose(found["one"], -size, rtol=2.0**-11)


@pytest.mark.parametrize("every", [1, 50])
def test_snapshots_are_spread_evenly_in_the_logarithm_of_the_step(every):
    due = [step for step in range(1, 20_000) if is_snapshot_step(step, every)]
    assert all(step % every == 0 for step in due) and due[0] == every
    late = np.array([step for step in due if step > 50 * every])
    ratios = late[1:] / late[:-1]
    assert np.all(ratios > 1.2) and np.all(ratios < 1.3)


@pytest.mark.parametrize("lengths", [(0.1,), (0.1, 0.05), (0.05, 0.05)])
def test_lengths_are_two_or_more_and_ascending(lengths):
    with pytest.raises(ValueError, match=r"ema\.power = .* two or more lengths, ascending"):
        power_ema(lengths)


@pytest.mark.parametrize("length", [0.0, -1.0, 0.3, float("nan")])
def test_a_length_is_a_share_of_the_training(length):
    with pytest.raises(ValueError, match="should be above 0 and at most 0.28"):
        exponent_of(length)
