"""What a network can be conditioned on: one factory of an Embedder for each row of the table."""

from collections.abc import Sequence
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float, Int, Num

from diffusion_jax.models.conditioning.clip import text_tower, vision_tower
from diffusion_jax.models.conditioning.conditioner import Embedder, Identity, Text
from diffusion_jax.models.conditioning.spatial_rescaler import SpatialRescaler
from diffusion_jax.models.conditioning.text_embedders import (
    ClipText,
    OpenClipImage,
    OpenClipText,
    TransformerText,
)
from diffusion_jax.models.layers.basic import timestep_embedding


class ClassEmbedder(nn.Module):
    """Embed class labels: int [b] -> [b d], or [b 1 d] to serve as context.

    Labels are int32 in [0, num_embeddings). Source: latent-diffusion and generative-models,
    ClassEmbedder.
    """

    num_embeddings: int
    embed_dim: int
    add_sequence_dim: bool = False
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, label: Int[Array, "b"]) -> Float[Array, "b *rest"]:
        normal = nn.initializers.normal(1.0)  # torch.nn.Embedding's default
        table = nn.Embed(
            self.num_embeddings,
            self.embed_dim,
            embedding_init=normal,
            param_dtype=self.param_dtype,
            name="embedding",
        )
        embedded = table(label)
        return embedded[:, None, :] if self.add_sequence_dim else embedded


class ConcatTimestepEmbedder(nn.Module):
    """Embed each of d numbers like a timestep and join them: [b d] -> [b d * outdim], float32.

    Source: generative-models, ConcatTimestepEmbedderND.
    """

    outdim: int = 256

    @nn.compact
    def __call__(self, numbers: Num[Array, "b d"]) -> Float[Array, "b e"]:
        embedded = timestep_embedding(rearrange(numbers, "b d -> (b d)"), self.outdim)
        return rearrange(embedded, "(b d) e -> b (d e)", d=numbers.shape[1])


