"""Whose turn it is, what each turn changes, one trajectory on any devices, exact resume."""

import inspect

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support.compilations import times_compiled

from diffusion_jax.devices.arrays import shard_batch
from diffusion_jax.devices.mesh import make_mesh, replicated
from diffusion_jax.devices.partition import fsdp
from diffusion_jax.randomness import sample_keys
from diffusion_jax.train.ema import ema, ema_params
from diffusion_jax.train.first_stage.loss import (
    AutoencoderLoss,
    Networks,
    discriminator_pass,
    reconstruct,
)
from diffusion_jax.train.first_stage.step import (
    averaged_params,
    init_autoencoder_state,
    make_autoencoder_eval_step,
    make_autoencoder_step,
)
from diffusion_jax.train.state import abstract_state, init_sharded
from diffusion_jax.train.step import jit_train_step, mean_metrics

BATCH = 8
START = 2


class Critic(nn.Module):
    @nn.compact
    def __call__(self, x, *, train):
        x = nn.Conv(8, (4, 4), strides=2, use_bias=False)(x)
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)
        return nn.Conv(1, (1, 1))(nn.leaky_relu(x, 0.2))


ENCODER, DECODER, CRITIC = nn.Conv(8, (2, 2), strides=2), nn.ConvTranspose(3, (2, 2), 2), Critic()


def regularize(params, mutable, moments, keys, *, train, step=None):
    """A Gaussian of constant width, and a running mean as codebooks have it."""
    noise = jax.vmap(lambda key: jax.random.normal(key, moments.shape[1:]))(keys)
    mutable = {"mean": 0.9 * mutable["mean"] + 0.1 * moments.mean()} if train else mutable
    return moments + 0.1 * noise, {"kl_loss": 0.5 * (moments**2).sum(axis=(1, 2, 3))}, mutable


def discriminate(params, mutable, image, *, train):
    logits, new = CRITIC.apply(
        {"params": params, "batch_stats": mutable}, image, train=train, mutable=["batch_stats"]
    )
    return logits, (new["batch_stats"] if train else mutable)


NETWORKS = Networks(
    lambda params, image, key: ENCODER.apply({"params": params["encoder"]}, image),
    regularize,
    lambda params, z, key: DECODER.apply({"params": params["decoder"]}, z),
    discriminate,
    lambda scale, x, y: scale * jnp.mean((x**3 - y**3) ** 2, axis=(1, 2, 3)),
    ("decoder", "kernel"),
)
LOSS = AutoencoderLoss(START, regularization_weights={"kl_loss": 1e-3})
TX = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-2, b1=0.5, b2=0.9), ema(0.9))
DISC_TX = optax.adam(3e-3, b1=0.5, b2=0.9)
FROZEN = {"lpips": jnp.float32(2.0)}
NAMES = {
    "loss", "loss/total", "loss/nll", "loss/rec", "loss/g", "scalars/logvar", "scalars/d_weight",
    "kl_loss", "loss/disc", "logits/real", "logits/fake",
}  # fmt: skip


@jax.jit
def init():
    image, keys = jnp.zeros((1, 8, 8, 3)), jax.random.split(jax.random.key(7), 3)
    moments = jnp.zeros((1, 4, 4, 8))
    critic = CRITIC.init(keys[2], image, train=False)
    params = {
        "autoencoder": {
            "encoder": ENCODER.init(keys[0], image)["params"],
            "decoder": DECODER.init(keys[1], moments)["params"],
        },
        "loss": {"logvar": jnp.zeros(())},
        "discriminator": critic["params"],
    }
    return init_autoencoder_state(
        params,
        TX,
        DISC_TX,
        regularizer={"mean": jnp.zeros(())},
        discriminator=critic["batch_stats"],
    )


def host_batch(step):
    image = np.random.default_rng(step).uniform(-1, 1, (BATCH, 8, 8, 3)).astype(np.float32)
    return {"image": image}


def make_step(schedule="both", **options):
    return make_autoencoder_step(NETWORKS, LOSS, TX, DISC_TX, seed=3, schedule=schedule, **options)


def run(mesh, rules=(), *, num_steps=5, schedule="both", state=None):
    """All states (on the host) and metrics of some steps, and the last state on its devices."""
    state = init_sharded(init, mesh, rules) if state is None else state
    step = jit_train_step(make_step(schedule), state)
    frozen = jax.device_put(FROZEN, replicated(mesh))
    states, metrics = [jax.device_get(state)], []
    before = times_compiled("train_step")
    for number in range(int(state.step), int(state.step) + num_steps):
        state, found = step(state, shard_batch(mesh, host_batch(number)), frozen)
        states.append(jax.device_get(state))
        metrics.append(jax.device_get(found))
    assert times_compiled("train_step") == before + 1
    return states, metrics, state


def one_device():
    return make_mesh(devices=jax.devices()[:1])


@pytest.fixture(scope="module")
def trajectories():
    return {schedule: run(one_device(), schedule=schedule) for schedule in ("both", "alternate")}


