"""The two towers of CLIP: text (OpenAI's and OpenCLIP's) and vision, with Hugging Face's names.

Both are stacks of the same pre-norm transformer layer. OpenAI's weights use quick_gelu, OpenCLIP's
ViT-H-14 and ViT-bigG-14 the exact GELU. The released files hold two more numbers that are no
parameters of an encoder: logit_scale (of the contrastive loss) and position_ids (0, 1, 2, ...).
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float, Int

from diffusion_jax.models.layers.attention import attention
from diffusion_jax.models.layers.basic import dense, rematerialised, torch_uniform
from diffusion_jax.models.layers.dtypes import Dtypes

# Where the vectors of new tokens lie among the parameters of TextEmbeddings.
ADDED = "added"


def quick_gelu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Approximate the GELU as x sigmoid(1.702 x). Source: Hendrycks & Gimpel 2016, section 2."""
    return x * jax.nn.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "quick_gelu": quick_gelu,
    "gelu": partial(nn.gelu, approximate=False),
}

# Sizes of the released towers, by OpenCLIP's names: keywords of ClipTextTower and ClipVisionTower.
TEXT_SIZES: dict[str, dict[str, Any]] = {
    "ViT-L-14": {},
    "ViT-H-14": {
        "width": 1024,
        "num_layers": 24,
        "num_heads": 16,
        "mlp_dim": 4096,
        "activation": "gelu",
        "projection_dim": 1024,
    },
    "ViT-bigG-14": {
        "width": 1280,
        "num_layers": 32,
        "num_heads": 20,
        "mlp_dim": 5120,
        "activation": "gelu",
        "projection_dim": 1280,
    },
}
VISION_SIZES: dict[str, dict[str, Any]] = {
    "ViT-L-14": {},
    "ViT-H-14": {
        "width": 1280,
        "num_layers": 32,
        "num_heads": 16,
        "mlp_dim": 5120,
        "activation": "gelu",
        "projection_dim": 1024,
    },
}


def text_tower(name: str, **fields: Any) -> "ClipTextTower":
    """Make a released text tower: a name of TEXT_SIZES, and the fields to set besides.

    Raises ValueError for another name.
    """
    return ClipTextTower(**{**_sizes(TEXT_SIZES, "text", name), **fields})


def vision_tower(name: str, **fields: Any) -> "ClipVisionTower":
    """Make a released vision tower: a name of VISION_SIZES, and the fields to set besides.

    Raises ValueError for another name.
    """
    return ClipVisionTower(**{**_sizes(VISION_SIZES, "vision", name), **fields})


def _sizes(table: dict[str, dict[str, Any]], kind: str, name: str) -> dict[str, Any]:
    if name not in table:
        raise ValueError(f"the CLIP {kind} tower {name!r} is unknown; choose {', '.join(table)}")
    return table[name]


class TextStates(NamedTuple):
    """What a text tower computes; hidden[k] [b l d] follows k layers, so hidden[0] is the input.

    normed is the final norm of hidden[-1]. pooled [b d] is normed at the end of the text and
    projected [b p] its projection; both are None when layers were left out.
    """

    hidden: tuple[Float[Array, "b l d"], ...]
    normed: Float[Array, "b l d"]
    pooled: Float[Array, "b d"] | None
    projected: Float[Array, "b p"] | None


class VisionStates(NamedTuple):
    """What a vision tower computes: patches [b n d] without a final norm, projected [b p]."""

    patches: Float[Array, "b n d"]
    projected: Float[Array, "b p"]


class ClipTextTower(Dtypes, nn.Module):
    """CLIP's text encoder, a causal transformer: tokens int32 [b l] -> TextStates.

    The defaults come from OpenAI's ViT-L/14. layers, the number to compute, may be smaller than
    num_layers; parameters exist for all of them, as in the released files. The end of the text is
    the largest token of the vocabulary in the row, the first one if it occurs more than once.
    Raises ValueError for more tokens than max_length or an impossible number of layers.
    Source: Radford et al. 2021 (CLIP), section 2.4; Hugging Face CLIPTextModelWithProjection.
    """

    width: int = 768
    num_layers: int = 12
    num_heads: int = 12
    mlp_dim: int = 3072
    activation: str = "quick_gelu"
    projection_dim: int | None = None
    vocab_size: int = 49408
    max_length: int = 77
    remat: bool | str = False

    @nn.compact
    def __call__(self, tokens: Int[Array, "b l"], layers: int | None = None) -> TextStates:
        layers = self.num_layers if layers is None else layers
        if not 0 <= layers <= self.num_layers:
            raise ValueError(
                f"layers = {layers} of a text tower that has {self.num_layers}; "
                f"choose 0 to {self.num_layers}"
            )
        x = TextEmbeddings(
            self.width, self.vocab_size, self.max_length, name="embeddings", **self.dtypes
        )(tokens)
        encoder = ClipEncoder(
            self.num_layers,
            self.num_heads,
            self.mlp_dim,
            self.activation,
            causal=True,
            remat=self.remat,
            name="encoder",
            **self.dtypes,
        )
        hidden = encoder(x, layers)
        normed = layer_norm("final_layer_norm", **self.dtypes)(hidden[-1])
        known = jnp.where(tokens < self.vocab_size, tokens, -1)
        pooled = normed[jnp.arange(tokens.shape[0]), jnp.argmax(known, axis=-1)]
        projected = None
        if self.projection_dim is not None and (
            layers == self.num_layers or self.is_initializing()
        ):
            projected = _projection(
                self.width, self.projection_dim, "text_projection", **self.dtypes
            )(pooled)
        if layers < self.num_layers:
            return TextStates(hidden, normed, None, None)
        return TextStates(hidden, normed, pooled, projected)


