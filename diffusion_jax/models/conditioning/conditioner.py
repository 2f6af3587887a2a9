"""From a batch to a Conditioning: embedders, their dropout for guidance, merging by rank."""

from collections.abc import Callable, Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from diffusion_jax.models.conditioning.windows import (
    encode_windows,
    first_window,
    null_tokens,
    token_shape,
)
from diffusion_jax.models.layers.low_rank import heeding
from diffusion_jax.randomness import fold_in_all
from diffusion_jax.types import Batch, Conditioning, Keys, PyTree

# Rank of an embedder's output -> where it enters the network (generative-models,
# GeneralConditioner).
ENTRY_OF_RANK = {1: "vector", 2: "vector", 3: "crossattn", 4: "concat", 5: "concat"}
FEATURE_AXIS = -1
# Tokens and a pooled vector are the most that an encoder gives.
_MAX_OUTPUTS = 2
_CACHED = "cached/{name}/{number}"


class Text(NamedTuple):
    """How the host turns the strings of batch[source] into the tokens that an embedder reads.

    pad: what follows the end token, "eos" (OpenAI's CLIP) or "zero" (OpenCLIP). vocabulary: a file
    instead of the installed one. windows: how many times max_length tokens a text has. weighted:
    whether brackets weigh words, see data.prompt_weights.
    """

    source: str = "caption"
    pad: Literal["eos", "zero"] = "eos"
    max_length: int = 77
    vocabulary: str | None = None
    windows: int = 1
    weighted: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the tokens of one text."""
        return token_shape(self.max_length, self.windows, weighted=self.weighted)

    @property
    def tokens_key(self) -> str:
        """Name of the tokens in a batch; embedders that share it share the tokens."""
        windows = "" if self.windows == 1 else f"x{self.windows}"
        weights = "_weighted" if self.weighted else ""
        return f"{self.source}_tokens_{self.pad}{self.max_length}{windows}{weights}"


class Embedder(NamedTuple):
    """One source of conditioning: batch[input_key] -> module -> arrays; their rank is their place.

    With probability ucg_rate a training sample loses it: its input becomes null_value, or, when
    null_value is None, each of its outputs becomes zero on a draw of its own (classifier-free
    guidance, Ho & Salimans 2022, algorithm 1; generative-models, GeneralConditioner). Embedders of
    one ucg_group share the draw: one loses its input where the draw is at least ucg_from and below
    ucg_from + ucg_rate. So with equal ucg_from they lose theirs together, and with others some
    samples lose one, some both, some none (Brooks et al. 2023, "InstructPix2Pix", section 3.2).

    A null_value that is a string is to be replaced by its tokens before use. The input of a sample
    has `shape` and `dtype`, or is an image of `channels`, `scale` times as high and wide as what is
    denoised. Labels have num_classes; `text` says how tokens are made from strings. default: what a
    user who gives no such condition gets; "size" is
    the (height, width) of the image that is drawn. Only trainable parameters are trained.
    frames: how many images of `channels` the input has for a sample, [b frames h w c]; None for one
    image [b h w c]. staged: the input is given in pixels, and the module gets it at the size of
    what is denoised: "latents" are the mode of an image's latents times their scale factor, "mode"
    is without the factor, and "hole" is 1 minus the mask at the top left pixel of each cell.
    entry: where the first output enters, whatever its rank. made_of_image: images
    of a batch on the host, float32 [b h w c] in [-1, 1], -> the input, where the batch has none.
    """

    module: nn.Module
    input_key: str
    ucg_rate: float = 0.0
    null_value: int | str | np.ndarray | None = None
    num_classes: int | None = None
    channels: int | None = None
    shape: tuple[int, ...] = ()
    dtype: str = "int32"
    text: Text | None = None
    default: tuple[float, ...] | Literal["size"] | None = None
    trainable: bool = True
    ucg_group: str | None = None
    ucg_from: float = 0.0
    weights: str | None = None
    scale: float = 1.0
    frames: int | None = None
    entry: str | None = None
    staged: Literal["latents", "mode", "hole"] | None = None
    made_of_image: Callable[[np.ndarray], np.ndarray] | None = None

    @property
    def embeds_labels_in_network(self) -> bool:
        """Whether integer labels pass through to the network's own label embedding."""
        return self.num_classes is not None and isinstance(self.module, Identity)

    @property
    def is_numbers(self) -> bool:
        """Whether the input is numbers, neither an image nor tokens or labels."""
        return self.dtype == "float32" and self.channels is None

    def is_of_frames(self, num_frames: int | None) -> bool:
        """Whether the input has numbers for each frame of clips of so many."""
        return self.is_numbers and self.shape[:-1] == (num_frames,)

    def example(self, size: int, image_shape: tuple[int, int, int]) -> Array:
        """Zeros of the shape and dtype of the input of `size` samples."""
        if self.channels is not None:
            sides = [round(side * self.scale) for side in image_shape[:2]]
            frames = () if self.frames is None else (self.frames,)
            return jnp.zeros((size, *frames, *sides, self.channels))
        return jnp.zeros((size, *self.shape), self.dtype)


