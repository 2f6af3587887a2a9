"""Codebooks between encoder and decoder: nearest code, nearest code with averages, Gumbel softmax.

A quantizer takes z [b h w d] and returns a `Quantized`, whose z carries gradients to the encoder.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float, Int

from diffusion_jax.models.layers.basic import conv
from diffusion_jax.types import Keys


class Quantized(NamedTuple):
    """What a quantizer returns.

    z [b h w d]: the codes. loss: what the training adds to its loss. indices int32 [b h w].
    perplexity: exp of the entropy of the codes used, 1 to n; cluster_usage: how many were used.
    """

    z: Float[Array, "b h w d"]
    loss: Float[Array, ""]
    indices: Int[Array, "b h w"]
    perplexity: Float[Array, ""]
    cluster_usage: Int[Array, ""]


def nearest_code(z: Float[Array, "b h w d"], codebook: Float[Array, "n d"]) -> Int[Array, "b h w"]:
    """Find the code of the least distance: argmin_n |z - e_n|^2; the first of equal ones."""
    products = jnp.einsum("bhwd,nd->bhwn", z, codebook, precision=jax.lax.Precision.HIGHEST)
    norms = jnp.sum(jnp.square(codebook), axis=-1)
    return jnp.argmin(norms[None, None, None] - 2.0 * products, axis=-1).astype(jnp.int32)


def measure_usage(
    indices: Int[Array, "b h w"], num_codes: int
) -> tuple[Float[Array, ""], Int[Array, ""]]:
    """Perplexity exp(-sum_n p_n log p_n) of the codes' frequencies p, and how many are not 0."""
    shares = _counts(indices, num_codes) / indices.size
    entropy = -jnp.sum(shares * jnp.log(shares + 1e-10))
    return jnp.exp(entropy), jnp.sum(shares > 0)


class VectorQuantizer(nn.Module):
    """Replace each z by the nearest of n_e codes (parameter "embedding" [n_e e_dim]).

    z [b h w e_dim] -> Quantized, with loss = mean |sg(e) - z|^2 * a + mean |e - sg(z)|^2 * b. beta
    weighs the first (a = beta, b = 1); legacy, the rule that the released VQ models were trained
    with, weighs the second instead (a = 1, b = beta). Gradients pass straight through: dz = de.
    Raises ValueError for another number of channels.
    Source: van den Oord et al. 2017, "Neural Discrete Representation Learning", equation 3;
    taming-transformers, VectorQuantizer2.
    """

    n_e: int
    e_dim: int
    beta: float = 0.25
    legacy: bool = False
    param_dtype: Any = jnp.float32

    def setup(self) -> None:
        def uniform(key, shape, dtype):
            return jax.random.uniform(key, shape, dtype, -1.0 / self.n_e, 1.0 / self.n_e)

        self.embedding = self.param("embedding", uniform, (self.n_e, self.e_dim), self.param_dtype)

    def __call__(self, z: Float[Array, "b h w d"]) -> Quantized:
        _check_channels(z, "e_dim", self.e_dim)
        z = z.astype(jnp.float32)
        indices = nearest_code(jax.lax.stop_gradient(z), jax.lax.stop_gradient(self._codebook()))
        codes = self._codebook()[indices]
        commitment = jnp.mean(jnp.square(jax.lax.stop_gradient(codes) - z))
        codebook = jnp.mean(jnp.square(codes - jax.lax.stop_gradient(z)))
        terms = (commitment, codebook) if self.legacy else (codebook, commitment)
        loss = terms[0] + self.beta * terms[1]
        usage = measure_usage(indices, self.n_e)
        return Quantized(_straight_through(z, codes), loss, indices, *usage)

    @nn.nowrap
    def _codebook(self) -> Array:
        return self.embedding.astype(jnp.float32)


