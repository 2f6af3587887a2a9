"""What a network can be conditioned on: a table of factories, each makes an Embedder."""

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num

from diffusion_jax.models.conditioning.clip import ClipTextTower, text_tower, vision_tower
from diffusion_jax.models.conditioning.conditioner import Embedder, Identity, Text
from diffusion_jax.models.conditioning.spatial_inputs import (
    concat_image,
    image_latents,
    inpainting_mask,
    low_resolution,
)
from diffusion_jax.models.conditioning.spatial_rescaler import SpatialRescaler
from diffusion_jax.models.conditioning.text_embedders import (
    ClipText,
    OpenClipImage,
    OpenClipText,
    TransformerText,
)
from diffusion_jax.models.conditioning.video_embedders import EncodedFrames
from diffusion_jax.models.first_stage.autoencoder import Autoencoder
from diffusion_jax.models.layers.basic import timestep_embedding


class ClassEmbedder(nn.Module):
    """A table with a vector for each class label.

    Source: latent-diffusion and generative-models, ClassEmbedder.
    """

    num_embeddings: int
    embed_dim: int
    add_sequence_dim: bool = False
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, label: Int[Array, "b"]) -> Float[Array, "b *rest"]:
        """Embed labels in [0, num_embeddings): [b] -> [b d], or with add_sequence_dim [b 1 d]."""
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
    """Sinusoids of several numbers, joined.

    Source: generative-models, ConcatTimestepEmbedderND.
    """

    outdim: int = 256

    @nn.compact
    def __call__(self, numbers: Num[Array, "b *t d"]) -> Float[Array, "b *t e"]:
        """Embed each of d numbers like a timestep: [b d] -> [b d * outdim], float32.

        Numbers of frames [b t d] give [b t d * outdim].
        """
        embedded = timestep_embedding(numbers.reshape(-1), self.outdim)
        return embedded.reshape(*numbers.shape[:-1], numbers.shape[-1] * self.outdim)


def spread(**records: Any) -> Callable[[Callable[..., Embedder]], Callable[..., Embedder]]:
    """Let a factory take the fields of records as keywords of its own, in place of the records.

    records: argument -> the record with its defaults. The signature shows every keyword, so that a
    config can be checked against it.
    """

    def decorate(make: Callable[..., Embedder]) -> Callable[..., Embedder]:
        @functools.wraps(make)
        def factory(**keywords: Any) -> Embedder:
            given = {
                argument: record._replace(
                    **{name: keywords.pop(name) for name in record._fields if name in keywords}
                )
                for argument, record in records.items()
            }
            return make(**keywords, **given)

        own = [p for name, p in inspect.signature(make).parameters.items() if name not in records]
        fields = [
            p.replace(kind=p.KEYWORD_ONLY, default=getattr(record, p.name))
            for record in records.values()
            for p in inspect.signature(type(record)).parameters.values()
        ]
        signature = inspect.Signature([*own, *fields], return_annotation=Embedder)
        factory.__signature__ = signature  # pyright: ignore[reportAttributeAccessIssue]
        return factory

    return decorate


def class_label(*, num_classes: int, ucg_rate: float = 0.0, input_key: str = "label") -> Embedder:
    """Make integer labels the `vector`, for networks that embed labels themselves.

    Their table has num_classes + 1 rows; the last is the null class of classifier-free guidance.
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
    """Make a trained embedding of the label the context [b 1 d], or a `vector` [b d].

    Row num_classes of its table is the null class of classifier-free guidance.
    """
    module = ClassEmbedder(num_classes + 1, embed_dim, add_sequence_dim)
    null, trained = num_classes, {"trainable": trainable, "weights": weights}
    return Embedder(module, input_key, ucg_rate, null, num_classes, **trained)


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
    frames: int | None = None,
    default: Sequence[int | float] | Literal["size"] | None = None,
    ucg_rate: float = 0.0,
) -> Embedder:
    """Embed `size` numbers of each sample as a `vector` [b size * outdim]: SDXL's sizes and crops.

    frames: the input has numbers for each frame of a clip, [b frames size], as SV3D has angles.
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
    shape = (size,) if frames is None else (frames, size)
    own = {"shape": shape, "dtype": "float32", "default": default, "entry": "vector"}
    return Embedder(ConcatTimestepEmbedder(outdim), input_key, ucg_rate, **own)


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
    """Join batch[input_key] [b h w channels], resized, to the network's input.

    It is multiplier ** -n_stages times as high and wide as what is denoised. n_stages, method,
    multiplier, out_channels, bias: see SpatialRescaler.
    Source: latent-diffusion, SpatialRescaler.
    """
    module = SpatialRescaler(n_stages, method, multiplier, channels, out_channels, bias)
    trained = {"trainable": trainable, "weights": weights}
    scale = multiplier**-n_stages
    return Embedder(module, input_key, ucg_rate, channels=channels, scale=scale, **trained)


