"""DiT: a plain transformer over patches as the denoising network.

Source: Peebles & Xie 2022, "Scalable Diffusion Models with Transformers", with adaLN-Zero blocks.
Parameters have the names of the released files. Options beyond the paper: text by cross-attention
(Chen et al. 2023, "PixArt-alpha"), normed queries and keys (Dehghani et al. 2023, "Scaling Vision
Transformers to 22 Billion Parameters") and rotary positions in two dimensions (Su et al. 2021,
"RoFormer").
"""

import functools
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float, Num

from diffusion_jax.models.layers.attention import attention
from diffusion_jax.models.layers.basic import dense, rematerialised, timestep_embedding
from diffusion_jax.models.layers.dtypes import Dtypes
from diffusion_jax.models.layers.norm import layer_norm
from diffusion_jax.models.layers.transformer import CrossAttention, is_scanned, scan_blocks

BLOCKS = "blocks"
_FREQUENCIES = 256  # features of a timestep before its MLP
_EPSILON = 1e-6


class DiTBlock(Dtypes, nn.Module):
    """Attention and an MLP, each with shift, scale and gate out of the embedding emb [b c].

    x [b l c], context [b m d] or None, rotation [l d/2] (angles per head channel pair) or None ->
    [b l c]. A block begins as the identity, as its gates begin at 0.
    Source: Peebles & Xie 2022, section 3.2, adaLN-Zero.
    """

    num_heads: int
    mlp_ratio: float = 4.0
    qk_norm: bool = False
    dropout: float = 0.0
    attention_impl: str = "auto"

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b l c"],
        emb: Float[Array, "b c"],
        context: Float[Array, "b m d"] | None = None,
        rotation: Float[Array, "l r"] | None = None,
    ) -> Float[Array, "b l c"]:
        width = x.shape[-1]
        modulation = dense(width, 6 * width, zero=True, name="adaLN_modulation_1", **self.dtypes)
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = jnp.split(
            modulation(nn.silu(emb))[:, None], 6, axis=-1
        )
        x = x + gate_a * self._attend(modulated(x, shift_a, scale_a), rotation)
        if context is not None:
            cross = CrossAttention(
                self.num_heads,
                width // self.num_heads,
                attention_impl=self.attention_impl,
                name="cross_attn",
                **self.dtypes,
            )
            x = x + cross(x, context)
        hidden = int(width * self.mlp_ratio)
        h = xavier(width, hidden, name="mlp_fc1", **self.dtypes)(modulated(x, shift_m, scale_m))
        h = nn.Dropout(self.dropout, deterministic=False)(nn.gelu(h, approximate=True))
        return x + gate_m * xavier(hidden, width, name="mlp_fc2", **self.dtypes)(h)

    @nn.nowrap
    def _attend(self, x: Array, rotation: Array | None) -> Array:
        width = x.shape[-1]
        qkv = xavier(width, 3 * width, name="attn_qkv", **self.dtypes)(x)
        q, k, v = rearrange(qkv, "b l (s n d) -> s b l n d", s=3, n=self.num_heads)
        if self.qk_norm:
            norm = functools.partial(nn.RMSNorm, epsilon=_EPSILON, param_dtype=self.param_dtype)
            q, k = (
                norm(name=f"attn_{name}_norm")(a.astype(jnp.float32)).astype(self.dtype)
                for name, a in (("q", q), ("k", k))
            )
        if rotation is not None:
            q, k = (rotated(a, rotation) for a in (q, k))
        h = attention(q, k, v, implementation=self.attention_impl)
        return xavier(width, width, name="attn_proj", **self.dtypes)(
            rearrange(h, "b l n d -> b l (n d)")
        )