class EMAVectorQuantizer(nn.Module):
    """Replace each z by the nearest code; codes follow averages of what is assigned to them.

    z [b h w embedding_dim] -> Quantized, with loss = beta mean |sg(e) - z|^2. No parameters: the
    collection "codebook" holds embedding [n d], cluster_size [n] and embed_avg [n d]. With train
    and "codebook" mutable, after the codes were taken,
    cluster_size <- decay cluster_size + (1 - decay) count, embed_avg likewise with sum(z), and
    embedding <- embed_avg / smoothed, smoothed = (cluster_size + eps) / (N + n eps) N, N = sum.
    Counts and sums run over the whole batch, whatever devices it lies on.
    Source: van den Oord et al. 2017, appendix A.1; generative-models, EMAVectorQuantizer.
    """

    n_embed: int
    embedding_dim: int
    beta: float = 0.25
    decay: float = 0.99
    eps: float = 1e-5

    def setup(self) -> None:
        shape = (self.n_embed, self.embedding_dim)
        self.embedding = self.variable(
            "codebook", "embedding", lambda: jax.random.normal(self.make_rng("params"), shape)
        )
        self.cluster_size = self.variable(
            "codebook", "cluster_size", lambda: jnp.zeros(self.n_embed)
        )
        self.embed_avg = self.variable(
            "codebook", "embed_avg", lambda: jnp.array(self.embedding.value)
        )

    def __call__(self, z: Float[Array, "b h w d"], *, train: bool = False) -> Quantized:
        _check_channels(z, "embedding_dim", self.embedding_dim)
        z = z.astype(jnp.float32)
        fixed = jax.lax.stop_gradient(z)
        indices = nearest_code(fixed, self.embedding.value)
        codes = self.embedding.value[indices]
        if train and not self.is_initializing() and self.is_mutable_collection("codebook"):
            self._update(fixed, indices)
        loss = self.beta * jnp.mean(jnp.square(codes - z))
        usage = measure_usage(indices, self.n_embed)
        return Quantized(_straight_through(z, codes), loss, indices, *usage)

    @nn.nowrap
    def _update(self, z: Array, indices: Array) -> None:
        flat = rearrange(z, "b h w d -> (b h w) d")
        sums = jnp.zeros_like(self.embed_avg.value).at[indices.reshape(-1)].add(flat)
        new, old = 1.0 - self.decay, self.decay
        size = old * self.cluster_size.value + new * _counts(indices, self.n_embed)
        average = old * self.embed_avg.value + new * sums
        total = jnp.sum(size)
        smoothed = (size + self.eps) / (total + self.n_embed * self.eps) * total
        self.cluster_size.value, self.embed_avg.value = size, average
        self.embedding.value = average / smoothed[:, None]


class GumbelQuantizer(nn.Module):
    """Choose codes by a Gumbel softmax over logits = proj(z): y = softmax((logits + g) / tau).

    z [b h w num_hiddens] -> Quantized with z [b h w embedding_dim]. The codes are the parameter
    "embedding" [n d]; keys [b] draw the noise g, and without keys there is none: the likeliest code
    (train raises ValueError then). In training with straight_through = False, z is the mean of the
    codes weighed by y, else the code of the largest y, with y's gradients. loss = kl_weight * KL of
    softmax(logits) to the uniform distribution, mean over b h w.
    Source: Jang et al. 2017, "Categorical Reparameterization with Gumbel-Softmax", equation 2;
    taming-transformers, GumbelQuantize.
    """

    num_hiddens: int
    embedding_dim: int
    n_embed: int
    straight_through: bool = True
    kl_weight: float = 5e-4
    param_dtype: Any = jnp.float32

    def setup(self) -> None:
        self.proj = conv(
            self.num_hiddens, self.n_embed, (1, 1), dtype=None, param_dtype=self.param_dtype
        )
        shape = (self.n_embed, self.embedding_dim)
        normal = nn.initializers.normal(1.0)
        self.embedding = self.param("embedding", normal, shape, self.param_dtype)

    def __call__(
        self,
        z: Float[Array, "b h w c"],
        keys: Keys | None = None,
        *,
        temperature: float | Float[Array, ""] = 1.0,
        train: bool = False,
    ) -> Quantized:
        _check_channels(z, "num_hiddens", self.num_hiddens)
        if train and keys is None:
            raise ValueError("keys is missing; training draws Gumbel noise, one key per sample")
        logits = self.proj(z).astype(jnp.float32)
        noisy = logits
        if keys is not None:
            draw = lambda key: jax.random.gumbel(key, logits.shape[1:])
            noisy = logits + jax.vmap(draw)(keys)
        weights = jax.nn.softmax(noisy / temperature)
        indices = jnp.argmax(weights, axis=-1).astype(jnp.int32)
        if self.straight_through or not train:
            weights = _straight_through(weights, jax.nn.one_hot(indices, self.n_embed))
        codes = weights @ self.embedding.astype(jnp.float32)
        shares = jax.nn.softmax(logits)
        divergence = jnp.sum(shares * jnp.log(shares * self.n_embed + 1e-10), axis=-1)
        loss = self.kl_weight * jnp.mean(divergence)
        return Quantized(codes, loss, indices, *measure_usage(indices, self.n_embed))


def _straight_through(soft: Array, hard: Array) -> Array:
    """The value of hard with the gradient of soft."""
    return soft + jax.lax.stop_gradient(hard - soft)


def _counts(indices: Array, num_codes: int) -> Array:
    return jnp.zeros(num_codes).at[indices.reshape(-1)].add(1.0)


def _check_channels(z: Array, name: str, channels: int) -> None:
    if z.shape[-1] != channels:
        raise ValueError(f"z has {z.shape[-1]} channels and {name} = {channels}")