class ClipVisionTower(Dtypes, nn.Module):
    """CLIP's image encoder, a vision transformer: image [b h w 3] -> VisionStates.

    The image has image_size pixels on each side and CLIP's normalisation. The defaults come
    from OpenAI's ViT-L/14. Raises ValueError for another size.
    Source: Radford et al. 2021 (CLIP), section 2.4; Hugging Face CLIPVisionModelWithProjection.
    """

    width: int = 1024
    num_layers: int = 24
    num_heads: int = 16
    mlp_dim: int = 4096
    activation: str = "quick_gelu"
    projection_dim: int = 768
    image_size: int = 224
    patch_size: int = 14
    attention_impl: str = "auto"
    remat: bool | str = False

    @nn.compact
    def __call__(self, image: Float[Array, "b h w c"]) -> VisionStates:
        if image.shape[1:] != (self.image_size, self.image_size, 3):
            raise ValueError(
                f"the CLIP vision tower got images of shape {image.shape[1:]}; it reads "
                f"{(self.image_size, self.image_size, 3)}"
            )
        x = VisionEmbeddings(self.width, self.patch_size, name="embeddings", **self.dtypes)(image)
        x = layer_norm("pre_layrnorm", **self.dtypes)(x)  # Hugging Face's spelling
        encoder = ClipEncoder(
            self.num_layers,
            self.num_heads,
            self.mlp_dim,
            self.activation,
            attention_impl=self.attention_impl,
            remat=self.remat,
            name="encoder",
            **self.dtypes,
        )
        x = encoder(x, self.num_layers)[-1]
        pooled = layer_norm("post_layernorm", **self.dtypes)(x[:, 0])
        projection = _projection(
            self.width, self.projection_dim, "visual_projection", **self.dtypes
        )
        return VisionStates(x[:, 1:], projection(pooled))


class TextEmbeddings(Dtypes, nn.Module):
    """Sum of token and position embeddings: tokens int32 [b l] -> [b l width].

    Beside its parameters there may be the vectors of new tokens, ADDED [n width]: these are the
    tokens from vocab_size on.
    """

    width: int
    vocab_size: int
    max_length: int

    @nn.compact
    def __call__(self, tokens: Int[Array, "b l"]) -> Float[Array, "b l d"]:
        length = tokens.shape[1]
        if length > self.max_length:
            raise ValueError(
                f"{'/'.join(self.path)} got {length} tokens; it has {self.max_length} positions"
            )
        positions = _table(self.max_length, self.width, 0.01, "position_embedding", **self.dtypes)
        table = _table(self.vocab_size, self.width, 0.02, "token_embedding", **self.dtypes)
        if not self.has_variable("params", ADDED):
            return table(tokens) + positions(jnp.arange(length))[None]
        added = jnp.asarray(self.get_variable("params", ADDED), self.dtype)
        is_new = tokens >= self.vocab_size
        new = added[jnp.clip(tokens - self.vocab_size, 0, len(added) - 1)]
        known = table(jnp.minimum(tokens, self.vocab_size - 1))
        return jnp.where(is_new[..., None], new, known) + positions(jnp.arange(length))[None]


class VisionEmbeddings(Dtypes, nn.Module):
    """Class token, patches and their positions: image [b h w c] -> [b 1+n width], row by row."""

    width: int
    patch_size: int

    @nn.compact
    def __call__(self, image: Float[Array, "b h w c"]) -> Float[Array, "b n d"]:
        size = (self.patch_size, self.patch_size)
        patches = nn.Conv(
            self.width,
            size,
            strides=size,
            padding="VALID",
            use_bias=False,
            kernel_init=torch_uniform(image.shape[-1] * self.patch_size**2),
            name="patch_embedding",
            **self.dtypes,
        )(image)
        patches = rearrange(patches, "b h w d -> b (h w) d")
        scaled = nn.initializers.normal(self.width**-0.5)
        token = self.param("class_embedding", scaled, (self.width,), self.param_dtype)
        first = jnp.broadcast_to(token.astype(self.dtype), (image.shape[0], 1, self.width))
        x = jnp.concatenate([first, patches], axis=1)
        positions = _table(
            x.shape[1], self.width, self.width**-0.5, "position_embedding", **self.dtypes
        )
        return x + positions(jnp.arange(x.shape[1]))[None]


