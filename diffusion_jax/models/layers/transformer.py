"""The spatial transformer of the latent UNets, and the two layouts of its parameters."""

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange, repeat
from jaxtyping import Array, Float

from diffusion_jax.models.layers.attention import attention
from diffusion_jax.models.layers.basic import GroupNorm, LayerNorm, conv, dense, rematerialised
from diffusion_jax.models.layers.dtypes import Dtypes
from diffusion_jax.models.layers.gating import gated_gelu
from diffusion_jax.types import PyTree

BLOCKS = "transformer_blocks"
# The names of stacks of equal blocks, with _0, _1, ... behind them where they are not scanned.
STACKS = (BLOCKS, "blocks", "time_stack", "time_mix_blocks", "motion_blocks")
# What a block of a transformer has. Residual blocks over time have two of the names, too, not this.
_IN_A_BLOCK = {"norm1", "adaLN_modulation_1"}


class CrossAttention(Dtypes, nn.Module):
    """Attention of x [b l c] to a context [r m d], or to x itself without one -> [b l c].

    r divides b: b / r rows of x in a row, such as the frames of a clip, share a row of the context.
    A context of one token, such as a picture's embedding, costs no queries and no keys. to_q, to_k
    and to_v have no bias, to_out has one. Source: latent-diffusion, CrossAttention.
    """

    num_heads: int
    head_dim: int
    dropout: float = 0.0
    attention_impl: str = "auto"

    @nn.compact
    def __call__(
        self, x: Float[Array, "b l c"], context: Float[Array, "r m d"] | None = None
    ) -> Float[Array, "b l c"]:
        context = x if context is None else context
        rows, count = x.shape[0], context.shape[0]
        if rows % count:
            raise ValueError(
                f"{'/'.join(self.path)} got {count} contexts, which do not divide the {rows} rows "
                "of x"
            )
        inner = self.num_heads * self.head_dim

        def project(source: Array, name: str) -> Array:
            return dense(source.shape[-1], inner, use_bias=False, name=name, **self.dtypes)(source)

        def shared(a: Array) -> Array:
            return a if rows == count else repeat(a, "r ... -> (r s) ...", s=rows // count)

        out = dense(inner, x.shape[-1], name="to_out_0", **self.dtypes)
        if context.shape[1] == 1 and not self.is_initializing():
            # All attention is to the one key, whatever the queries are.
            h = shared(jnp.broadcast_to(out(project(context, "to_v")), (count, *x.shape[1:])))
        else:
            sources = {"to_q": x, "to_k": context, "to_v": context}
            q, k, v = (
                rearrange(project(source, name), "b l (n d) -> b l n d", n=self.num_heads)
                for name, source in sources.items()
            )
            h = attention(q, shared(k), shared(v), implementation=self.attention_impl)
            h = out(rearrange(h, "b l n d -> b l (n d)"))
        return nn.Dropout(self.dropout, deterministic=False)(h)


class GEGLU(Dtypes, nn.Module):
    """Gated linear unit a gelu(b) with [a, b] = proj(x): [b l c] -> [b l features].

    The GELU is the exact one (erf), as in every released model.
    Source: Shazeer 2020, "GLU Variants Improve Transformer", equation 5.
    """

    features: int

    @nn.compact
    def __call__(self, x: Float[Array, "b l c"]) -> Float[Array, "b l f"]:
        projection = dense(
            x.shape[-1],
            2 * self.features,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            name="proj",
        )
        return gated_gelu(projection(x))


class FeedForward(Dtypes, nn.Module):
    """Two-layer MLP with GEGLU of four times the width: [b l c] -> [b l c]."""

    dropout: float = 0.0

    @nn.compact
    def __call__(self, x: Float[Array, "b l c"]) -> Float[Array, "b l c"]:
        channels = x.shape[-1]
        h = GEGLU(4 * channels, name="net_0", **self.dtypes)(x)
        h = nn.Dropout(self.dropout, deterministic=False)(h)
        return dense(4 * channels, channels, name="net_2", **self.dtypes)(h)


class BasicTransformerBlock(Dtypes, nn.Module):
    """Self-attention, attention to the context and a feed-forward, each pre-normed with a residual.

    x [b l c], context [r m d] as CrossAttention takes it or None (then all attention is to x) ->
    [b l c]. With disable_self_attn the first attention looks at the context too.
    Source: latent-diffusion, attention.BasicTransformerBlock.
    """

    num_heads: int
    head_dim: int
    dropout: float = 0.0
    disable_self_attn: bool = False
    attention_impl: str = "auto"

    @nn.compact
    def __call__(
        self, x: Float[Array, "b l c"], context: Float[Array, "r m d"] | None = None
    ) -> Float[Array, "b l c"]:
        return attend_and_feed(self, x, context)


def attend_and_feed(
    block: Any, x: Array, context: Array | None, *, cross_attention: bool = True
) -> Array:
    """Compute BasicTransformerBlock inside a module that has its fields, with its names.

    cross_attention: False leaves the second attention out.
    """
    dtypes = block.dtypes

    def norm(name: str) -> LayerNorm:
        return LayerNorm(name=name, **dtypes)

    def attend(name: str) -> CrossAttention:
        return CrossAttention(
            block.num_heads,
            block.head_dim,
            dropout=block.dropout,
            attention_impl=block.attention_impl,
            name=name,
            **dtypes,
        )

    x = attend("attn1")(norm("norm1")(x), context if block.disable_self_attn else None) + x
    if cross_attention:
        x = attend("attn2")(norm("norm2")(x), context) + x
    return FeedForward(block.dropout, name="ff", **dtypes)(norm("norm3")(x)) + x


@dataclasses.dataclass(repr=False, eq=False)
class Fields(Dtypes):
    """What transformers over pixels are made from, of videos and of views too.

    use_linear, scan: see SpatialTransformer.
    """

    num_heads: int
    head_dim: int
    depth: int = 1
    dropout: float = 0.0
    disable_self_attn: bool = False
    use_linear: bool = False
    num_groups: int = 32
    attention_impl: str = "auto"
    remat: bool | str = False
    scan: bool = False


class SpatialTransformer(Fields, nn.Module):
    """Transformer over the pixels with a residual: x + proj_out(blocks(proj_in(norm(x)), context)).

    x [b h w c] -> [b h w c]. context is None, one array [b m d] for all blocks, or one per block.
    use_linear makes proj_in and proj_out dense layers instead of 1 x 1 convolutions: same numbers,
    other parameter shapes. scan compiles one block instead of depth blocks and keeps their
    parameters stacked, see stack_blocks; the numbers are the same but for dropout's draws.
    Raises ValueError when the contexts are neither one nor depth.
    Source: latent-diffusion, attention.SpatialTransformer.
    """

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b h w c"],
        context: Float[Array, "b m d"] | Sequence[Float[Array, "b _ _"]] | None = None,
    ) -> Float[Array, "b h w c"]:
        contexts = self._contexts(context)
        return between_projections(self, x, lambda h: self._blocks(h, contexts))

    def _contexts(self, context: Any) -> tuple[Any, ...]:
        contexts = tuple(context) if isinstance(context, Sequence) else (context,)
        if len(contexts) not in (1, self.depth):
            raise ValueError(
                f"{'/'.join(self.path)} got {len(contexts)} contexts; give 1 for all blocks or "
                f"{self.depth}, one per block"
            )
        return contexts

    @nn.nowrap
    def _blocks(self, h: Array, contexts: tuple[Any, ...]) -> Array:
        if not is_scanned(self):
            for i in range(self.depth):
                block = make_block(self, BasicTransformerBlock, f"{BLOCKS}_{i}")
                h = block(h, contexts[min(i, len(contexts) - 1)])
            return h
        shared = len(contexts) == 1
        block = make_block(self, BasicTransformerBlock, BLOCKS)
        if shared:
            return scan_blocks(block, self.depth, h, contexts[0])
        return scan_blocks(block, self.depth, h, jnp.stack(contexts), in_axes=0)


