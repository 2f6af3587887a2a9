"""PatchGAN: a discriminator that judges overlapping patches of an image."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from diffusion_jax.models.layers.basic import torch_uniform
from diffusion_jax.models.layers.convolution import convolve
from diffusion_jax.models.layers.dtypes import Dtypes
from diffusion_jax.types import PyTree

KERNEL_SIZE = 4
MAX_MULTIPLE = 8


class BatchNorm(nn.Module):
    """Normalise over batch and positions: scale (x - mean) / sqrt(var + eps) + bias.

    x [b h w c] -> the same, in float32. With train the statistics are the batch's (var without
    Bessel's correction), and if "batch_stats" is mutable, running_mean and running_var become
    (1 - momentum) running + momentum batch, there with the corrected variance (n - 1). Otherwise
    the running ones are used. Under jit a batch that is sharded over devices is normalised as one,
    which is what SyncBatchNorm does. Parameters start at N(1, 0.02) and 0.
    Source: Ioffe & Szegedy 2015, algorithm 1; torch.nn.BatchNorm2d.
    """

    momentum: float = 0.1
    epsilon: float = 1e-5
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], *, train: bool) -> Float[Array, "b h w c"]:
        channels = x.shape[-1]
        x = x.astype(jnp.float32)
        scale = self.param("scale", _near_one, (channels,), self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, (channels,), self.param_dtype)
        running_mean = self.variable("batch_stats", "running_mean", jnp.zeros, channels)
        running_var = self.variable("batch_stats", "running_var", jnp.ones, channels)
        mean, var = running_mean.value, running_var.value
        if train:
            mean = jnp.mean(x, (0, 1, 2))
            var = jnp.mean(jnp.square(x - mean[None, None, None]), (0, 1, 2))
            if self.is_mutable_collection("batch_stats") and not self.is_initializing():
                count = x.size // channels
                corrected = var * (count / max(count - 1, 1))
                for running, new in ((running_mean, mean), (running_var, corrected)):
                    new = jax.lax.stop_gradient(new)
                    running.value = (1.0 - self.momentum) * running.value + self.momentum * new
        gain = scale.astype(jnp.float32) * jax.lax.rsqrt(var + self.epsilon)
        shift = bias.astype(jnp.float32)
        return (x - mean[None, None, None]) * gain[None, None, None] + shift[None, None, None]


class ActNorm(nn.Module):
    """Shift and scale each channel: scale (x + loc), so that the first batch has mean 0, std 1.

    x [b h w c] -> the same, in float32. `init` sets loc = -mean and scale = 1 / (std + 1e-6), std
    with Bessel's correction, from the x that it is given; later both are parameters like others.
    See `fit_actnorm` for an x that is known only after `init`.
    Source: Kingma & Dhariwal 2018, "Glow", section 3.1; taming-transformers, ActNorm.
    """

    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        x = x.astype(jnp.float32)
        positions = (0, 1, 2)

        def initial_loc(key):
            del key
            return -jnp.mean(x, positions).astype(self.param_dtype)

        def initial_scale(key):
            del key
            return (1.0 / (jnp.std(x, positions, ddof=1) + 1e-6)).astype(self.param_dtype)

        loc, scale = self.param("loc", initial_loc), self.param("scale", initial_scale)
        loc, scale = (a.astype(jnp.float32)[None, None, None] for a in (loc, scale))
        return scale * (x + loc)


class NLayerDiscriminator(Dtypes, nn.Module):
    """Judge patches: image [b h w in_channels] -> logits [b h' w' 1] in float32, large for real.

    One convolution 4 x 4 of stride 2, n_layers - 1 more with norms, then two of stride 1; widths
    ndf * min(2^i, 8). Each logit sees 70 x 70 pixels for n_layers = 3. use_actnorm: ActNorm instead
    of BatchNorm, whose running statistics are the collection "batch_stats".

    train: normalise by the batch's statistics, and update the running ones if the collection is
    mutable; for the generator's loss leave it immutable or drop the update. dtype: what the
    convolutions are computed in. Kernels start at N(0, 0.02).
    Raises ValueError for n_layers below 1, and for images too small for one logit.
    Source: Isola et al. 2017, "Image-to-Image Translation with Conditional Adversarial Networks",
    section 3.2.2; taming-transformers, NLayerDiscriminator.
    """

    ndf: int = 64
    n_layers: int = 3
    use_actnorm: bool = False

    @nn.compact
    def __call__(
        self, image: Float[Array, "b h w c"], *, train: bool = False
    ) -> Float[Array, "b h2 w2 1"]:
        self._check(image)
        h = self._conv(image, self.ndf, "main_0", stride=2)
        h = nn.leaky_relu(h, 0.2)
        for i in range(1, self.n_layers + 1):
            features = self.ndf * min(2**i, MAX_MULTIPLE)
            stride = 2 if i < self.n_layers else 1
            # BatchNorm takes the mean away again, so its convolution has no bias.
            name = f"main_{3 * i - 1}"
            h = self._conv(h, features, name, stride=stride, use_bias=self.use_actnorm)
            name = f"main_{3 * i}"
            if self.use_actnorm:
                h = ActNorm(param_dtype=self.param_dtype, name=name)(h)
            else:
                h = BatchNorm(param_dtype=self.param_dtype, name=name)(h, train=train)
            h = nn.leaky_relu(h, 0.2)
        return self._conv(h, 1, f"main_{3 * self.n_layers + 2}").astype(jnp.float32)

    @nn.nowrap
    def _conv(
        self, h: Array, features: int, name: str, *, stride: int = 1, use_bias: bool = True
    ) -> Array:
        return nn.Conv(
            features,
            (KERNEL_SIZE, KERNEL_SIZE),
            strides=stride,
            padding=[(1, 1), (1, 1)],
            use_bias=use_bias,
            kernel_init=nn.initializers.normal(0.02),
            bias_init=torch_uniform(KERNEL_SIZE**2 * h.shape[-1]),
            conv_general_dilated=convolve,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            name=name,
        )(h)

    @nn.nowrap
    def _check(self, image: Array) -> None:
        if self.n_layers < 1:
            raise ValueError(f"n_layers = {self.n_layers} should be at least 1")
        smallest = 3 * 2**self.n_layers
        if min(image.shape[1:3]) < smallest:
            raise ValueError(
                f"the image is {image.shape[1]} x {image.shape[2]} pixels; n_layers = "
                f"{self.n_layers} needs at least {smallest} each"
            )


def unfitted(params: PyTree) -> PyTree:
    """Set every ActNorm of a discriminator to the identity, loc = 0 and scale = 1."""
    fresh = {"loc": jnp.zeros_like, "scale": jnp.ones_like}
    return {
        name: {key: fresh[key](value) for key, value in own.items()} if "loc" in own else own
        for name, own in params.items()
    }


def fit_actnorm(
    discriminator: NLayerDiscriminator, params: PyTree, image: Float[Array, "b h w c"]
) -> PyTree:
    """Fit the ActNorms to a batch if all of them are the identity, which `unfitted` makes them.

    Returns all parameters; a discriminator that has seen a batch keeps the ones that it has.
    """
    norms = {name: own for name, own in params.items() if "loc" in own}
    seen = [jnp.any(own["loc"] != 0.0) | jnp.any(own["scale"] != 1.0) for own in norms.values()]

    def fit() -> PyTree:
        others = {name: own for name, own in params.items() if name not in norms}
        key = {"params": jax.random.key(0)}  # nothing is drawn: ActNorm alone is missing
        _, found = discriminator.apply({"params": others}, image, mutable=["params"], rngs=key)
        return {name: found["params"][name] for name in params}

    return jax.lax.cond(jnp.any(jnp.stack(seen)), lambda: params, fit)


def _near_one(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
    return 1.0 + 0.02 * jax.random.normal(key, shape, dtype)