class TextOptions(NamedTuple):
    """What every embedder of text can be given.

    input_key: the strings of a batch. max_length, vocabulary: of their tokens, see Text. windows:
    how many times max_length tokens a caption may have, shorter ones are filled up with empty text;
    a prompt may have more, or fewer. weighted: whether (word), [word] and (word:1.2) weigh words,
    see data.prompt_weights.
    legacy_ucg_value: the text that takes the place of a dropped one; None zeroes the outputs.
    remat, dtype, param_dtype: of the network, see ClipTextTower. trainable, weights: see Embedder.
    """

    input_key: str = "caption"
    max_length: int = 77
    vocabulary: str | None = None
    windows: int = 1
    weighted: bool = False
    ucg_rate: float = 0.0
    legacy_ucg_value: str | None = None
    ucg_group: str | None = None
    remat: bool | str = False
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    trainable: bool = False
    weights: str | None = None


class TowerSizes(NamedTuple):
    """What may be changed of a released CLIP tower (clip.TEXT_SIZES); None leaves it as it is."""

    width: int | None = None
    num_layers: int | None = None
    num_heads: int | None = None
    mlp_dim: int | None = None


class EncoderSizes(NamedTuple):
    """What may be changed of the encoder of kl-f8, see Autoencoder; None leaves it as it is."""

    ch: int | None = None
    ch_mult: Sequence[int] | None = None
    num_res_blocks: int | None = None
    attn_resolutions: Sequence[int] | None = None
    resolution: int | None = None
    in_channels: int | None = None
    z_channels: int | None = None
    attn_type: str | None = None
    num_groups: int | None = None
    use_quant_conv: bool | None = None


@spread(options=TextOptions(legacy_ucg_value="", trainable=True))
def transformer_text(
    *,
    vocab_size: int = 49408,
    width: int = 1280,
    num_layers: int = 32,
    num_heads: int = 8,
    head_dim: int = 64,
    options: TextOptions,
) -> Embedder:
    """Train a transformer over the tokens of the caption with the network: context [b l width].

    Source: latent-diffusion, BERTEmbedder.
    """
    sizes = (vocab_size, options.max_length, width, num_layers, num_heads, head_dim)
    dtypes = {"dtype": options.dtype, "param_dtype": options.param_dtype}
    module = TransformerText(*sizes, options.remat, **dtypes)
    return _text_embedder(module, "zero", options)


@spread(sizes=TowerSizes(), options=TextOptions())
def clip_text(
    *,
    tower: str = "ViT-L-14",
    layer: Literal["last", "pooled", "hidden"] = "last",
    layer_idx: int | None = None,
    always_return_pooled: bool = False,
    sizes: TowerSizes,
    options: TextOptions,
) -> Embedder:
    """Make the states of OpenAI's CLIP text encoder the context, with the pooled one a `vector`.

    tower: a row of clip.TEXT_SIZES. Source: generative-models, FrozenCLIPEmbedder.
    """
    module = ClipText(_text_tower(tower, sizes, options), layer, layer_idx, always_return_pooled)
    return _text_embedder(module, "eos", options)


@spread(sizes=TowerSizes(), options=TextOptions())
def open_clip_text(
    *,
    tower: str = "ViT-H-14",
    layer: Literal["last", "penultimate"] = "penultimate",
    legacy: bool = True,
    always_return_pooled: bool = False,
    projection_dim: int | None = None,
    sizes: TowerSizes,
    options: TextOptions,
) -> Embedder:
    """Make the states of an OpenCLIP text encoder the context, with the pooled one a `vector`.

    tower: a row of clip.TEXT_SIZES. Source: generative-models, FrozenOpenCLIPEmbedder (legacy) and
    FrozenOpenCLIPEmbedder2.
    """
    network = _text_tower(tower, sizes, options, projection_dim=projection_dim)
    module = OpenClipText(network, layer, legacy, always_return_pooled)
    return _text_embedder(module, "zero", options)


