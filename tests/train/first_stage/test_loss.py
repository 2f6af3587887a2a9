"""The adaptive weight and the gradients in pieces against jax.grad of the whole; closed forms."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.train.first_stage import gan_loss
from diffusion_jax.train.first_stage import loss as autoencoder_loss
from diffusion_jax.train.first_stage.loss import (
    AutoencoderLoss,
    Networks,
    check_loss,
    discriminator_pass,
    generator_pass,
)

BATCH = 4
LAST_LAYER = ("decoder", "conv_out", "kernel")


class Autoencoder(nn.Module):
    """8 x 8 x 3 -> 4 x 4 moments of 2 -> 8 x 8 x 3."""

    dtype: type = jnp.float32

    def setup(self):
        self.encoder = nn.Conv(4, (3, 3), strides=2, dtype=self.dtype)
        self.decoder = Decoder(self.dtype)

    def encode(self, image):
        return self.encoder(image)

    def decode(self, z):
        return self.decoder(z)

    def __call__(self, image):
        return self.decode(self.encode(image)[..., :2])


class Decoder(nn.Module):
    dtype: type = jnp.float32

    @nn.compact
    def __call__(self, z):
        h = nn.silu(nn.Conv(8, (3, 3), name="conv_in", dtype=self.dtype)(z))
        h = h.repeat(2, axis=1).repeat(2, axis=2)
        return jnp.tanh(nn.Conv(3, (3, 3), name="conv_out", dtype=self.dtype)(h))


class Discriminator(nn.Module):
    @nn.compact
    def __call__(self, x, *, train):
        x = nn.Conv(6, (4, 4), strides=2, use_bias=False)(x)
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)
        return nn.Conv(1, (4, 4))(nn.leaky_relu(x, 0.2))


CRITIC = Discriminator()


def regularize(params, mutable, moments, keys, *, train, step=None):
    mean, logvar = jnp.split(moments.astype(jnp.float32), 2, axis=-1)
    noise = jax.vmap(lambda key: jax.random.normal(key, mean.shape[1:]))(keys)
    kl = 0.5 * jnp.sum(mean**2 + jnp.exp(logvar) - 1 - logvar, axis=(1, 2, 3))
    mutable = {"count": mutable["count"] + 1} if train else mutable
    return mean + jnp.exp(0.5 * logvar) * noise, {"kl_loss": kl, "other": kl}, mutable


def discriminate(params, mutable, image, *, train):
    logits, new = CRITIC.apply(
        {"params": params, **mutable}, image, train=train, mutable=list(mutable)
    )
    return logits, (new if train else mutable)


def lpips(kernel, x, y):
    return jnp.mean((jnp.tanh(x @ kernel) - jnp.tanh(y @ kernel)) ** 2, axis=(1, 2, 3))


def make_networks(dtype=jnp.float32):
    model = Autoencoder(dtype)
    return Networks(
        lambda params, image, key: model.apply({"params": params}, image, method="encode"),
        regularize,
        lambda params, z, key: model.apply({"params": params}, z, method="decode"),
        discriminate,
        lpips,
        LAST_LAYER,
    )


NETWORKS = make_networks()
FROZEN = {
    "lpips": jnp.asarray(np.random.default_rng(1).normal(size=(3, 5)), jnp.float32),
    "logvar": jnp.float32(0.3),
}
LOSS = AutoencoderLoss(
    0,
    disc_factor=0.7,
    disc_weight=0.5,
    perceptual_weight=0.8,
    regularization_weights={"kl_loss": 0.01},
)


@pytest.fixture(scope="module")
def example():
    """params, mutable, batch and keys; weights are random and not zero."""
    image = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (BATCH, 8, 8, 3)), jnp.float32)
    disc = CRITIC.init(jax.random.key(1), image, train=False)
    params = {
        "autoencoder": Autoencoder().init(jax.random.key(0), image)["params"],
        "loss": {"logvar": jnp.float32(0.2)},
        "discriminator": disc["params"],
    }
    mutable = {
        "regularizer": {"count": jnp.zeros((), jnp.int32)},
        "discriminator": {"batch_stats": disc["batch_stats"]},
    }
    return params, mutable, {"image": image}, jax.random.split(jax.random.key(2), BATCH)


def run(
    loss, params, mutable, batch, keys, *, networks=NETWORKS, active=True, train=True, step=None
):
    """One compiled pass -> metrics, gradients, mutable, reconstruction."""

    @jax.jit
    def whole(params, mutable, frozen, batch, keys, active, step):
        options = {"active": active, "train": train, "step": step}
        seen = generator_pass(networks, loss, params, mutable, frozen, batch, keys, **options)
        return seen.metrics, seen.gradients(), seen.mutable, seen.reconstruction

    return whole(params, mutable, FROZEN, batch, jax.random.clone(keys), active, step)


def plain_terms(loss, trained, disc, mutable, batch, keys):
    """Restate nll, weighted nll, g and the regularization of a loss, each as one expression."""
    keys = jax.vmap(lambda key: jax.random.split(key, 3))(jax.random.clone(keys))[:, 0]
    x, autoencoder = batch["image"], trained["autoencoder"]
    moments = NETWORKS.encode(autoencoder, x, None)
    z, log, _ = regularize(autoencoder, mutable["regularizer"], moments, keys, train=True)
    y = NETWORKS.decode(autoencoder, z, None)
    d = jnp.abs(x - y) if loss.pixel_loss == "l1" else (x - y) ** 2
    rec = d + loss.perceptual_weight * lpips(FROZEN["lpips"], x, y)[:, None, None, None]
    logvar = trained["loss"]["logvar"] if trained["loss"] else FROZEN["logvar"]
    nll = rec / jnp.exp(logvar) + logvar
    w = batch["weight"] if "weight" in batch else jnp.ones(BATCH)
    w = (w / w.sum())[:, None, None, None] * (1 if loss.reduction == "sum" else 1 / (8 * 8 * 3))
    weighted = nll * (batch["nll_weight"] if "nll_weight" in batch else 1.0)
    logits, _ = discriminate(disc, mutable["discriminator"], y, train=True)
    per_sample = logits.mean(axis=(1, 2, 3))
    g = -jnp.sum(w.reshape(-1) / w.sum() * per_sample)
    reg = 0.01 * jnp.sum(w.reshape(-1) / w.sum() * log["kl_loss"])
    return {"nll": jnp.sum(w * nll), "weighted": jnp.sum(w * weighted), "g": g, "reg": reg}


CASES = {
    "kl": (LOSS, ()),
    "vq": (LOSS._replace(reduction="mean", pixel_loss="l2"), ("logvar",)),
    "weights": (LOSS, ("weight", "nll_weight")),
}


@pytest.mark.parametrize("case", CASES)
def test_weight_and_gradient_equal_those_of_the_whole_decoder(example, case):
    (loss, changes), (params, mutable, batch, keys) = CASES[case], example
    if "logvar" in changes:
        params = params | {"loss": {}}
    if "weight" in changes:
        random = np.random.default_rng(3)
        nll_weight = jnp.asarray(random.uniform(size=(BATCH, 8, 8, 1)), jnp.float32)
        batch = batch | {"weight": jnp.arange(4.0), "nll_weight": nll_weight}
    metrics, gradients, _, _ = run(loss, params, mutable, batch, keys)
    trained = {name: params[name] for name in ("autoencoder", "loss")}

    @jax.jit
    def expected(trained):
        terms = lambda p: plain_terms(loss, p, params["discriminator"], mutable, batch, keys)
        kernel_norm = lambda name: jnp.linalg.norm(
            gan_loss.leaf_at(
                jax.grad(lambda p: terms(p)[name])(trained)["autoencoder"], LAST_LAYER
            ).reshape(-1)
        )
        weight = 0.5 * kernel_norm("nll") / (kernel_norm("g") + 1e-4)

        def total(p):
            found = terms(p)
            return (
                found["weighted"]
                + jax.lax.stop_gradient(weight) * 0.7 * found["g"]
                + (found["reg"])
            )

        return terms(trained), weight, total(trained), jax.grad(total)(trained)

    terms, weight, total, whole = expected(trained)
    assert 0 < float(weight) < 0.5e4
    np.testing.assert_allclose(metrics["scalars/d_weight"], weight, rtol=1e-4)
    np.testing.assert_allclose(metrics["loss/nll"], terms["nll"], rtol=1e-5)
    np.testing.assert_allclose(metrics["loss/g"], terms["g"], rtol=1e-4)
    np.testing.assert_allclose(metrics["loss/total"], total, rtol=1e-5)
    size = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(whole))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-6 * size),
        gradients,
        whole,
    )
    assert ("logvar" in gradients["loss"]) == ("logvar" in params["loss"])


def test_the_adaptive_weight_costs_two_gradients_of_the_last_layer(example, monkeypatch):
    params, mutable, batch, keys = example

    def convolutions():
        def gradients(params, keys):
            seen = generator_pass(
                NETWORKS, LOSS, params, mutable, FROZEN, batch, keys, active=True, train=True
            )
            return seen.gradients(), seen.metrics

        text = jax.jit(gradients).lower(params, jax.random.clone(keys)).compile().as_text()
        return text.count(" convolution(") + text.count("$conv")

    adaptive = convolutions()
    monkeypatch.setattr(autoencoder_loss, "adaptive_weight", lambda nll, g: jnp.float32(2.0))
    # Backward through this decoder takes four, through encoder and decoder five.
    assert 0 < adaptive - convolutions() <= 2


def test_metrics_and_mutable(example):
    params, mutable, batch, keys = example
    metrics, _, after, out = run(LOSS, params, mutable, batch, keys)
    assert set(metrics) == {
        "loss/total", "loss/nll", "loss/rec", "loss/g", "scalars/logvar", "scalars/d_weight",
        "kl_loss", "other",
    }  # fmt: skip
    assert all(value.dtype == jnp.float32 and value.shape == () for value in metrics.values())
    distance = 0.8 * lpips(FROZEN["lpips"], batch["image"], out).mean()
    rec = jnp.abs(batch["image"] - out).mean() + distance
    np.testing.assert_allclose(metrics["loss/rec"], rec, rtol=1e-5)
    nll = 8 * 8 * 3 * (rec / np.exp(0.2) + 0.2)
    np.testing.assert_allclose(metrics["loss/nll"], nll, rtol=1e-5)
    assert int(after["regularizer"]["count"]) == 1
    mean = "batch_stats", "BatchNorm_0", "mean"
    moved = gan_loss.leaf_at(after["discriminator"], mean)
    assert float(jnp.abs(moved - gan_loss.leaf_at(mutable["discriminator"], mean)).max()) > 1e-3


def test_before_its_start_the_discriminator_is_not_run(example):
    params, mutable, batch, keys = example
    calls = []

    def counted(*args, train):
        jax.debug.callback(lambda: calls.append(1))
        return discriminate(*args, train=train)

    networks = NETWORKS._replace(discriminate=counted)
    metrics, gradients, after, _ = run(
        LOSS, params, mutable, batch, keys, networks=networks, active=False
    )
    jax.effects_barrier()
    assert not calls
    assert float(metrics["scalars/d_weight"]) == float(metrics["loss/g"]) == 0
    jax.tree.map(np.testing.assert_array_equal, after["discriminator"], mutable["discriminator"])
    np.testing.assert_allclose(
        metrics["loss/total"], metrics["loss/nll"] + 0.01 * metrics["kl_loss"], rtol=1e-6
    )
    _, with_it, _, _ = run(LOSS, params, mutable, batch, keys, networks=networks)
    jax.effects_barrier()
    assert calls
    kernels = [gan_loss.leaf_at(g["autoencoder"], LAST_LAYER) for g in (gradients, with_it)]
    assert float(jnp.abs(kernels[0] - kernels[1]).max()) > 1e-3


def test_evaluation_counts_the_adversary_once_and_ignores_padding(example):
    params, mutable, batch, keys = example
    metrics, _, after, out = run(LOSS, params, mutable, batch, keys, train=False)
    assert float(metrics["scalars/d_weight"]) == 1.0
    total = metrics["loss/nll"] + 0.7 * metrics["loss/g"] + 0.01 * metrics["kl_loss"]
    np.testing.assert_allclose(metrics["loss/total"], total, rtol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, after, mutable)

    weight = jnp.asarray([1.0, 1.0, 0.0, 0.0])
    image = jnp.where(weight[:, None, None, None] > 0, batch["image"], 0.9)
    padded, _, _, _ = run(
        LOSS, params, mutable, {"image": image, "weight": weight}, keys, train=False
    )
    first_two = {"image": batch["image"][:2]}
    short, _, _, _ = run(LOSS, params, mutable, first_two, keys[:2], train=False)
    for name in short:
        np.testing.assert_allclose(padded[name], short[name], rtol=2e-5, atol=1e-6)

    adversary = (params["discriminator"], mutable["discriminator"])
    losses = [
        discriminator_pass(NETWORKS, LOSS, *adversary, images, out[:n], w, train=False)[1][0]
        for images, n, w in [(image, 4, weight), (first_two["image"], 2, None)]
    ]
    for name in ("loss/disc", "logits/real", "logits/fake"):
        np.testing.assert_allclose(losses[0][name], losses[1][name], rtol=1e-5)


def test_bfloat16_networks_have_float32_losses(example):
    params, mutable, batch, keys = example
    expected, _, _, _ = run(LOSS, params, mutable, batch, keys)
    networks = make_networks(jnp.bfloat16)
    metrics, gradients, _, out = run(LOSS, params, mutable, batch, keys, networks=networks)
    assert out.dtype == jnp.bfloat16
    assert all(value.dtype == jnp.float32 for value in metrics.values())
    for name in metrics:
        np.testing.assert_allclose(metrics[name], expected[name], rtol=3e-2, atol=1e-2)
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(gradients))


def test_the_discriminator_sees_reals_then_fakes(example):
    params, mutable, batch, _ = example
    fake = -batch["image"]
    stats, disc = mutable["discriminator"], params["discriminator"]

    def loss_of(disc, fake):
        return discriminator_pass(NETWORKS, LOSS, disc, stats, batch["image"], fake, train=True)

    (value, (metrics, after)), (d_disc, d_fake) = jax.value_and_grad(
        loss_of, argnums=(0, 1), has_aux=True
    )(disc, fake)
    real_logits, between = discriminate(disc, stats, batch["image"], train=True)
    fake_logits, end = discriminate(disc, between, fake, train=True)
    expected = 0.7 * gan_loss.discriminator_loss(real_logits, fake_logits)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    np.testing.assert_allclose(metrics["logits/real"], real_logits.mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["logits/fake"], fake_logits.mean(), rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), after, end)
    assert float(jnp.abs(d_fake).max()) == 0
    assert float(jnp.abs(d_disc["Conv_0"]["kernel"]).max()) > 0


def test_discriminator_losses_in_closed_form():
    real = jnp.asarray([[2.0, 0.0], [-1.0, 3.0], [50.0, 50.0]])
    fake = jnp.asarray([[-2.0, 1.0], [0.0, -3.0], [70.0, -70.0]])
    weight = jnp.asarray([1.0, 3.0, 0.0])
    # sample means of max(0, 1 - real): 0.5, 1; of max(0, 1 + fake): 1, 0.5
    np.testing.assert_allclose(gan_loss.discriminator_loss(real[:2], fake[:2]), 0.75)
    value = gan_loss.discriminator_loss(real, fake, weight)
    np.testing.assert_allclose(value, 0.5 * (0.5 + 3 * 1.0 + 1.0 + 3 * 0.5) / 4)
    softplus = lambda x: np.log1p(np.exp(x))
    vanilla = 0.5 * (softplus(-np.asarray(real[:2])).mean() + softplus(fake[:2]).mean())
    value = gan_loss.discriminator_loss(real[:2], fake[:2], disc_loss="vanilla")
    np.testing.assert_allclose(value, vanilla, rtol=1e-6)
    np.testing.assert_allclose(gan_loss.generator_loss(fake, weight), -(-0.5 - 4.5) / 4)


def test_adaptive_weight_in_closed_form():
    nll, g = jnp.asarray([[3.0, 4.0]]), jnp.asarray([[0.0, 0.5]])
    np.testing.assert_allclose(gan_loss.adaptive_weight(nll, g), 5 / 0.5001, rtol=1e-6)
    assert float(gan_loss.adaptive_weight(1e6 * nll, g)) == 1e4
    np.testing.assert_allclose(gan_loss.adaptive_weight(nll * 0.1, 0 * g), 0.5e4, rtol=1e-6)
    assert float(jax.grad(lambda s: gan_loss.adaptive_weight(s * nll, g))(1.0)) == 0
    # Rounded to bfloat16 on the way, sqrt(3) would be 1.734.
    three = jnp.ones((3,), jnp.bfloat16)
    value = gan_loss.adaptive_weight(three, g.reshape(-1))
    np.testing.assert_allclose(value, np.sqrt(3) / 0.5001, rtol=1e-5)


def test_without_perceptual_weight_lpips_is_not_needed(example):
    params, mutable, batch, keys = example

    def fails(*args):
        raise AssertionError("lpips was called")

    loss = LOSS._replace(perceptual_weight=0.0)
    metrics, _, _, out = run(
        loss, params, mutable, batch, keys, networks=NETWORKS._replace(lpips=fails)
    )
    np.testing.assert_allclose(metrics["loss/rec"], jnp.abs(batch["image"] - out).mean(), rtol=1e-5)


@pytest.mark.parametrize(("step", "same_as"), [(4, 0.0), (5, 0.8), (None, 0.8)])
def test_lpips_begins_at_its_step_and_evaluation_always_has_it(example, step, same_as):
    late = LOSS._replace(perceptual_start=5)
    found = run(late, *example, step=None if step is None else jnp.int32(step))
    wanted = run(LOSS._replace(perceptual_weight=same_as), *example)
    for value, own in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(value, own, rtol=1e-5, atol=1e-7)
    assert abs(wanted[0]["loss/rec"] - run(LOSS, *example)[0]["loss/rec"]) > 1e-3 or same_as


def test_bad_input(example):
    params, mutable, batch, keys = example
    for change, message in [
        ({"disc_loss": "wgan"}, "disc_loss = 'wgan' is unknown; choose from hinge, vanilla"),
        ({"pixel_loss": "l3"}, "pixel_loss = 'l3' is unknown"),
        ({"reduction": "max"}, "reduction = 'max' is unknown"),
        ({"disc_start": -1}, "disc_start = -1 should be at least 0"),
        ({"perceptual_start": -1}, "perceptual_start = -1 should be at least 0"),
        ({"disc_weight": -0.5}, "disc_weight = -0.5 should be at least 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            check_loss(LOSS._replace(**change))
    with pytest.raises(ValueError, match="the regularizer logs kl_loss, other"):
        run(LOSS._replace(regularization_weights={"kl": 1.0}), params, mutable, batch, keys)
    networks = NETWORKS._replace(last_layer=("decoder", "conv_end", "kernel"))
    with pytest.raises(ValueError, match="after decoder comes conv_in, conv_out"):
        run(LOSS, params, mutable, batch, keys, networks=networks)