class DiT(Dtypes, nn.Module):
    """Denoising transformer: (x [b h w c], t [b], context, y) -> [b h w out_channels].

    out_channels: of what is denoised. hidden_size, depth, num_heads: 1152, 28, 16 is DiT-XL.
    patch_size: side of the squares of pixels that become tokens.
    num_classes: what y is, as in UNet. None: no y. An int: labels int [b], the null class among
        them. "sequential": features [b adm_in_channels].
    context_dim: width of the context [b m d] that every block attends to; None for no context.
    position: "sincos", a fixed embedding that is added to the tokens, or "rope", rotations of
        queries and keys.
    embeds_duration: whether the network also reads duration [b], as in UNet.
    learn_sigma: the last layer has as many outputs again, for the variances of the released models;
        they are kept in files and not used.
    remat: as in UNet. scan: compile one block instead of depth blocks; parameters are stacked.
    Raises ValueError when sizes do not fit.
    """

    out_channels: int
    hidden_size: int = 384
    depth: int = 12
    num_heads: int = 6
    patch_size: int = 2
    mlp_ratio: float = 4.0
    num_classes: int | str | None = None
    adm_in_channels: int | None = None
    context_dim: int | None = None
    position: str = "sincos"
    qk_norm: bool = False
    embeds_duration: bool = False
    learn_sigma: bool = False
    dropout: float = 0.0
    attention_impl: str = "auto"
    remat: bool | str = False
    scan: bool = False

    @property
    def size_multiple(self) -> int:
        """The number that both sides of x must be multiples of."""
        return self.patch_size

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b h w c"],
        t: Num[Array, "b"],
        context: Float[Array, "b m d"] | None = None,
        y: Num[Array, "b ..."] | None = None,
        *,
        duration: Num[Array, "b"] | None = None,
        train: bool = False,
    ) -> Float[Array, "b h w o"]:
        _check(self, x, context, y)
        width, side = self.hidden_size, self.patch_size
        rows, columns = x.shape[1] // side, x.shape[2] // side
        emb = self._embed(t, y, duration)
        patches = nn.Conv(
            width,
            (side, side),
            strides=side,
            padding="VALID",
            kernel_init=nn.initializers.xavier_uniform(in_axis=(0, 1, 2)),
            name="x_embedder_proj",
            **self.dtypes,
        )
        h = rearrange(patches(x.astype(self.dtype)), "b h w c -> b (h w) c")
        rotation = None
        if self.position == "rope":
            rotation = jnp.asarray(rope_angles(rows, columns, width // self.num_heads))
        else:
            h = h + jnp.asarray(sincos_positions(rows, columns, width), self.dtype)[None]
        h = self._blocks(h, emb, context, rotation, self.dropout if train else 0.0)
        last = dense(
            width, 2 * width, zero=True, name="final_layer_adaLN_modulation_1", **self.dtypes
        )
        shift, scale = jnp.split(last(nn.silu(emb))[:, None], 2, axis=-1)
        h = modulated(h, shift, scale).astype(x.dtype)
        outputs = self.out_channels * (2 if self.learn_sigma else 1)
        head = {"dtype": x.dtype, "param_dtype": self.param_dtype}
        h = dense(width, side * side * outputs, zero=True, name="final_layer_linear", **head)(h)
        h = rearrange(h, "b (h w) (p q c) -> b (h p) (w q) c", h=rows, w=columns, p=side, q=side)
        return h[..., : self.out_channels]

    @nn.nowrap
    def _embed(self, t: Array, y: Array | None, duration: Array | None) -> Array:
        """Embed the timestep, y where there is one, and the duration -> [b hidden_size]."""
        width, dtypes = self.hidden_size, self.dtypes
        small = nn.initializers.normal(0.02)

        def mlp(h: Array, name: str, last: Any = small) -> Array:
            h = dense(h.shape[-1], width, kernel_init=small, name=f"{name}_0", **dtypes)(h)
            return dense(width, width, kernel_init=last, name=f"{name}_2", **dtypes)(nn.silu(h))

        def sinusoids(number: Array) -> Array:
            return timestep_embedding(number, _FREQUENCIES).astype(self.dtype)

        emb = mlp(sinusoids(t), "t_embedder_mlp")
        if self.embeds_duration:
            length = sinusoids(jnp.zeros(t.shape) if duration is None else duration)
            emb = emb + mlp(length, "duration_embedder_mlp", nn.initializers.zeros)
        elif duration is not None:
            raise ValueError("duration is given and embeds_duration = False: the DiT reads none")
        if y is None:
            return emb
        if isinstance(self.num_classes, int):
            table = nn.Embed(
                self.num_classes,
                width,
                embedding_init=small,
                name="y_embedder_embedding_table",
                **dtypes,
            )
            return emb + table(y)
        return emb + mlp(y.astype(self.dtype), "y_embedder_mlp")

    @nn.nowrap
    def _blocks(self, h: Array, emb: Array, context: Any, rotation: Any, dropout: float) -> Array:
        scanned = is_scanned(self)
        # Nothing is merged across the iterations of a scan: remat needs no barrier against it.
        block_class = rematerialised(DiTBlock, self.remat, prevent_cse=not scanned)
        fields = dict(
            num_heads=self.num_heads,
            mlp_ratio=self.mlp_ratio,
            qk_norm=self.qk_norm,
            dropout=dropout,
            attention_impl=self.attention_impl,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
        )
        if not scanned:
            for index in range(self.depth):
                h = block_class(**fields, name=f"{BLOCKS}_{index}")(h, emb, context, rotation)
            return h
        block = block_class(**fields, name=BLOCKS)
        return scan_blocks(block, self.depth, h, emb, context, rotation)


def _check(options: DiT, x: Array, context: Array | None, y: Array | None) -> None:
    """Raise ValueError when the fields of a DiT do not fit together, or its inputs them."""
    if x.shape[1] % options.patch_size or x.shape[2] % options.patch_size:
        raise ValueError(
            f"x is {x.shape[1]} x {x.shape[2]} pixels; both should be multiples of "
            f"patch_size = {options.patch_size}"
        )
    if options.hidden_size % (4 * options.num_heads):
        raise ValueError(
            f"hidden_size = {options.hidden_size} should be a multiple of 4 num_heads = "
            f"{4 * options.num_heads}"
        )
    if options.position not in ("sincos", "rope"):
        raise ValueError(f"position = {options.position!r} is unknown; choose from sincos, rope")
    kind = options.num_classes
    if isinstance(kind, str) and (kind != "sequential" or options.adm_in_channels is None):
        raise ValueError(
            f"num_classes = {kind!r} should be None, a number of classes, or 'sequential' with "
            "adm_in_channels, the width of y"
        )
    for name, value, field in (("context", context, "context_dim"), ("y", y, "num_classes")):
        if (value is None) != (getattr(options, field) is None):
            given = "is missing" if value is None else f"{value.shape} is given"
            raise ValueError(f"{name} {given} and {field} = {getattr(options, field)!r}")


def xavier(in_features: int, features: int, **options: Any) -> nn.Dense:
    """Make a dense layer that starts with Glorot's uniform weights, as the paper's layers do."""
    return dense(in_features, features, kernel_init=nn.initializers.xavier_uniform(), **options)


def modulated(x: Array, shift: Array, scale: Array) -> Array:
    """Compute layer_norm(x) (1 + scale) + shift, the norm without parameters and in float32."""
    ones = jnp.ones(x.shape[-1:], jnp.float32)
    return layer_norm(x, ones, 0 * ones, _EPSILON).astype(x.dtype) * (1 + scale) + shift


def sincos_positions(rows: int, columns: int, width: int) -> np.ndarray:
    """Embed the places of a grid -> float32 [rows columns, width].

    The first half of the channels are sin and cos of the column, the second of the row, with the
    frequencies 10000^(-4 i / width). Source: He et al. 2021, "Masked Autoencoders Are Scalable
    Vision Learners", appendix A.1.
    """
    frequencies = 10000.0 ** (-np.arange(width // 4) / (width // 4))
    row, column = np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij")
    parts = []
    for place in (column, row):
        angles = place.reshape(-1, 1) * frequencies
        parts += [np.sin(angles), np.cos(angles)]
    return np.concatenate(parts, axis=1).astype(np.float32)


def rope_angles(rows: int, columns: int, head_dim: int) -> np.ndarray:
    """Compute the angles of pairs of channels in a grid -> float32 [rows columns, head_dim / 2].

    The first half of the pairs turns with the row, the second with the column, by
    10000^(-4 i / head_dim) per step.
    """
    frequencies = 10000.0 ** (-np.arange(head_dim // 4) / (head_dim // 4))
    row, column = np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij")
    angles = [place.reshape(-1, 1) * frequencies for place in (row, column)]
    return np.concatenate(angles, axis=1).astype(np.float32)


def rotated(x: Float[Array, "b l n d"], angles: Float[Array, "l r"]) -> Float[Array, "b l n d"]:
    """Turn the pairs (x_i, x_(i + d/2)) of each head by an angle of the token, in float32.

    Source: Su et al. 2021, "RoFormer", equation 34, with the pairs in halves.
    """
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = (f(angles)[None, :, None] for f in (jnp.cos, jnp.sin))
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)