class Identity(nn.Module):
    """Pass the input through: labels that the network embeds itself, images, features."""

    @nn.compact
    def __call__(self, value: Array) -> Array:
        return value


def init_embedders(
    embedders: Mapping[str, Embedder], batch: Batch, key: Array, *, trainable: bool
) -> PyTree:
    """Initialise the parameters of the embedders that are trained, or of those that are not.

    Returns {name: params}; embedders without parameters have no entry.
    """
    params = {}
    for index, (name, embedder) in enumerate(embedders.items()):
        if embedder.trainable != trainable:
            continue
        value = _input(batch, name, embedder)
        value = value if embedder.text is None else first_window(value)
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
    kept: Collection[str] = (),
    force_zero: Collection[str] = (),
    null_outputs: Mapping[str, Array] = MappingProxyType({}),
) -> Conditioning:
    """Compute the Conditioning of a batch: outputs of equal rank, joined on the feature axis.

    keys [b], one per sample, turn on training dropout (each embedder drops a sample with its own
    ucg_rate); keys=None keeps everything. unconditional=True is the other half of guidance: all
    that training may drop is dropped, but for the embedders named in `kept`, whose input says what
    to guide away from (a negative prompt). force_zero: embedders whose outputs are zero.
    Outputs that the batch holds, under cached_outputs' names, are taken instead of being computed;
    null_outputs then has, under the same names, what stands for a dropped sample [...].
    Raises ValueError when the batch lacks an input or when outputs that meet in one entry cannot
    be joined.
    Source: generative-models, GeneralConditioner.
    """
    entries: dict[str, list[Array]] = {}
    chances = {} if keys is None or unconditional else _chances(embedders, keys)
    for name, embedder in embedders.items():
        cached = {} if unconditional else cached_outputs(batch, name)
        own = params[name] if name in params else {}
        chance = chances[name] if name in chances else None
        if cached:
            outputs = _cached_or_null(embedder, cached, null_outputs, chance)
        elif unconditional:
            drop = embedder.ucg_rate > 0.0 and name not in kept
            value = _input(batch, name, embedder)
            value = _replaced(embedder, value, jnp.full(len(value), drop))
            outputs = [
                _zeroed(out, drop and embedder.null_value is None)
                for out in outputs_of(embedder, own, value)
            ]
        else:
            outputs = _computed_or_null(embedder, own, _input(batch, name, embedder), chance)
        for number, output in enumerate(outputs):
            output = _zeroed(output, name in force_zero)
            named = embedder.entry if number == 0 else None
            entries.setdefault(named or ENTRY_OF_RANK[output.ndim], []).append(output)
    return {entry: _join(entry, outputs) for entry, outputs in entries.items()}


