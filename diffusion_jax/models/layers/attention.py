"""Attention: the one function that every network calls, and the block of the pixel UNets."""

import contextlib
import contextvars
import functools
import logging
import re
from collections.abc import Iterator
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float

from diffusion_jax.devices.chips import find_chip
from diffusion_jax.models.layers.basic import GroupNorm, conv
from diffusion_jax.models.layers.dtypes import Dtypes
from diffusion_jax.models.layers.flash_attention import flash_attention

_log = logging.getLogger(__name__)

IMPLEMENTATIONS = ("auto", "xla", "cudnn", "flash")
# With fewer keys, as a text has, "flash" is "xla": the kernel would work mostly on padding.
MIN_FLASH_KEYS = 128
# Fewer keys of an odd number are left to XLA, which does not work on padding.
MIN_PADDED_KEYS = 32
# From so many queries and keys on, "auto" takes the kernel: a head's logits then fill 4 MiB.
LONG = 1024


# Set while identity_attention traces.
_identity: contextvars.ContextVar[bool] = contextvars.ContextVar("identity", default=False)


@contextlib.contextmanager
def identity_attention() -> Iterator[None]:
    """Let `attention` return v, as if each query found its own key alone, while this is open."""
    token = _identity.set(True)
    try:
        yield
    finally:
        _identity.reset(token)


def attention(
    q: Float[Array, "b l n d"],
    k: Float[Array, "b m n d"],
    v: Float[Array, "b m n d"],
    *,
    implementation: str = "auto",
) -> Float[Array, "b l n d"]:
    """Attend: softmax(q k^T / sqrt(d)) v per head n, softmax in float32.

    implementation: "xla" runs anywhere. "cudnn" is the fused kernel of NVIDIA's GPUs; where it
      cannot be used (`cudnn_refuses`), "xla" is, and the log says why, once. "flash" is the kernel
      of TPUs, for at least MIN_FLASH_KEYS keys. "auto" chooses for the devices of the mesh in
      context (jax.set_mesh, mesh.on_mesh), which may be others than this host has, or without one
      for the default devices.

    Raises ValueError for another name.
    Source: Vaswani et al. 2017, "Attention Is All You Need", equation 1.
    """
    if _identity.get():
        return v
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"attention_impl = {implementation!r} is unknown; "
            f"choose one of {', '.join(IMPLEMENTATIONS)}"
        )
    platform, kind = _target()
    if implementation == "auto":
        implementation = _best(q, k, platform, kind)
    elif implementation == "cudnn":
        reason = cudnn_refuses(q.shape, k.shape, q.dtype, kind)
        if reason is not None:
            _say_once(
                f"attention of {q.shape[1]} queries to {k.shape[1]} keys, heads of width "
                f"{q.shape[-1]}, is computed by XLA and not by cuDNN: {reason}"
            )
            implementation = "xla"
    if implementation == "flash" and k.shape[1] >= MIN_FLASH_KEYS:
        return flash_attention(q, k, v)
    if implementation == "cudnn":
        return _cudnn_attention(q, k, v)
    return jax.nn.dot_product_attention(q, k, v, implementation="xla")


def _cudnn_attention(q: Array, k: Array, v: Array) -> Array:
    """Run cuDNN's kernel; keys of an odd number, which it cannot train, are padded and masked.

    SDXL's blocks of 1024 tokens and 77 keys of a text so move a tenth fewer bytes than with XLA.
    """
    keys = k.shape[1]
    run = partial(jax.nn.dot_product_attention, implementation="cudnn")
    if keys % 2 == 0 or keys < MIN_PADDED_KEYS:
        return run(q, k, v)
    padding = ((0, 0), (0, -keys % 8), (0, 0), (0, 0))
    lengths = (jnp.full(q.shape[:1], length, jnp.int32) for length in (q.shape[1], keys))
    names = ("query_seq_lengths", "key_value_seq_lengths")
    return run(
        q, jnp.pad(k, padding), jnp.pad(v, padding), **dict(zip(names, lengths, strict=True))
    )


