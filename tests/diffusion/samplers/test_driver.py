"""The sampling loop: what it logs, which noise a sample gets, what a step sees."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffusion_jax.diffusion.samplers import driver
from diffusion_jax.randomness import noise_like


def keys_of(count, seed=0):
    return jax.random.split(jax.random.key(seed), count)


def counting_sampler(num_steps):
    """x counts the steps, memory doubles, and the predicted x_0 is 100 + step."""

    def step(predict, x, memory, i, noise):
        return x + 1.0, memory * 2.0, jnp.full_like(x, 100.0) + i.astype(x.dtype)

    return driver.Sampler(lambda x: jnp.ones(()), step, jnp.arange(num_steps))


def noise_sampler(num_steps):
    def step(predict, x, memory, i, noise):
        x = 0.5 * x + noise
        return x, memory, x

    return driver.Sampler(lambda x: (), step, jnp.arange(num_steps), stochastic=True)


@given(num_steps=st.integers(1, 60), log_every=st.integers(1, 70))
def test_slots_log_the_first_step_and_every_kth_before_the_end(num_steps, log_every):
    slots = driver.log_slots(num_steps, log_every)
    logged = [i for i in range(num_steps) if i == 0 or (num_steps - 1 - i) % log_every == 0]
    # The last step that writes into a slot is the one that stays there.
    last_writer = {slot: i for i, slot in enumerate(slots.tolist())}
    assert last_writer == dict(enumerate(logged))


@pytest.mark.parametrize(
    ("log_every", "after"),
    [(1, [1, 2, 3, 4, 5, 6, 7]), (3, [1, 4, 7]), (4, [1, 3, 7]), (99, [1, 7])],
)
def test_logs_hold_x_after_the_step_and_its_prediction(log_every, after):
    x_T = jnp.zeros((2, 3))
    samples = driver.sample(
        counting_sampler(7), lambda x, t: x, x_T, keys_of(2), log_every=log_every
    )
    assert samples.x_log.shape == samples.x_start_log.shape == (len(after), 2, 3)
    np.testing.assert_array_equal(samples.x_log[:, 1, 2], after)
    np.testing.assert_array_equal(samples.x_start_log[:, 0, 0], np.array(after) - 1 + 100)
    np.testing.assert_array_equal(samples.x_log[-1], samples.x)


def test_no_log_unless_asked_for():
    samples = driver.sample(counting_sampler(3), lambda x, t: x, jnp.zeros((1, 1)), keys_of(1))
    assert samples.x_log is None and samples.x_start_log is None
    np.testing.assert_array_equal(samples.x, 3.0)


def test_log_every_must_be_positive():
    with pytest.raises(ValueError, match="log_every = 0 should be at least 1"):
        driver.sample(
            counting_sampler(3), lambda x, t: x, jnp.zeros((1, 1)), keys_of(1), log_every=0
        )


def test_sample_i_depends_on_key_i_only():
    keys = keys_of(8)

    def draw(rows):
        chosen = keys[rows]
        x_T = driver.initial_noise(chosen, (2, 2, 1))
        before = lambda x, i, keys: x + 0.1 * noise_like(keys, x.shape[1:])
        return driver.sample(noise_sampler(6), lambda x, t: x, x_T, chosen, before_step=before).x

    together = draw(np.arange(8))
    for row in (0, 5):
        np.testing.assert_allclose(draw(np.array([row]))[0], together[row], atol=1e-6)
    assert len(np.unique(np.asarray(together).round(4))) == 32


def test_noise_of_step_i_is_that_of_fold_in():
    keys = keys_of(3)
    x = driver.sample(noise_sampler(2), lambda x, t: x, jnp.zeros((3, 4)), keys).x
    first, second = (
        jnp.stack([jax.random.normal(jax.random.fold_in(key, i), (4,)) for key in keys])
        for i in range(2)
    )
    np.testing.assert_allclose(x, 0.5 * first + second, atol=1e-6)


def test_given_noise_takes_the_place_of_the_keys():
    noise = jax.random.normal(jax.random.key(5), (3, 2, 4))
    run = lambda sampler, x, **options: (
        driver.sample(sampler, lambda x, t: x, x, keys_of(2), **options).x
    )
    x_T = jnp.ones((2, 4))
    got = run(noise_sampler(3), x_T, step_noise=noise)
    np.testing.assert_allclose(got, 0.125 + 0.25 * noise[0] + 0.5 * noise[1] + noise[2], atol=1e-6)
    # A segment is given the rows of its own steps.
    x = run(driver.segment(noise_sampler(3), 0, 1), x_T, step_noise=noise[:1])
    x = run(driver.segment(noise_sampler(3), 1, 3), x, step_noise=noise[1:])
    np.testing.assert_allclose(x, got, atol=1e-6)
    with pytest.raises(
        ValueError, match=r"step_noise has the shape \(3, 2, 4\); it should be \(4,"
    ):
        run(noise_sampler(4), x_T, step_noise=noise)


def test_predict_sees_the_row_of_its_step():
    def step(predict, x, memory, i, noise):
        assert noise is None
        return x + predict(x, i), memory, x

    sampler = driver.Sampler(lambda x: (), step, jnp.arange(4))
    seen = driver.sample(
        sampler,
        lambda x, t, row: row["scale"] * 10.0**t * jnp.ones_like(x),
        jnp.zeros((2, 1)),
        keys_of(2),
        per_step={"scale": jnp.array([4.0, 3.0, 2.0, 1.0])},
    )
    np.testing.assert_array_equal(seen.x, 1234.0)


def test_initial_noise_is_that_of_no_step():
    keys = keys_of(400)
    noise = driver.initial_noise(keys, (50,))
    assert noise.shape == (400, 50) and noise.dtype == jnp.float32
    assert abs(float(noise.mean())) < 0.04 and abs(float(noise.std()) - 1) < 0.03
    for number in (0, 1, 999):
        step = noise_like(jax.vmap(jax.random.fold_in, (0, None))(keys, number), (50,))
        assert abs(np.corrcoef(np.ravel(noise), np.ravel(step))[0, 1]) < 0.04


def test_before_step_does_not_change_the_noise_of_the_steps():
    keys = keys_of(2)
    x_T = jnp.ones((2, 3))
    plain = driver.sample(noise_sampler(3), lambda x, t: x, x_T, keys).x
    same = driver.sample(
        noise_sampler(3), lambda x, t: x, x_T, keys, before_step=lambda x, i, keys: x
    ).x
    np.testing.assert_array_equal(plain, same)


def test_half_precision_noise_runs_in_float32():
    x_T = jnp.ones((2, 3), jnp.bfloat16)
    samples = driver.sample(noise_sampler(3), lambda x, t: x, x_T, keys_of(2), log_every=1)
    assert samples.x.dtype == samples.x_log.dtype == jnp.float32


def test_the_loop_is_one_scan_and_its_memory_is_the_logged_steps():
    """Neither steps nor log are unrolled: the buffers have 3 slots for 1000 steps."""
    program = jax.make_jaxpr(
        lambda x, keys: driver.sample(noise_sampler(1000), lambda x, t: x, x, keys, log_every=500)
    )(jnp.ones((2, 3)), keys_of(2))
    scans = [eqn for eqn in program.eqns if eqn.primitive.name == "scan"]
    assert len(scans) == 1 and len(program.eqns) < 30
    assert [v.aval.shape for v in scans[0].outvars].count((3, 2, 3)) == 2
    assert not any(v.aval.shape[:1] == (1000,) for v in scans[0].outvars)


def test_number_of_steps_is_static():
    assert noise_sampler(17).num_steps == 17


def test_a_segment_draws_the_noise_of_the_whole():
    keys, x_T = keys_of(3), jnp.ones((3, 4))
    run = lambda sampler, x: driver.sample(sampler, lambda x, t: x, x, keys).x
    whole = noise_sampler(7)
    middle = driver.segment(driver.segment(whole, 1, 7), 1, 4)
    assert (middle.num_steps, middle.first_step) == (3, 2)
    np.testing.assert_array_equal(middle.coefficients, [2, 3, 4])
    x = run(driver.segment(whole, 0, 2), x_T)
    x = run(driver.segment(whole, 5, 7), run(middle, x))
    np.testing.assert_allclose(x, run(whole, x_T), atol=1e-6)


@pytest.mark.parametrize(("first", "last"), [(-1, 2), (2, 2), (3, 1), (0, 6)])
def test_a_segment_has_steps_of_the_sampler(first, last):
    with pytest.raises(ValueError, match=rf"the steps \[{first}, {last}\) should be at least one"):
        driver.segment(noise_sampler(5), first, last)


@given(num_steps=st.integers(1, 200), strength=st.floats(0.001, 1.0))
def test_strength_keeps_the_levels_that_sgm_keeps(num_steps, strength):
    """Img2ImgDiscretizationWrapper on levels n ... 0; where it keeps 0 alone, one step is taken."""
    ascending = np.arange(num_steps + 1)
    kept = ascending[: max(int(strength * len(ascending)), 1)]
    assert driver.steps_of_strength(num_steps, strength) == max(len(kept) - 1, 1)


def test_full_strength_takes_every_step():
    assert driver.steps_of_strength(50, 1.0) == 50
    assert driver.steps_of_strength(50, 0.5) == 24
    for strength in (0.0, 1.1, float("nan")):
        with pytest.raises(ValueError, match=rf"strength = {strength} should lie in \(0, 1\]"):
            driver.steps_of_strength(50, strength)


def test_a_sampler_says_how_it_starts_and_noises():
    sampler = counting_sampler(4)._replace(
        start=lambda noise, i: noise * (10.0 + i),
        add_noise=lambda x, i, noise: x + i * noise,
    )
    part = driver.segment(sampler, 3, 4)
    x, noise = jnp.ones((1, 2)), jnp.full((1, 2), 0.5)
    np.testing.assert_array_equal(driver.start_from_noise(part, noise), 6.5)
    np.testing.assert_array_equal(driver.start_from_image(part, x, noise), 2.5)
    np.testing.assert_array_equal(driver.start_from_noise(counting_sampler(4), noise), noise)
    with pytest.raises(ValueError, match="sampler.add_noise is not set"):
        driver.start_from_image(counting_sampler(4), x, noise)


def test_inpainting_mixes_the_image_at_the_level_of_each_step():
    """Each step adds 1; where the mask is 1, x is the image plus the number of the step before."""
    add_noise = lambda x, i, noise: x + i + 0.0 * noise
    mask = jnp.array([[1.0, 0.0, 0.25]])
    before = driver.inpaint(add_noise, jnp.full((2, 3), 100.0), mask)
    x = driver.sample(
        counting_sampler(3), lambda x, t: x, jnp.zeros((2, 3)), keys_of(2), before_step=before
    ).x
    quarter = 0.0
    for i in range(3):
        quarter = 0.25 * (100 + i) + 0.75 * quarter + 1
    np.testing.assert_allclose(x, [[103.0, 3.0, quarter]] * 2, rtol=1e-6)
    with pytest.raises(ValueError, match=r"mask has the shape \(3,\); it should be \(2, 3\)"):
        driver.inpaint(add_noise, jnp.ones((2, 3)), jnp.ones(3))


@pytest.mark.parametrize("slopes", [[0.05, 0.05], [1.0, 1.0], [0.3, 1.0], [2.0, 0.4]])
def test_a_step_is_solved_back_whatever_its_slope(slopes):
    """Linear steps of data narrower and much wider than N(0, 1), for which 0.2 is expected."""
    slopes, x = jnp.array([slopes]), jnp.array([[1.0, -2.0]])
    step = lambda end: (slopes * end + 3.0, end, end + x - slopes * end - 3.0)
    end, _ = driver.step_back(step, x, jnp.float32(0.2), 30)
    np.testing.assert_allclose(slopes * end + 3.0, x, atol=1e-4)