def between_projections(options: Any, x: Array, blocks: Callable[[Array], Array]) -> Array:
    """Run blocks on the pixels of x [b h w c] as tokens: x + proj_out(blocks(proj_in(norm(x)))).

    options: the calling module, a transformer, whose children the layers become.
    """
    _, height, _, channels = x.shape
    inner = options.num_heads * options.head_dim
    h = GroupNorm(options.num_groups, epsilon=1e-6, name="norm", **options.dtypes)(x)
    if options.use_linear:
        h = rearrange(h, "b h w c -> b (h w) c")
        h = dense(channels, inner, name="proj_in", **options.dtypes)(h)
    else:
        h = conv(channels, inner, (1, 1), name="proj_in", **options.dtypes)(h)
        h = rearrange(h, "b h w c -> b (h w) c")
    h = blocks(h)
    if options.use_linear:
        h = dense(inner, channels, zero=True, name="proj_out", **options.dtypes)(h)
        h = rearrange(h, "b (h w) c -> b h w c", h=height)
    else:
        h = rearrange(h, "b (h w) c -> b h w c", h=height)
        h = conv(inner, channels, (1, 1), zero=True, name="proj_out", **options.dtypes)(h)
    return x + h


def scan_blocks(
    block: nn.Module, depth: int, h: Array, *inputs: Any, in_axes: Any = nn.broadcast
) -> Array:
    """Run h through `depth` blocks whose parameters are stacked in one, which is compiled once.

    inputs: further arguments of each block; with in_axes = 0 each gets its own row of them.
    """
    scan = nn.scan(
        lambda module, carry, *given: (module(carry, *given), None),
        variable_axes={"params": 0},
        split_rngs={"params": True, "dropout": True},
        in_axes=in_axes,
        length=depth,
    )
    return scan(block, h, *inputs)[0]


