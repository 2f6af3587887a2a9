"""Attention on TPUs by the splash kernel of jax, which never holds a whole matrix of logits."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel as splash,
)
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_mask as splash_mask,
)
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from diffusion_jax.devices.placement import FEATURE_AXIS, batch_axes

# The name of what the kernel keeps for its backward pass, for the policies of remat.
FLASH = "flash"
# Queries and keys that the kernel works on at a time, best first, and how many keys of these meet
# the queries at once. Large tiles read keys and values less often.
TILES = (1024, 512, 256, 128)
COMPUTE_TILE = 512
MAX_TILE_SIZE = 1024 * 256  # elements; more does not fit the vector memory of a v5e
# One backward kernel takes five products instead of the seven of two, and a copy of the queries'
# gradient for every tile of keys: for so many tiles that is worth it.
MAX_FUSED_TILES = 8
MAX_PADDING = 1 / 8  # the share of padding that a larger tile is worth


def flash_attention(
    q: Float[Array, "b l n d"],
    k: Float[Array, "b m n d"],
    v: Float[Array, "b m n d"],
    *,
    interpret: bool = False,
) -> Float[Array, "b l n d"]:
    """Attend: softmax(q k^T / sqrt(d)) v per head n, in tiles, backward pass included.

    Under a mesh (jax.set_mesh, sharding.on_mesh) every device works on its samples and heads, for
    the compiler cannot split a kernel; samples or heads that do not divide are not split.
    interpret runs the kernel step by step on any device, for tests.
    Source: Dao et al. 2022, "FlashAttention", algorithms 1 and 4.
    """
    attend = functools.partial(_attend, interpret=interpret)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.size <= 1:
        return attend(q, k, v)
    spec = _spec(mesh, batch=q.shape[0], heads=q.shape[2])
    # Kernels do not say over which axes their outputs vary, which check_vma asks for.
    split = jax.shard_map(attend, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    return split(q, k, v)


def _spec(mesh: jax.sharding.AbstractMesh, *, batch: int, heads: int) -> PartitionSpec:
    split_heads = FEATURE_AXIS in mesh.shape and heads % mesh.shape[FEATURE_AXIS] == 0
    return PartitionSpec(batch_axes(mesh, batch), None, FEATURE_AXIS if split_heads else None)


def _attend(q: Array, k: Array, v: Array, *, interpret: bool) -> Array:
    batch, queries, heads, head_dim = q.shape
    keys = k.shape[1]
    q_tile, k_tile = _tile(queries, head_dim), _tile(keys, head_dim)
    compute = min(k_tile, COMPUTE_TILE)
    fused = keys <= MAX_FUSED_TILES * k_tile
    sizes = splash.BlockSizes(
        block_q=q_tile,
        block_kv=k_tile,
        block_kv_compute=compute,
        block_q_dkv=q_tile,
        block_kv_dkv=k_tile,
        block_kv_dkv_compute=compute,
        block_q_dq=None if fused else q_tile,
        block_kv_dq=None if fused else k_tile,
        use_fused_bwd_kernel=fused,
    )
    q, k, v = (
        _pad(rearrange(x, "b l n d -> (b n) l d"), tile)
        for x, tile in ((q * head_dim**-0.5, q_tile), (k, k_tile), (v, k_tile))
    )
    mask = splash_mask.FullMask((q.shape[1], k.shape[1]))
    kernel = splash.make_splash_mha(
        splash_mask.MultiHeadMask([mask] * (batch * heads)),
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name=FLASH,
        interpret=interpret,
    )
    segments = None
    if k.shape[1] != keys:  # padding is a segment of its own, which no query sees
        padding = (jnp.arange(k.shape[1]) >= keys).astype(jnp.int32)
        segments = splash.SegmentIds(jnp.zeros(q.shape[1], jnp.int32), padding)
    out: Any = kernel(q, k, v, segment_ids=segments)
    return rearrange(out[:, :queries], "(b n) l d -> b l n d", b=batch)


def _tile(length: int, head_dim: int) -> int:
    """Choose the largest tile that fits and pads little, or the smallest."""

    def fits(tile: int) -> bool:
        padded = -(-length // tile) * tile
        return tile * head_dim <= MAX_TILE_SIZE and padded <= (1 + MAX_PADDING) * length

    return next((tile for tile in TILES if fits(tile)), TILES[-1])


def _pad(x: Float[Array, "h l d"], tile: int) -> Float[Array, "h l2 d"]:
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % tile), (0, 0)))