def part(state, name):
    """What belongs to one of the two networks."""
    if name == "discriminator":
        return [tree[name] for tree in (state.params, state.opt_state, state.mutable)]
    params = [state.params["autoencoder"], state.params["loss"]]
    return [*params, state.opt_state["autoencoder"], state.mutable["regularizer"]]


def changed(old, new, name):
    """Whether a network's parameters changed; all that belongs to it must agree bit for bit."""
    old, new = part(old, name), part(new, name)
    same = jax.tree.map(lambda a, b: a.tobytes() == b.tobytes(), old, new)
    if jax.tree.all(same):
        return False
    assert not any(jax.tree.leaves(same[0])), "some parameters changed, others did not"
    return True


@pytest.mark.parametrize(
    ("schedule", "autoencoder", "discriminator"),
    [("both", [1, 1, 1, 1, 1], [0, 0, 1, 1, 1]), ("alternate", [1, 1, 1, 0, 1], [0, 0, 0, 1, 0])],
)
def test_turns(trajectories, schedule, autoencoder, discriminator):
    states, metrics, _ = trajectories[schedule]
    pairs = list(zip(states, states[1:], strict=False))
    assert [changed(*pair, "autoencoder") for pair in pairs] == autoencoder
    if schedule == "both":
        assert [changed(*pair, "discriminator") for pair in pairs] == discriminator
    else:  # the generator's look moves the batch statistics, as upstream's does
        for pair, trained in zip(pairs, discriminator, strict=True):
            params, opt_state, _ = (
                jax.tree.all(jax.tree.map(np.array_equal, *both))
                for both in zip(*(part(state, "discriminator") for state in pair), strict=True)
            )
            assert (not params, not opt_state) == (trained, trained)
        assert not changed(states[0], states[START], "discriminator")
    assert [int(state.step) for state in states] == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("schedule", ["both", "alternate"])
def test_every_step_reports_everything(trajectories, schedule):
    _, metrics, _ = trajectories[schedule]
    late = ("loss/g", "scalars/d_weight", "loss/disc")
    for number, row in enumerate(metrics):
        assert set(row) == NAMES
        assert all(value.dtype == np.float32 and value.shape == () for value in row.values())
        assert row["loss"] == row["loss/total"]
        assert all((row[name] != 0) == (number >= START) for name in late)
        assert row["logits/real"] != 0 and row["logits/fake"] != 0  # upstream logs them from step 0
        assert row["loss/nll"] > 0 and row["loss/rec"] > 0 and row["kl_loss"] > 0


@pytest.mark.parametrize("schedule", ["both", "alternate"])
def test_a_discriminator_is_prepared_with_real_images_before_each_step(schedule):
    """Also before disc_start, when nothing else of it changes."""

    def prepare(params, image):
        return {**params, "seen": params["seen"] + image.mean()}

    def discriminate(params, mutable, image, *, train):
        own = {name: value for name, value in params.items() if name != "seen"}
        return NETWORKS.discriminate(own, mutable, image, train=train)

    networks = NETWORKS._replace(prepare=prepare, discriminate=discriminate)
    state = init()
    params = {**state.params["discriminator"], "seen": jnp.zeros(())}
    state = state._replace(
        params={**state.params, "discriminator": params},
        opt_state={**state.opt_state, "discriminator": DISC_TX.init(params)},
    )
    step = jax.jit(make_autoencoder_step(networks, LOSS, TX, DISC_TX, seed=3, schedule=schedule))
    batches = [host_batch(number) for number in range(START)]
    for batch in batches:
        state, _ = step(state, batch, FROZEN)
    seen = sum(batch["image"].mean() for batch in batches)
    np.testing.assert_allclose(state.params["discriminator"]["seen"], seen, rtol=1e-4)


@pytest.mark.parametrize("schedule", ["both", "alternate"])
def test_one_trajectory_on_any_mesh(trajectories, schedule):
    expected, expected_metrics, _ = trajectories[schedule]
    mesh = make_mesh(data=4, fsdp=2)
    states, metrics, last = run(mesh, [(".*", fsdp(min_size=64))], schedule=schedule)
    kernel = last.params["autoencoder"]["encoder"]["kernel"]
    assert not kernel.sharding.is_fully_replicated
    for row, other in zip(metrics, expected_metrics, strict=True):
        for name in row:
            np.testing.assert_allclose(row[name], other[name], rtol=1e-3, atol=1e-5)
    # BatchNorm has seen the same global batch on eight devices as on one.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-4),
        (states[-1].params, states[-1].mutable),
        (expected[-1].params, expected[-1].mutable),
    )


def test_resumed_state_repeats_the_run_bit_by_bit():
    mesh, rules = make_mesh(data=4, fsdp=2), [(".*", fsdp(min_size=64))]
    whole, whole_metrics, _ = run(mesh, rules, schedule="alternate", num_steps=6)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(init, mesh, rules))
    restored = jax.device_put(whole[3], shardings)
    second, metrics, _ = run(mesh, schedule="alternate", num_steps=3, state=restored)
    jax.tree.map(
        np.testing.assert_array_equal, (second[1:], metrics), (whole[4:], whole_metrics[3:])
    )