def cudnn_refuses(
    q_shape: tuple[int, ...], k_shape: tuple[int, ...], dtype: Any, device_kind: str
) -> str | None:
    """Tell why a layer cannot train with cuDNN's attention on a kind of GPU; None if it can.

    Half precision; heads of a multiple of 8 up to 128 wide, or 256 from compute capability 9.0;
    a GPU from 8.0. JAX has limits of its own, such as an even number of queries and an installed
    cuDNN, and is asked for them; heads wider than 128 it allows only where this host has a GPU from
    9.0. Splits within a sequence or a head are refused too, but no mesh of this package makes them.
    """
    capability = _capability(device_kind)
    if capability is None or capability < (8, 0):
        return f"{device_kind} is no GPU of NVIDIA with a compute capability from 8.0 on"
    widest = 256 if capability >= (9, 0) else 128
    if q_shape[-1] > widest:
        return f"on {device_kind} heads are at most {widest} wide"
    return _jax_refuses(q_shape[1], k_shape[1], q_shape[-1], jnp.dtype(dtype))


@functools.cache
def _jax_refuses(queries: int, keys: int, head_dim: int, dtype: Any) -> str | None:
    """Trace a backward pass through the kernel; return the first line of the error, if any."""

    def total(q: Array, k: Array, v: Array) -> Array:
        return jnp.sum(_cudnn_attention(q, k, v).astype(jnp.float32))

    q, k = (jax.ShapeDtypeStruct((1, length, 1, head_dim), dtype) for length in (queries, keys))
    try:
        with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())):
            jax.eval_shape(jax.grad(total, argnums=(0, 1, 2)), q, k, k)
    except (NotImplementedError, RuntimeError, ValueError) as error:
        return str(error).partition("\n")[0]
    return None


def _capability(device_kind: str) -> tuple[int, int] | None:
    """Find the compute capability of a kind that is known, or of a device that is here."""
    chip = find_chip(device_kind)
    here = [d for d in jax.devices() if d.device_kind == device_kind and d.platform == "gpu"]
    if chip is not None or not here:
        return None if chip is None else chip.capability
    numbers = re.fullmatch(r"(\d+)\.(\d+)", str(here[0].compute_capability))
    return None if numbers is None else (int(numbers[1]), int(numbers[2]))


def _target() -> tuple[str, str]:
    """Find platform and kind of the devices that this is traced for."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is None:
        device = jax.devices()[0]
    return device.platform, device.device_kind


def _best(q: Array, k: Array, platform: str, device_kind: str) -> str:
    if platform == "gpu":
        refused = cudnn_refuses(q.shape, k.shape, q.dtype, device_kind) is not None
        return "xla" if refused else "cudnn"
    # Outside of a mesh nothing tells how to part a kernel between devices.
    placed = not jax.sharding.get_abstract_mesh().empty or jax.device_count() == 1
    long = min(q.shape[1], k.shape[1]) >= LONG
    return "flash" if platform == "tpu" and placed and long else "xla"


@functools.cache
def _say_once(message: str) -> None:
    _log.warning(message)


class AttentionBlock(Dtypes, nn.Module):
    """Self-attention over the pixels with a residual: x + proj_out(attention(qkv(norm(x)))).

    The channels of qkv are ordered (head, q k v, channel), as in every released model, or with
    new_order (q k v, head, channel).
    Source: guided-diffusion, unet.AttentionBlock.
    """

    num_heads: int = 1
    new_order: bool = False
    num_groups: int = 32
    attention_impl: str = "auto"

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """Attend: x [b h w c] -> the same; ValueError when num_heads does not divide c."""
        _, height, _, channels = x.shape
        if self.num_heads < 1 or channels % self.num_heads:
            raise ValueError(
                f"num_heads = {self.num_heads} does not divide the {channels} channels of "
                f"{'/'.join(self.path)}"
            )
        tokens = rearrange(x, "b h w c -> b (h w) c")
        h = GroupNorm(self.num_groups, name="norm", **self.dtypes)(tokens)
        qkv = conv(channels, 3 * channels, (1,), name="qkv", **self.dtypes)(h)
        order = "b l (s n d) -> s b l n d" if self.new_order else "b l (n s d) -> s b l n d"
        q, k, v = rearrange(qkv, order, s=3, n=self.num_heads)
        h = attention(q, k, v, implementation=self.attention_impl)
        h = rearrange(h, "b l n d -> b l (n d)")
        h = conv(channels, channels, (1,), zero=True, name="proj_out", **self.dtypes)(h)
        return x + rearrange(h, "b (h w) c -> b h w c", h=height)