def cached_outputs(batch: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Find the outputs of an embedder that a batch holds: "cached/name/0", "cached/name/1"."""
    keys = (_CACHED.format(name=name, number=number) for number in range(_MAX_OUTPUTS))
    return {key: batch[key] for key in keys if key in batch}


def name_outputs(name: str, outputs: Sequence[Array]) -> dict[str, Array]:
    """Give the outputs of an embedder the names that cached_outputs looks for."""
    return {_CACHED.format(name=name, number=n): output for n, output in enumerate(outputs)}


def can_guide(embedders: Mapping[str, Embedder]) -> bool:
    """Whether training drops a condition, so that there is an unconditional prediction."""
    return any(embedder.ucg_rate > 0.0 for embedder in embedders.values())


def _input(batch: Batch, name: str, embedder: Embedder) -> Array:
    if embedder.input_key not in batch:
        raise ValueError(
            f"embedder {name!r} reads {embedder.input_key!r}, which the batch does not have; "
            f"it has {', '.join(sorted(batch))}"
        )
    return jnp.asarray(batch[embedder.input_key])


def _chances(embedders: Mapping[str, Embedder], keys: Keys) -> dict[str, Float[Array, "n b"]]:
    """Draw a uniform number for each output of each embedder, or one for all of a group."""
    groups: dict[str, Array] = {}
    chances = {}
    for index, (name, embedder) in enumerate(embedders.items()):
        if embedder.ucg_rate == 0.0:
            continue
        own_keys = fold_in_all(keys, index)
        if embedder.ucg_group is None:
            chances[name] = jax.vmap(lambda key: jax.random.uniform(key, (_MAX_OUTPUTS,)))(
                own_keys
            ).T
        else:
            if embedder.ucg_group not in groups:
                groups[embedder.ucg_group] = jax.vmap(jax.random.uniform)(own_keys)
            shared = groups[embedder.ucg_group]
            chances[name] = jnp.broadcast_to(shared, (_MAX_OUTPUTS, len(shared)))
    return chances


def _computed_or_null(
    embedder: Embedder, params: PyTree, value: Array, chances: Float[Array, "n b"] | None
) -> list[Array]:
    if chances is None:
        return outputs_of(embedder, params, value)
    dropped = _lost(embedder, chances)
    if embedder.null_value is not None:
        return outputs_of(embedder, params, _replaced(embedder, value, dropped[0]))
    return [
        output * (~drop).reshape((-1,) + (1,) * (output.ndim - 1)).astype(output.dtype)
        for output, drop in zip(outputs_of(embedder, params, value), dropped, strict=False)
    ]


def _lost(embedder: Embedder, chances: Array) -> Array:
    below = chances < embedder.ucg_from + embedder.ucg_rate
    return below if embedder.ucg_from == 0.0 else (chances >= embedder.ucg_from) & below


def _cached_or_null(
    embedder: Embedder,
    cached: Mapping[str, Array],
    null_outputs: Mapping[str, Array],
    chances: Float[Array, "n b"] | None,
) -> list[Array]:
    outputs = []
    for number, (key, output) in enumerate(cached.items()):
        null = null_outputs[key]
        output = jnp.asarray(output, null.dtype)
        if chances is not None:
            # One null input gives all outputs; without one, each is lost on its own.
            dropped = _lost(embedder, chances[number if embedder.null_value is None else 0])
            output = jnp.where(dropped.reshape((-1,) + (1,) * null.ndim), null[None], output)
        outputs.append(output)
    return outputs


def _replaced(embedder: Embedder, value: Array, dropped: Bool[Array, "b"]) -> Array:
    if embedder.null_value is None:
        return value
    null = jnp.asarray(embedder.null_value, value.dtype)
    null = null if embedder.text is None else null_tokens(null, value)
    null = jnp.broadcast_to(null, value.shape)
    return jnp.where(dropped.reshape((-1,) + (1,) * (value.ndim - 1)), null, value)


def outputs_of(embedder: Embedder, params: PyTree, value: Array) -> list[Array]:
    """Apply an embedder to its input [b ...]; one output or two, without any dropout.

    Texts may be in windows, and weighted, see the module of windows.
    """

    def apply(value: Array) -> Any:
        return embedder.module.apply({"params": params}, value)

    with heeding(params):
        outputs = apply(value) if embedder.text is None else encode_windows(apply, value)
    return list(outputs) if isinstance(outputs, tuple) else [outputs]


def _zeroed(output: Array, zero: bool) -> Array:
    return jnp.zeros_like(output) if zero else output


def _join(entry: str, outputs: list[Array]) -> Array:
    if len(outputs) == 1:
        return outputs[0]
    if any(output.ndim == 1 for output in outputs):
        raise ValueError(
            f"{len(outputs)} embedders meet in {entry!r} and one of them gives integer labels, "
            "which cannot be joined to features; use class_embedding with add_sequence_dim=False "
            "instead of class_label"
        )
    if entry == "vector":
        outputs = _for_each_frame(outputs)
    shapes = [output.shape[:FEATURE_AXIS] for output in outputs]
    if len(set(shapes)) != 1:
        raise ValueError(
            f"{len(outputs)} embedders meet in {entry!r} with the shapes "
            f"{', '.join(str(output.shape) for output in outputs)}; all but the last axis should "
            "be equal"
        )
    return jnp.concatenate(outputs, axis=FEATURE_AXIS)


def _for_each_frame(outputs: list[Array]) -> list[Array]:
    """Give each frame of a clip the vectors [b d] of the clip, where others are [b t d]."""
    frames = {output.shape[1] for output in outputs if output.ndim == 3}
    if len(frames) != 1:
        return outputs
    return [
        jnp.repeat(output[:, None], *frames, axis=1) if output.ndim == 2 else output
        for output in outputs
    ]