class ClipEncoder(Dtypes, nn.Module):
    """A stack of ClipLayer: x [b l d] -> hidden states after 0, 1, ..., layers of its layers."""

    num_layers: int
    num_heads: int
    mlp_dim: int
    activation: str
    causal: bool = False
    attention_impl: str = "auto"
    remat: bool | str = False

    @nn.compact
    def __call__(self, x: Float[Array, "b l d"], layers: int) -> tuple[Float[Array, "b l d"], ...]:
        layer = rematerialised(ClipLayer, self.remat)
        hidden = [x]
        for i in range(self.num_layers if self.is_initializing() else layers):
            x = layer(
                self.num_heads,
                self.mlp_dim,
                self.activation,
                causal=self.causal,
                attention_impl=self.attention_impl,
                dtype=self.dtype,
                param_dtype=self.param_dtype,
                name=f"layers_{i}",
            )(x)
            hidden.append(x)
        return tuple(hidden[: layers + 1])


class ClipLayer(Dtypes, nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)): [b l d] -> [b l d].

    Source: Vaswani et al. 2017 with the norms in front (GPT-2, ViT).
    """

    num_heads: int
    mlp_dim: int
    activation: str
    causal: bool = False
    attention_impl: str = "auto"

    @nn.compact
    def __call__(self, x: Float[Array, "b l d"]) -> Float[Array, "b l d"]:
        x = x + ClipAttention(
            self.num_heads,
            causal=self.causal,
            attention_impl=self.attention_impl,
            name="self_attn",
            **self.dtypes,
        )(layer_norm("layer_norm1", **self.dtypes)(x))
        mlp = Mlp(self.mlp_dim, self.activation, name="mlp", **self.dtypes)
        return x + mlp(layer_norm("layer_norm2", **self.dtypes)(x))


class ClipAttention(Dtypes, nn.Module):
    """Self-attention with biases, causal if wanted: [b l d] -> [b l d].

    Raises ValueError when num_heads does not divide the width.
    """

    num_heads: int
    causal: bool = False
    attention_impl: str = "auto"

    @nn.compact
    def __call__(self, x: Float[Array, "b l d"]) -> Float[Array, "b l d"]:
        width = x.shape[-1]
        if self.num_heads < 1 or width % self.num_heads:
            raise ValueError(
                f"num_heads = {self.num_heads} does not divide the width {width} of "
                f"{'/'.join(self.path)}"
            )
        project = partial(dense, width, width, dtype=self.dtype, param_dtype=self.param_dtype)
        q, k, v = (
            rearrange(project(name=name)(x), "b l (n d) -> b l n d", n=self.num_heads)
            for name in ("q_proj", "k_proj", "v_proj")
        )
        if self.causal:
            h = jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="xla")
        else:
            h = attention(q, k, v, implementation=self.attention_impl)
        return project(name="out_proj")(rearrange(h, "b l n d -> b l (n d)"))


class Mlp(Dtypes, nn.Module):
    """fc2(activation(fc1(x))), fc1 to `features`: [b l d] -> [b l d].

    Raises ValueError for an activation that ACTIVATIONS does not have.
    """

    features: int
    activation: str

    @nn.compact
    def __call__(self, x: Float[Array, "b l d"]) -> Float[Array, "b l d"]:
        if self.activation not in ACTIVATIONS:
            raise ValueError(
                f"activation = {self.activation!r} of {'/'.join(self.path)} is unknown; "
                f"choose one of {', '.join(ACTIVATIONS)}"
            )
        h = dense(x.shape[-1], self.features, name="fc1", **self.dtypes)(x)
        h = ACTIVATIONS[self.activation](h)
        return dense(self.features, x.shape[-1], name="fc2", **self.dtypes)(h)


def layer_norm(name: str, *, dtype: Any, param_dtype: Any) -> nn.LayerNorm:
    """Make PyTorch's LayerNorm: epsilon 1e-5 and the two-pass variance."""
    return nn.LayerNorm(
        epsilon=1e-5, use_fast_variance=False, dtype=dtype, param_dtype=param_dtype, name=name
    )


def _table(rows: int, width: int, std: float, name: str, **dtypes: Any) -> nn.Embed:
    normal = nn.initializers.normal(std)
    return nn.Embed(rows, width, embedding_init=normal, name=name, **dtypes)


def _projection(width: int, features: int, name: str, **dtypes: Any) -> nn.Dense:
    scaled = nn.initializers.normal(width**-0.5)
    return nn.Dense(features, use_bias=False, kernel_init=scaled, name=name, **dtypes)