@pytest.mark.parametrize("reuse", [True, False])
def test_what_the_discriminator_sees_with_both(trajectories, reuse):
    """One step by hand: reconstructions from before the update, or new ones from after it."""
    old = jax.tree.map(jnp.asarray, trajectories["both"][0][START])
    batch = {"image": jnp.asarray(host_batch(START)["image"])}
    new, metrics = jax.jit(make_step(reuse_reconstruction=reuse))(old, batch, FROZEN)

    @jax.jit
    def by_hand(old, new_params):
        step_key = jax.random.fold_in(jax.random.key(3), START)
        keys = sample_keys(step_key, jnp.arange(BATCH))
        keys = jax.vmap(lambda key: jax.random.split(key, 2))(keys)
        mutable, image = old.mutable["regularizer"], batch["image"]
        before, _, _ = reconstruct(
            NETWORKS, old.params["autoencoder"], mutable, image, keys[:, 0], train=True
        )
        after, _, _ = reconstruct(NETWORKS, new_params, mutable, image, keys[:, 1], train=True)
        stats = discriminate(
            old.params["discriminator"], old.mutable["discriminator"], before, train=True
        )[1]
        loss = lambda params: discriminator_pass(
            NETWORKS, LOSS, params, stats, image, before if reuse else after, train=True
        )
        (_, (metrics, stats)), gradients = jax.value_and_grad(loss, has_aux=True)(
            old.params["discriminator"]
        )
        updates, _ = DISC_TX.update(
            gradients, old.opt_state["discriminator"], old.params["discriminator"]
        )
        return optax.apply_updates(old.params["discriminator"], updates), stats, metrics

    params, stats, expected = by_hand(old, new.params["autoencoder"])
    for name in expected:
        np.testing.assert_allclose(metrics[name], expected[name], rtol=1e-4, atol=1e-6)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
        (new.params["discriminator"], new.mutable["discriminator"]),
        (params, stats),
    )


def test_the_average_follows_the_autoencoder_only(trajectories):
    states, _, _ = trajectories["both"]
    averaged = averaged_params(states[-1])
    assert set(ema_params(states[-1].opt_state)) == {"autoencoder", "loss"}
    assert averaged["discriminator"] is states[-1].params["discriminator"]
    shadow = states[0].params["autoencoder"]["decoder"]["kernel"]
    for n, state in enumerate(states[1:], start=1):
        new = state.params["autoencoder"]["decoder"]["kernel"]
        shadow = shadow + (1 - min(0.9, (1 + n) / (10 + n))) * (new - shadow)
    np.testing.assert_allclose(averaged["autoencoder"]["decoder"]["kernel"], shadow, atol=1e-6)


def test_evaluation_of_a_padded_set_equals_that_of_its_samples(trajectories):
    state = jax.tree.map(jnp.asarray, trajectories["both"][0][-1])
    step = jax.jit(make_autoencoder_eval_step(NETWORKS, LOSS, seed=0))
    before = times_compiled("eval_step")
    image, frozen = jnp.asarray(host_batch(0)["image"]), FROZEN
    valid = jnp.arange(BATCH) < 3
    batches = [
        {"image": image, "weight": jnp.ones(BATCH)},
        {
            "image": jnp.where(valid[:, None, None, None], image, 1.0),
            "weight": valid.astype(jnp.float32),
        },
    ]
    args = (averaged_params(state), state.mutable, frozen)
    found = [step(*args, batch, number) for number, batch in enumerate(batches)]
    assert [float(row["weight"]) for row in found] == [BATCH, 3]
    single = [
        step(*args, batch | {"weight": one}, number)
        for number, (batch, count) in enumerate(zip(batches, (BATCH, 3), strict=True))
        for one in jnp.eye(BATCH)[:count]
    ]
    means = mean_metrics(found)
    assert set(means) == NAMES
    for name in means:
        expected = np.mean([float(row[name]) for row in single])
        np.testing.assert_allclose(means[name], expected, rtol=1e-5, atol=1e-6)
    assert means["scalars/d_weight"] == 1.0
    jax.tree.map(np.testing.assert_array_equal, step(*args, batches[0], 0), found[0])
    assert float(step(*args, batches[0], 1)["loss/rec"]) != float(found[0]["loss/rec"])
    assert times_compiled("eval_step") == before + 1


def test_bad_input():
    with pytest.raises(ValueError, match="schedule = 'turns' is unknown; choose from both, alt"):
        # Without the check of its annotation, which comes first in tests.
        inspect.unwrap(make_autoencoder_step)(NETWORKS, LOSS, TX, DISC_TX, seed=0, schedule="turns")
    with pytest.raises(ValueError, match="disc_factor = -1.0 should be at least 0"):
        make_autoencoder_step(NETWORKS, LOSS._replace(disc_factor=-1.0), TX, DISC_TX, seed=0)
    with pytest.raises(ValueError, match="disc_start = -1"):
        make_autoencoder_eval_step(NETWORKS, LOSS._replace(disc_start=-1), seed=0)
    with pytest.raises(ValueError, match=r"params has \['autoencoder'\] and should have"):
        init_autoencoder_state({"autoencoder": {}}, TX, DISC_TX)