def is_scanned(options: Any) -> bool:
    """Tell whether a transformer with these options keeps its blocks stacked."""
    return options.scan and options.depth > 1


def make_block(options: Any, block_class: Any, name: str, **fields: Any) -> nn.Module:
    """Make one block of a transformer with its options, rematerialised if they say so."""
    # Nothing is merged across the iterations of a scan: remat needs no barrier against it.
    prevent_cse = not is_scanned(options)
    return rematerialised(block_class, options.remat, prevent_cse=prevent_cse)(
        options.num_heads,
        options.head_dim,
        dropout=options.dropout,
        disable_self_attn=options.disable_self_attn,
        attention_impl=options.attention_impl,
        dtype=options.dtype,
        param_dtype=options.param_dtype,
        name=name,
        **fields,
    )


def stack_blocks(params: PyTree) -> PyTree:
    """Stack transformer_blocks_0, _1, ... of every deep transformer into one transformer_blocks.

    So are the other STACKS. The result is the layout of a network with scan = True; unstack_blocks
    is the inverse.
    """
    if not isinstance(params, dict):
        return params
    children = {name: stack_blocks(child) for name, child in params.items()}
    for stack in STACKS:
        depth = sum(re.fullmatch(rf"{stack}_\d+", name) is not None for name in children)
        if depth > 1:
            blocks = [children.pop(f"{stack}_{i}") for i in range(depth)]
            children[stack] = jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks)
    return children


def unstack_blocks(params: PyTree) -> PyTree:
    """Split every stacked transformer_blocks into _0, _1, ..., the names of released weights."""
    if not isinstance(params, dict):
        return params
    children = {name: unstack_blocks(child) for name, child in params.items()}
    for stack in STACKS:
        if stack in children and _IN_A_BLOCK & set(children[stack]):
            stacked = children.pop(stack)
            for i in range(jax.tree.leaves(stacked)[0].shape[0]):
                children[f"{stack}_{i}"] = jax.tree.map(lambda leaf, i=i: leaf[i], stacked)
    return children
