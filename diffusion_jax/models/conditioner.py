"""From a batch to a Conditioning: embedders, their dropout for classifier-free guidance, merging
by rank."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from diffusion_jax.types import Batch, Conditioning, Keys, PyTree

# Rank of an embedder's output -> where it enters the network (generative-models,
# GeneralConditioner).
ENTRY_OF_RANK = {1: "vector", 2: "vector", 3: "crossattn", 4: "concat"}
FEATURE_AXIS = -1


class Embedder(NamedTuple):
    """One source of conditioning: batch[input_key] -> module -> an array whose rank says where it
    enters.

    With probability ucg_rate a training sample loses it: its input becomes null_value, or, when
    null_value is None, its embedding becomes zero (classifier-free guidance, Ho & Salimans 2022,
    algorithm 1). Labels have num_classes, images have channels.
    """

    module: nn.Module
    input_key: str
    ucg_rate: float = 0.0
    null_value: int | None = None
    num_classes: int | None = None
    channels: int | None = None

    @property
    def embeds_labels_in_network(self) -> bool:
        """Whether integer labels pass through to the network's own label embedding."""
        return self.num_classes is not None and isinstance(self.module, Identity)


class Identity(nn.Module):
    """Pass the input through: integer labels for the network's own label embedding, images to
    concatenate."""

    @nn.compact
    def __call__(self, value: Array) -> Array:
        return value


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
) -> Embedder:
    """Make a trained embedding of the label the context [b 1 d] (or a `vector` [b d]); row
    num_classes is null."""
    module = ClassEmbedder(num_classes + 1, embed_dim, add_sequence_dim)
    return Embedder(module, input_key, ucg_rate, num_classes, num_classes)


def concat_image(*, input_key: str, channels: int, ucg_rate: float = 0.0) -> Embedder:
    """Join batch[input_key] [b h w channels] to the network's input; dropped samples see zeros."""
    return Embedder(Identity(), input_key, ucg_rate, channels=channels)


class LowResolution(nn.Module):
    """Average blocks of factor x factor pixels, interpolate back: [b h w c] -> the same shape."""

    factor: int

    @nn.compact
    def __call__(self, image: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        blocks = (self.factor, self.factor)
        small = nn.avg_pool(image, blocks, strides=blocks)
        return jax.image.resize(small, image.shape, "cubic")


def low_resolution(
    *, factor: int, channels: int, ucg_rate: float = 0.0, input_key: str = "image"
) -> Embedder:
    """Join a copy of the image at 1 / factor of its resolution to the network's input: upscaling.

    The input is the image itself, float [b h w channels] in [-1, 1], in training and in sampling.
    Source: Saharia et al. 2021 (SR3), section 2; latent-diffusion, section 4.4.
    """
    return Embedder(LowResolution(factor), input_key, ucg_rate, channels=channels)


EMBEDDERS = {
    "class_label": class_label,
    "class_embedding": class_embedding,
    "concat_image": concat_image,
    "low_resolution": low_resolution,
}


def init_embedders(embedders: Mapping[str, Embedder], batch: Batch, key: Array) -> PyTree:
    """Initialise every embedder's parameters: {name: params}; embedders without parameters have no
    entry."""
    params = {}
    for index, (name, embedder) in enumerate(embedders.items()):
        value = _input(batch, name, embedder)
        variables = embedder.module.init(jax.random.fold_in(key, index), value)
        if "params" in variables:
            params[name] = variables["params"]
    return params


def embed(
    embedders: Mapping[str, Embedder],
    params: PyTree,
    batch: Batch,
    keys: Keys | None = None,
    *,
    unconditional: bool = False,
) -> Conditioning:
    """Compute the Conditioning of a batch: every embedder's output, joined on the feature axis by
    its rank.

    keys [b], one per sample, turn on training dropout (each embedder drops a sample with its own
    ucg_rate); keys=None keeps everything. unconditional=True drops everything: the other half of
    guidance.
    Raises ValueError when the batch lacks an input or when outputs that meet in one entry cannot
    be joined.
    Source: generative-models, GeneralConditioner.
    """
    entries: dict[str, list[Array]] = {}
    for index, (name, embedder) in enumerate(embedders.items()):
        value = _input(batch, name, embedder)
        dropped = _dropped(embedder, index, value.shape[0], keys, unconditional)
        output = _embed_one(embedder, params[name] if name in params else {}, value, dropped)
        entries.setdefault(ENTRY_OF_RANK[output.ndim], []).append(output)
    return {entry: _join(entry, outputs) for entry, outputs in entries.items()}


def _input(batch: Batch, name: str, embedder: Embedder) -> Array:
    if embedder.input_key not in batch:
        raise ValueError(
            f"embedder {name!r} reads {embedder.input_key!r}, which the batch does not have; "
            f"it has {', '.join(sorted(batch))}"
        )
    return jnp.asarray(batch[embedder.input_key])


def _dropped(
    embedder: Embedder, index: int, size: int, keys: Keys | None, unconditional: bool
) -> Bool[Array, "b"] | None:
    if unconditional:
        return jnp.ones((size,), bool)
    if keys is None or embedder.ucg_rate == 0.0:
        return None
    own_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, index)
    return jax.vmap(lambda key: jax.random.bernoulli(key, embedder.ucg_rate))(own_keys)


def _embed_one(
    embedder: Embedder, params: PyTree, value: Array, dropped: Bool[Array, "b"] | None
) -> Array:
    if dropped is not None and embedder.null_value is not None:
        value = jnp.where(dropped, jnp.asarray(embedder.null_value, value.dtype), value)
    output = jnp.asarray(embedder.module.apply({"params": params}, value))
    if dropped is not None and embedder.null_value is None:
        keep = ~dropped.reshape((-1,) + (1,) * (output.ndim - 1))
        output = output * keep.astype(output.dtype)
    return output


def _join(entry: str, outputs: list[Array]) -> Array:
    if len(outputs) == 1:
        return outputs[0]
    if any(output.ndim == 1 for output in outputs):
        raise ValueError(
            f"{len(outputs)} embedders meet in {entry!r} and one of them gives integer labels, "
            "which cannot be joined to features; use class_embedding with add_sequence_dim=False "
            "instead of class_label"
        )
    return jnp.concatenate(outputs, axis=FEATURE_AXIS)
