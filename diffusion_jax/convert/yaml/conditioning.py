"""Text encoders, labels and sizes of a YAML config -> the section `conditioning`."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from diffusion_jax.convert.yaml.reading import NUMBER, Node
from diffusion_jax.convert.yaml.rows import convert_class
from diffusion_jax.convert.yaml.tables import (
    CONDITIONING_KEYS,
    EMBEDDERS,
    INPUTS,
    NO_DOWNLOAD,
    NUMBERS,
)
from diffusion_jax.convert.yaml.video_tables import FRAME_NUMBERS

TEXTS = ("clip_text", "open_clip_text", "transformer_text")
_NAMES = {
    "clip_text": "clip",
    "open_clip_text": "open_clip",
    "transformer_text": "text",
    "class_embedding": "label",
    "open_clip_image": "open_clip_image",
}
_DEFAULT_INPUTS = {**dict.fromkeys(TEXTS, "caption"), "class_embedding": "label"}
FROZEN_ALL_THE_SAME = (
    "frozen there all the same (freeze is True); set conditioning.embedders.{name}.trainable "
    "to train it"
)


class Use(NamedTuple):
    """How an embedder is used: its input, whether it is trained, and what training drops of it.

    ucg_rate: None where the YAML does not say. at: the node and the key that say whether the
    embedder is trained.
    """

    input_key: str
    trainable: bool
    ucg_rate: float | None
    null_value: Any
    at: tuple[Node, str]
    is_ldm: bool


class ConvertedEmbedder(NamedTuple):
    """An embedder as we have it: its name, its section and the entries that it gives."""

    name: str
    section: dict[str, Any]
    entries: tuple[str, ...]


Embedders = Sequence[ConvertedEmbedder]


def convert_embedder(
    node: Node, use: Use, num_frames: int | None = None
) -> list[ConvertedEmbedder]:
    """Convert {target, params} of an embedder; nothing, with a note, for one that we lack.

    num_frames: of the clips that a model of videos has, some of whose numbers are for each frame.
    """
    section = convert_class(node, EMBEDDERS, "embedder")
    if section is None:
        return []
    params, kind = node.child("params"), section["name"]
    input_key = INPUTS[use.input_key] if use.input_key in INPUTS else use.input_key
    name = _NAMES[kind] if kind in _NAMES else re.sub(r"\W", "_", input_key)
    if kind == "numbers":
        if use.trainable:
            use.at[0].note(use.at[1], "there is nothing to train")
        section = _numbers(node, section, use, num_frames)
        name = section["input_key"]
    elif kind not in _DEFAULT_INPUTS or _DEFAULT_INPUTS[kind] != input_key:
        section["input_key"] = input_key
    if kind == "class_embedding":
        section |= _classes(params, use)
    elif use.ucg_rate is not None:
        section["ucg_rate"] = use.ucg_rate
        if kind in TEXTS and use.null_value is not None:
            section["legacy_ucg_value"] = use.null_value
    if kind in ("clip_text", "open_clip_text", "open_clip_image"):
        section = _tower(params, name, section, use)
    elif kind != "numbers" and not use.trainable:
        section |= {"trainable": False, "weights": "random"}
    return [ConvertedEmbedder(name, section, _entries(section))]


def conditioning_section(found: Embedders) -> dict[str, Any]:
    """Join embedders, in their order, to the section `conditioning`.

    Raises ValueError for a set of entries that no conditioning key has.
    """
    entries = frozenset(entry for one in found for entry in one.entries)
    if entries not in CONDITIONING_KEYS:
        raise ValueError(
            f"the embedders give {' and '.join(sorted(entries))}; no conditioning key takes these"
        )
    embedders: dict[str, Any] = {}
    for one in found:
        number = sum(name.split("__")[0] == one.name for name in embedders) + 1
        embedders[one.name if number == 1 else f"{one.name}__{number}"] = one.section
    section: dict[str, Any] = {"key": CONDITIONING_KEYS[entries]}
    if list(embedders) != sorted(embedders):
        section["order"] = tuple(embedders)  # a config has no order of its own
    return section | ({"embedders": embedders} if embedders else {})


def choose_dropout(node: Node, found: Embedders, *, is_ldm: bool) -> Embedders:
    """Drop captions in training as the released models do, where the YAML does not say.

    Without dropout there is no unconditional prediction to guide away from. Two encoders see zeros
    for a dropped caption (SDXL), one the empty caption (SD 1 and 2, the refiner), as upstream's
    sampling of these models assumes.
    """
    texts = [one for one in found if one.section["name"] in TEXTS]
    if not texts or any("ucg_rate" in one.section for one in found):
        return found
    rate, what = {"ucg_rate": 0.1, "legacy_ucg_value": ""}, "the empty one"
    if len(texts) > 1 and not is_ldm:
        rate = {"ucg_rate": 0.1, "ucg_group": "caption"}
        what = "zeros, in both encoders together"
    node.chosen.append(f"a tenth of the captions is dropped in training, for {what}")
    return [
        one._replace(section=insert(one.section, rate)) if one in texts else one for one in found
    ]


def is_guidable(found: Embedders) -> bool:
    """Whether training drops a condition, so that there is something to guide away from."""
    return any("ucg_rate" in one.section and one.section["ucg_rate"] > 0 for one in found)


def has_captions(found: Embedders) -> bool:
    """Whether an embedder reads captions."""
    return any(one.section["name"] in TEXTS for one in found)


def insert(section: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """Add options to a section before `trainable` and `weights`, which stand at its end."""
    last = {key: section[key] for key in ("trainable", "weights") if key in section}
    return {key: value for key, value in section.items() if key not in last} | dict(more) | last


def _numbers(
    node: Node, section: dict[str, Any], use: Use, num_frames: int | None
) -> dict[str, Any]:
    if use.input_key in FRAME_NUMBERS:
        default = FRAME_NUMBERS[use.input_key]
        own = {"frames": num_frames} if default is None else {"default": default}
        return {"name": "numbers", "input_key": use.input_key, "size": 1} | section | own
    if use.input_key not in NUMBERS:
        node.note("input_key", "the YAML does not say how many numbers it has: set `size`, here 1")
        return {"name": "numbers", "input_key": use.input_key, "size": 1} | section
    input_key, size, default = NUMBERS[use.input_key]
    own = {"name": "numbers", "input_key": input_key} | ({} if size == 2 else {"size": size})
    return own | section | {"default": default}


def _classes(params: Node, use: Use) -> dict[str, Any]:
    """Read the classes; one row of our table is the null class, perhaps the last one of theirs."""
    rows = params.take("n_classes", 1000, int)
    rate = params.take("ucg_rate", use.ucg_rate, NUMBER)
    has_null = use.null_value == rows - 1 or (use.is_ldm and rows % 10 == 1)
    found: dict[str, Any] = {
        "num_classes": rows - 1 if has_null else rows,
        "add_sequence_dim": True if use.is_ldm else params.take("add_sequence_dim", False),
    }
    if not has_null:
        params.note(
            "n_classes",
            f"{rows} classes become {rows + 1} rows: the last one is what a dropped label is, "
            "in the place of zeros",
        )
    elif rate is None:
        rate = 0.1
    return found | ({} if rate is None else {"ucg_rate": rate})


def _tower(params: Node, name: str, section: Mapping[str, Any], use: Use) -> dict[str, Any]:
    """Say which tower of CLIP it is, and that its weights come from a file."""
    found: dict[str, Any] = dict(section)
    freeze = params.take("freeze", True)
    if section["name"] == "clip_text":
        found = {"name": "clip_text", "tower": "ViT-L-14", **found}
    params.note("version", NO_DOWNLOAD.format(section=f"conditioning.embedders.{name}"))
    if use.trainable and not freeze:
        found["trainable"] = True
    elif not freeze:
        params.note("freeze", "it is frozen, since it is not said to be trained")
    elif use.trainable:
        node, key = use.at
        node.note(key, FROZEN_ALL_THE_SAME.format(name=name))
    return found | {"weights": None}


def _entries(section: Mapping[str, Any]) -> tuple[str, ...]:
    kind = section["name"]
    is_on = {key for key, value in section.items() if value}
    if kind in TEXTS:
        return ("crossattn", "vector") if "always_return_pooled" in is_on else ("crossattn",)
    if kind in ("class_embedding", "open_clip_image"):
        is_context = is_on & {"add_sequence_dim", "unsqueeze_dim"}
        return ("crossattn",) if is_context else ("vector",)
    return ("concat",) if kind == "spatial_rescaler" else ("vector",)
