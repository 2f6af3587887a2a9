"""The loss of first stages, its gradients and whole steps against PyTorch's autograd and Adam.

The PyTorch side states the formulas of latent-diffusion and generative-models with torch.autograd,
on a small autoencoder, a PatchGAN without norms, and a fixed perceptual distance.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from diffusion_jax.train.first_stage.loss import (
    AutoencoderLoss,
    Networks,
    discriminator_pass,
    generator_pass,
)
from diffusion_jax.train.first_stage.step import init_autoencoder_state, make_autoencoder_step

pytestmark = pytest.mark.parity

BATCH, LOGVAR, KL_WEIGHT, LEARNING_RATE = 3, 0.4, 0.02, 1e-3
# name: kernel in torch's layout (out, in, h, w)
SHAPES = {
    "encoder": (4, 3, 3, 3),
    "conv_in": (8, 2, 3, 3),
    "conv_out": (3, 8, 3, 3),
    "disc_in": (6, 3, 4, 4),
    "disc_out": (1, 6, 4, 4),
}
CRITIC = ("disc_in", "disc_out")
LAYERS = {"encoder": (2, 1), "conv_in": (1, 1), "conv_out": (1, 1), "disc_in": (2, 1)}
LAYERS["disc_out"] = (1, 1)  # stride and padding
PERCEPT = np.random.default_rng(9).normal(size=(3, 5)).astype(np.float32)


def start():
    random = np.random.default_rng(0)
    weights = {}
    for name, shape in SHAPES.items():
        scale = 1.5 / np.sqrt(np.prod(shape[1:]))
        weights[name] = {
            "kernel": (scale * random.normal(size=shape)).astype(np.float32),
            "bias": (0.1 * random.normal(size=shape[0])).astype(np.float32),
        }
    return weights


def images(seed):
    return np.random.default_rng(seed).uniform(-1, 1, (BATCH, 8, 8, 3)).astype(np.float32)


# -- ours ------------------------------------------------------------------------------------------


def conv(params, name, x):
    stride, padding = LAYERS[name]
    out = jax.lax.conv_general_dilated(
        x,
        params[name]["kernel"],
        (stride, stride),
        ((padding, padding),) * 2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    return out + params[name]["bias"][None, None, None]


def decode(params, z, key):
    h = jax.nn.silu(conv(params, "conv_in", z))
    return conv(params, "conv_out", h.repeat(2, axis=1).repeat(2, axis=2))


def regularize(params, mutable, moments, keys, *, train, step=None):
    mean, logvar = jnp.split(moments, 2, axis=-1)
    kl = 0.5 * jnp.sum(mean**2 + jnp.exp(logvar) - 1.0 - logvar, axis=(1, 2, 3))
    return mean, {"kl_loss": kl}, mutable


def discriminate(params, mutable, image, *, train):
    h = jax.nn.leaky_relu(conv(params, "disc_in", image), 0.2)
    return conv(params, "disc_out", h), mutable


NETWORKS = Networks(
    lambda params, image, key: conv(params, "encoder", image),
    regularize,
    decode,
    discriminate,
    lambda percept, x, y: jnp.mean((jnp.tanh(x @ percept) - jnp.tanh(y @ percept)) ** 2, (1, 2, 3)),
    ("conv_out", "kernel"),
)
FROZEN = {"lpips": jnp.asarray(PERCEPT)}


def our_params():
    ours = {
        name: {
            "kernel": jnp.asarray(layer["kernel"].transpose(2, 3, 1, 0)),
            "bias": jnp.asarray(layer["bias"]),
        }
        for name, layer in start().items()
    }
    return {
        "autoencoder": {name: ours[name] for name in ours if name not in CRITIC},
        "discriminator": {name: ours[name] for name in CRITIC},
        "loss": {"logvar": jnp.float32(LOGVAR)},
    }


# -- theirs ----------------------------------------------------------------------------------------


class Torch:
    """The same networks and losses in torch, on parameters [name][kernel or bias]."""

    def __init__(self, loss):
        self.torch = pytest.importorskip("torch")
        self.loss = loss
        self.weights = {
            name: {k: self.torch.tensor(v, requires_grad=True) for k, v in layer.items()}
            for name, layer in start().items()
        }
        self.logvar = self.torch.tensor(LOGVAR, requires_grad=True)

    def conv(self, name, x):
        stride, padding = LAYERS[name]
        layer = self.weights[name]
        return self.torch.nn.functional.conv2d(
            x, layer["kernel"], layer["bias"], stride=stride, padding=padding
        )

    def autoencode(self, x):
        mean, logvar = self.conv("encoder", x).chunk(2, dim=1)
        h = self.torch.nn.functional.silu(self.conv("conv_in", mean))
        h = self.torch.nn.functional.interpolate(h, scale_factor=2.0, mode="nearest")
        kl = 0.5 * (mean**2 + logvar.exp() - 1.0 - logvar).sum(dim=[1, 2, 3])
        return self.conv("conv_out", h), kl.sum() / len(kl)

    def critic(self, x):
        h = self.torch.nn.functional.leaky_relu(self.conv("disc_in", x), 0.2)
        return self.conv("disc_out", h)

    def distance(self, x, y):
        seen = [self.torch.einsum("bchw,cd->bdhw", a, self.torch.tensor(PERCEPT)) for a in (x, y)]
        difference = (seen[0].tanh() - seen[1].tanh()) ** 2
        return difference.mean(dim=[1, 2, 3], keepdim=True)

    def generator(self, x, weights=None, active=True):
        """Total and the logged terms, with autograd through the last layer twice."""
        out, kl = self.autoencode(x)
        rec = (x - out).abs() if self.loss.pixel_loss == "l1" else (x - out) ** 2
        rec = rec + self.loss.perceptual_weight * self.distance(x, out)
        nll = rec / self.logvar.exp() + self.logvar
        weighted = nll if weights is None else weights * nll
        if self.loss.reduction == "sum":
            nll, weighted = nll.sum() / len(x), weighted.sum() / len(x)
        else:
            nll, weighted = nll.mean(), weighted.mean()
        d_weight = g = self.torch.tensor(0.0)
        if active:
            g, last = -self.critic(out).mean(), self.weights["conv_out"]["kernel"]
            (nll_grad,) = self.torch.autograd.grad(nll, last, retain_graph=True)
            (g_grad,) = self.torch.autograd.grad(g, last, retain_graph=True)
            d_weight = (nll_grad.norm() / (g_grad.norm() + 1e-4)).clamp(0.0, 1e4).detach()
            d_weight = d_weight * self.loss.disc_weight
        total = weighted + d_weight * self.loss.disc_factor * g + KL_WEIGHT * kl
        return total, {
            "loss/total": total, "loss/nll": nll, "loss/rec": rec.mean(), "loss/g": g,
            "scalars/d_weight": d_weight, "scalars/logvar": self.logvar.clone(), "kl_loss": kl,
        }  # fmt: skip

    def discriminator(self, x, out=None):
        out = self.autoencode(x)[0] if out is None else out
        real, fake = self.critic(x), self.critic(out.detach())
        relu, softplus = self.torch.nn.functional.relu, self.torch.nn.functional.softplus
        if self.loss.disc_loss == "hinge":
            value = 0.5 * (relu(1.0 - real).mean() + relu(1.0 + fake).mean())
        else:
            value = 0.5 * (softplus(-real).mean() + softplus(fake).mean())
        value = self.loss.disc_factor * value
        metrics = {"loss/disc": value, "logits/real": real.mean(), "logits/fake": fake.mean()}
        return value, metrics

    def image(self, x):
        return self.torch.tensor(x.transpose(0, 3, 1, 2))

    def parameters(self, critic):
        layers = [w for name, w in self.weights.items() if (name in CRITIC) == critic]
        found = [tensor for layer in layers for tensor in layer.values()]
        return found if critic else [*found, self.logvar]

    def gradients(self, value, critic):
        for tensor in self.parameters(critic):
            tensor.grad = None
        value.backward()
        return self.compared(lambda tensor: tensor.grad, critic)

    def compared(self, read, critic):
        """A tree of ours with what `read` finds in each tensor."""
        found = {
            name: {
                "kernel": read(w["kernel"]).detach().numpy().transpose(2, 3, 1, 0),
                "bias": read(w["bias"]).detach().numpy(),
            }
            for name, w in self.weights.items()
            if (name in CRITIC) == critic
        }
        if critic:
            return found
        return {"autoencoder": found, "loss": {"logvar": read(self.logvar).detach().numpy()}}


def same(ours, theirs, tolerance=2e-5):
    """Agree within a fraction of the largest number of each leaf, which is not 0."""

    def leaf(a, b):
        assert np.abs(b).max() > 0
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.abs(b).max())

    jax.tree.map(leaf, ours, theirs)


OPTIONS = {
    "kl": {},
    "vanilla": {"disc_loss": "vanilla", "disc_factor": 0.6, "disc_weight": 0.3},
    "vq": {"reduction": "mean", "pixel_loss": "l2"},
    "weights": {"perceptual_weight": 0.25},
}


def loss_options(case, disc_start=0):
    weights = {"kl_loss": KL_WEIGHT}
    return AutoencoderLoss(disc_start, regularization_weights=weights, **OPTIONS[case])


@pytest.mark.parametrize("case", OPTIONS)
def test_losses_and_gradients(case):
    loss, x = loss_options(case), images(0)
    theirs, params = Torch(loss), our_params()
    weights = None
    batch = {"image": jnp.asarray(x)}
    if case == "weights":
        weights = np.random.default_rng(5).uniform(0.5, 2.0, (BATCH, 8, 8, 1)).astype(np.float32)
        batch["nll_weight"], weights = jnp.asarray(weights), theirs.image(weights)
    total, terms = theirs.generator(theirs.image(x), weights)
    expected = theirs.gradients(total, critic=False)

    @jax.jit
    def ours(params, batch, keys):
        mutable = {"regularizer": {}, "discriminator": {}}
        seen = generator_pass(
            NETWORKS, loss, params, mutable, FROZEN, batch, keys, active=True, train=True
        )
        disc = jax.value_and_grad(
            lambda p: discriminator_pass(
                NETWORKS, loss, p, {}, batch["image"], seen.reconstruction, train=True
            ),
            has_aux=True,
        )(params["discriminator"])
        return seen.metrics, seen.gradients(), disc

    keys = jax.random.split(jax.random.key(0), BATCH)
    metrics, gradients, ((_, (disc_metrics, _)), disc_gradients) = ours(params, batch, keys)
    assert set(metrics) == set(terms)
    for name, value in terms.items():
        np.testing.assert_allclose(metrics[name], value.detach().numpy(), rtol=2e-5)
    same(gradients, expected)
    value, terms = theirs.discriminator(theirs.image(x))
    same(disc_gradients, theirs.gradients(value, critic=True))
    for name, value in terms.items():
        np.testing.assert_allclose(disc_metrics[name], value.detach().numpy(), rtol=2e-5)


@pytest.mark.parametrize("schedule", ["alternate", "both"])
def test_steps(schedule):
    """Six batches with the discriminator from the third on; Adam with betas 0.5 and 0.9."""
    loss = loss_options("kl", disc_start=2)
    theirs, betas = Torch(loss), {"b1": 0.5, "b2": 0.9}
    adam = {
        critic: theirs.torch.optim.Adam(
            theirs.parameters(critic), lr=LEARNING_RATE * (2 if critic else 1), betas=(0.5, 0.9)
        )
        for critic in (False, True)
    }
    tx, disc_tx = optax.adam(LEARNING_RATE, **betas), optax.adam(2 * LEARNING_RATE, **betas)
    state = init_autoencoder_state(our_params(), tx, disc_tx)
    step = jax.jit(
        make_autoencoder_step(
            NETWORKS, loss, tx, disc_tx, seed=0, schedule=schedule, reuse_reconstruction=False
        )
    )
    for number in range(6):
        x = images(number)
        active = number >= 2
        turns = {
            "both": (True, active),
            "alternate": (not active or number % 2 == 0, number in (3, 5)),
        }
        logged = {}
        for critic, turn in zip((False, True), turns[schedule], strict=True):
            if turn:  # the discriminator sees the autoencoder as the first turn left it
                image = theirs.image(x)
                value, terms = (
                    theirs.discriminator(image)
                    if critic
                    else theirs.generator(image, active=active)
                )
                logged |= terms
                theirs.gradients(value, critic)
                adam[critic].step()
        state, metrics = step(state, {"image": jnp.asarray(x)}, FROZEN)
        for name, value in logged.items():
            np.testing.assert_allclose(metrics[name], value.detach().numpy(), rtol=1e-4)
        # in units of the learning rate: where a gradient is near 0, Adam magnifies rounding
        for critic, found in (
            (False, {name: state.params[name] for name in ("autoencoder", "loss")}),
            (True, state.params["discriminator"]),
        ):
            jax.tree.map(
                lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=0.002 * LEARNING_RATE),
                found,
                theirs.compared(lambda tensor: tensor, critic),
            )