@spread(sizes=TowerSizes())
def open_clip_image(
    *,
    input_key: str = "image",
    tower: str = "ViT-H-14",
    projection_dim: int | None = None,
    antialias: bool = True,
    unsqueeze_dim: bool = False,
    output_tokens: bool = False,
    frames: int | None = None,
    dtype: Any = jnp.float32,
    param_dtype: Any = jnp.float32,
    ucg_rate: float = 0.0,
    ucg_group: str | None = None,
    ucg_from: float = 0.0,
    trainable: bool = False,
    weights: str | None = None,
    sizes: TowerSizes,
) -> Embedder:
    """Condition on an image through an OpenCLIP vision tower: a `vector` [b p].

    unsqueeze_dim makes it context [b 1 p]. frames: the input has so many images [b frames h w 3],
    which become the context [b frames p]. tower: a row of clip.VISION_SIZES.
    Source: generative-models, FrozenOpenCLIPImageEmbedder, FrozenOpenCLIPImagePredictionEmbedder.
    """
    changed = _changed(sizes, projection_dim=projection_dim)
    network = vision_tower(tower, dtype=dtype, param_dtype=param_dtype, **changed)
    module = OpenClipImage(network, antialias, unsqueeze_dim, output_tokens)
    own = {"channels": 3, "frames": frames, "trainable": trainable, "weights": weights}
    dropping = {"ucg_group": ucg_group, "ucg_from": ucg_from}
    return Embedder(module, input_key, ucg_rate, **own, **dropping)


@spread(sizes=EncoderSizes())
def encoded_frames(
    *,
    input_key: str = "cond_frames",
    frames: int | None = None,
    copies: int = 1,
    level_dim: int | None = None,
    entry: Literal["concat", "cond_view", "cond_motion"] = "concat",
    dtype: Any = jnp.float32,
    param_dtype: Any = jnp.float32,
    ucg_rate: float = 0.0,
    ucg_group: str | None = None,
    ucg_from: float = 0.0,
    trainable: bool = False,
    weights: str | None = None,
    sizes: EncoderSizes,
) -> Embedder:
    """Join the latent of a frame, encoded by an encoder of its own, to the network's input.

    frames: the input has so many images [b frames h w 3] instead of one. copies, level_dim: see
    EncodedFrames. entry: where the latents enter.
    Source: generative-models, VideoPredictionEmbedderWithEncoder.
    """
    if copies > 1 and frames is None:
        raise ValueError(f"copies = {copies} should be 1 where frames = None")
    changed = _changed(sizes)
    width = {"embed_dim": changed["z_channels"]} if "z_channels" in changed else {}
    network = Autoencoder(**changed, **width, dtype=dtype, param_dtype=param_dtype)
    module = EncodedFrames(network, copies, level_dim)
    return Embedder(
        module,
        input_key,
        ucg_rate,
        channels=network.in_channels,
        scale=float(2 ** (len(network.ch_mult) - 1)),
        frames=frames,
        entry=entry,
        ucg_group=ucg_group,
        ucg_from=ucg_from,
        trainable=trainable,
        weights=weights,
    )


def _text_tower(name: str, sizes: TowerSizes, options: TextOptions, **more: Any) -> ClipTextTower:
    return text_tower(
        name,
        max_length=options.max_length,
        remat=options.remat,
        dtype=options.dtype,
        param_dtype=options.param_dtype,
        **_changed(sizes, **more),
    )


def _changed(sizes: TowerSizes | EncoderSizes, **more: Any) -> dict[str, Any]:
    sizes_given = sizes._asdict() | more
    return {name: value for name, value in sizes_given.items() if value is not None}


def _text_embedder(
    module: nn.Module, pad: Literal["eos", "zero"], options: TextOptions
) -> Embedder:
    lengths = (options.max_length, options.vocabulary, options.windows, options.weighted)
    text = Text(options.input_key, pad, *lengths)
    return Embedder(
        module,
        text.tokens_key,
        options.ucg_rate,
        options.legacy_ucg_value,
        shape=text.shape,
        dtype="float32" if text.weighted else "int32",
        text=text,
        trainable=options.trainable,
        ucg_group=options.ucg_group,
        weights=options.weights,
    )


EMBEDDERS = {
    "class_embedding": class_embedding,
    "class_label": class_label,
    "clip_text": clip_text,
    "concat_image": concat_image,
    "encoded_frames": encoded_frames,
    "features": features,
    "image_latents": image_latents,
    "inpainting_mask": inpainting_mask,
    "low_resolution": low_resolution,
    "numbers": numbers,
    "open_clip_image": open_clip_image,
    "open_clip_text": open_clip_text,
    "spatial_rescaler": spatial_rescaler,
    "transformer_text": transformer_text,
}