class LowResolution(nn.Module):
    """Average blocks of factor x factor pixels, interpolate back: [b h w c] -> the same shape."""

    factor: int

    @nn.compact
    def __call__(self, image: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        blocks = (self.factor, self.factor)
        small = nn.avg_pool(image, blocks, strides=blocks)
        return jax.image.resize(small, image.shape, "cubic")


def class_label(*, num_classes: int, ucg_rate: float = 0.0, input_key: str = "label") -> Embedder:
    """Make integer labels the `vector`: for networks that embed labels themselves (num_classes + 1
    rows).

    The extra row, number num_classes, is the null class of classifier-free guidance.
    """
    return Embedder(Identity(), input_key, ucg_rate, num_classes, num_classes)


def class_embedding(
    *,
    num_classes: int,
    embed_dim: int,
    add_sequence_dim: bool = True,
    ucg_rate: float = 0.0,
    input_key: str = "label",
    trainable: bool = True,
    weights: str | None = None,
) -> Embedder:
    """Make a trained embedding of the label the context [b 1 d] (or a `vector` [b d]); row
    num_classes is null."""
    module = ClassEmbedder(num_classes + 1, embed_dim, add_sequence_dim)
    return Embedder(
        module,
        input_key,
        ucg_rate,
        num_classes,
        num_classes,
        trainable=trainable,
        weights=weights,
    )


def concat_image(*, input_key: str, channels: int, ucg_rate: float = 0.0) -> Embedder:
    """Join batch[input_key] [b h w channels] to the network's input; dropped samples see zeros."""
    return Embedder(Identity(), input_key, ucg_rate, channels=channels)


def low_resolution(
    *, factor: int, channels: int, ucg_rate: float = 0.0, input_key: str = "image"
) -> Embedder:
    """Join a copy of the image at 1 / factor of its resolution to the network's input: upscaling.

    The input is the image itself, float [b h w channels] in [-1, 1], in training and in sampling.
    Source: Saharia et al. 2021 (SR3), section 2; latent-diffusion, section 4.4.
    """
    return Embedder(LowResolution(factor), input_key, ucg_rate, channels=channels)


def features(
    *, input_key: str, shape: Sequence[int], ucg_rate: float = 0.0, dtype: str = "float32"
) -> Embedder:
    """Pass ready-made features through: batch[input_key] [b *shape]; their rank says where to.

    Source: generative-models, IdentityEncoder.
    """
    return Embedder(Identity(), input_key, ucg_rate, shape=tuple(shape), dtype=dtype)


def numbers(
    *,
    input_key: str,
    size: int = 2,
    outdim: int = 256,
    default: Sequence[int | float] | Literal["size"] | None = None,
    ucg_rate: float = 0.0,
) -> Embedder:
    """Embed `size` numbers of each sample as a `vector` [b size * outdim]: SDXL's sizes and crops.

    default: what sampling uses when nothing is given; "size" is the (height, width) drawn.
    Source: Podell et al. 2023, section 2.2.
    """
    if isinstance(default, Sequence) and not isinstance(default, str):
        default = tuple(float(number) for number in default)
        if len(default) != size:
            raise ValueError(
                f"default = {default} of {input_key!r} has {len(default)} numbers; it should have "
                f"size = {size}"
            )
    return Embedder(
        ConcatTimestepEmbedder(outdim),
        input_key,
        ucg_rate,
        shape=(size,),
        dtype="float32",
        default=default,
    )


def spatial_rescaler(
    *,
    input_key: str,
    channels: int,
    n_stages: int = 1,
    method: str = "bilinear",
    multiplier: float = 0.5,
    out_channels: int | None = None,
    bias: bool = False,
    ucg_rate: float = 0.0,
    trainable: bool = True,
    weights: str | None = None,
) -> Embedder:
    """Resize batch[input_key] [b h w channels] n_stages times by multiplier, then map its channels
    to out_channels if given; the result is concatenated. Source: latent-diffusion, SpatialRescaler.
    """
    module = SpatialRescaler(
        n_stages=n_stages,
        method=method,
        multiplier=multiplier,
        in_channels=channels,
        out_channels=out_channels,
        bias=bias,
    )
    return Embedder(
        module, input_key, ucg_rate, channels=channels, trainable=trainable, weights=weights
    )


def transformer_text(
    *,
    vocab_size: int = 49408,
    max_length: int = 77,
    width: int = 1280,
    num_layers: int = 32,
    num_heads: int = 8,
    head_dim: int = 64,
    remat: bool | str = False,
    dtype: Any = jnp.float32,
    param_dtype: Any = jnp.float32,
    input_key: str = "caption",
    vocabulary: str | None = None,
    ucg_rate: float = 0.0,
    legacy_ucg_value: str | None = "",
    ucg_group: str | None = None,
    trainable: bool = True,
    weights: str | None = None,
) -> Embedder:
    """Train a transformer over the tokens of the caption with the network: context [b l width].

    A dropped caption becomes legacy_ucg_value, by default the empty text; None zeroes the context.
    Source: latent-diffusion, BERTEmbedder.
    """
    module = TransformerText(
        vocab_size=vocab_size,
        max_length=max_length,
        width=width,
        num_layers=num_layers,
        num_heads=num_heads,
        head_dim=head_dim,
        remat=remat,
        dtype=dtype,
        param_dtype=param_dtype,
    )
    return _text_embedder(
        module,
        Text(input_key, "zero", max_length, vocabulary),
        ucg_rate=ucg_rate,
        null_value=legacy_ucg_value,
        ucg_group=ucg_group,
        trainable=trainable,
        weights=weights,
    )


def clip_text(
    *,
    tower: str = "ViT-L-14",
    layer: Literal["last", "pooled", "hidden"] = "last",
    layer_idx: int | None = None,
    always_return_pooled: bool = False,
    width: int | None = None,
    num_layers: int | None = None,
    num_heads: int | None = None,
    mlp_dim: int | None = None,
    remat: bool | str = False,
    dtype: Any = jnp.float32,
    param_dtype: Any = jnp.float32,
    input_key: str = "caption",
    max_length: int = 77,
    vocabulary: str | None = None,
    ucg_rate: float = 0.0,
    legacy_ucg_value: str | None = None,
    ucg_group: str | None = None,
    trainable: bool = False,
    weights: str | None = None,
) -> Embedder:
    """Make the states of OpenAI's CLIP text encoder the context, with the pooled one a `vector`.

    tower and what may be changed of it: see models.clip. Frozen unless trainable; weights is a
    file, "random" for a dry run, or None for those of the checkpoint that is loaded. Source:
    generative-models, FrozenCLIPEmbedder.
    """
    sizes = _given(width=width, num_layers=num_layers, num_heads=num_heads, mlp_dim=mlp_dim)
    module = ClipText(
        text_tower(
            tower,
            max_length=max_length,
            remat=remat,
            dtype=dtype,
            param_dtype=param_dtype,
            **sizes,
        ),
        layer=layer,
        layer_idx=layer_idx,
        always_return_pooled=always_return_pooled,
    )
    return _text_embedder(
        module,
        Text(input_key, "eos", max_length, vocabulary),
        ucg_rate=ucg_rate,
        null_value=legacy_ucg_value,
        ucg_group=ucg_group,
        trainable=trainable,
        weights=weights,
    )


def open_clip_text(
    *,
    tower: str = "ViT-H-14",
    layer: Literal["last", "penultimate"] = "penultimate",
    legacy: bool = True,
    always_return_pooled: bool = False,
    width: int | None = None,
    num_layers: int | None = None,
    num_heads: int | None = None,
    mlp_dim: int | None = None,
    projection_dim: int | None = None,
    remat: bool | str = False,
    dtype: Any = jnp.float32,
    param_dtype: Any = jnp.float32,
    input_key: str = "caption",
    max_length: int = 77,
    vocabulary: str | None = None,
    ucg_rate: float = 0.0,
    legacy_ucg_value: str | None = None,
    ucg_group: str | None = None,
    trainable: bool = False,
    weights: str | None = None,
) -> Embedder:
    """Make the states of an OpenCLIP text encoder the context, with the pooled one a `vector`.

    Options as in clip_text. Source: generative-models, FrozenOpenCLIPEmbedder (legacy) and
    FrozenOpenCLIPEmbedder2.
    """
    sizes = _given(
        width=width,
        num_layers=num_layers,
        num_heads=num_heads,
        mlp_dim=mlp_dim,
        projection_dim=projection_dim,
    )
    module = OpenClipText(
        text_tower(
            tower,
            max_length=max_length,
            remat=remat,
            dtype=dtype,
            param_dtype=param_dtype,
            **sizes,
        ),
        layer=layer,
        legacy=legacy,
        always_return_pooled=always_return_pooled,
    )
    return _text_embedder(
        module,
        Text(input_key, "zero", max_length, vocabulary),
        ucg_rate=ucg_rate,
        null_value=legacy_ucg_value,
        ucg_group=ucg_group,
        trainable=trainable,
        weights=weights,
    )


def open_clip_image(
    *,
    input_key: str = "image",
    tower: str = "ViT-H-14",
    width: int | None = None,
    num_layers: int | None = None,
    num_heads: int | None = None,
    mlp_dim: int | None = None,
    projection_dim: int | None = None,
    antialias: bool = True,
    unsqueeze_dim: bool = False,
    output_tokens: bool = False,
    dtype: Any = jnp.float32,
    param_dtype: Any = jnp.float32,
    ucg_rate: float = 0.0,
    trainable: bool = False,
    weights: str | None = None,
) -> Embedder:
    """Condition on an image through an OpenCLIP vision tower: `vector`, or with unsqueeze_dim
    context. Source: generative-models, FrozenOpenCLIPImageEmbedder."""
    sizes = _given(
        width=width,
        num_layers=num_layers,
        num_heads=num_heads,
        mlp_dim=mlp_dim,
        projection_dim=projection_dim,
    )
    module = OpenClipImage(
        vision_tower(tower, dtype=dtype, param_dtype=param_dtype, **sizes),
        antialias=antialias,
        unsqueeze_dim=unsqueeze_dim,
        output_tokens=output_tokens,
    )
    return Embedder(module, input_key, ucg_rate, channels=3, trainable=trainable, weights=weights)


def _given(**options: Any) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _text_embedder(module: nn.Module, text: Text, **fields: Any) -> Embedder:
    return Embedder(module, text.tokens_key, shape=(text.max_length,), text=text, **fields)


EMBEDDERS = {
    "class_embedding": class_embedding,
    "class_label": class_label,
    "clip_text": clip_text,
    "concat_image": concat_image,
    "features": features,
    "low_resolution": low_resolution,
    "numbers": numbers,
    "open_clip_image": open_clip_image,
    "open_clip_text": open_clip_text,
    "spatial_rescaler": spatial_rescaler,
    "transformer_text": transformer_text,
}
