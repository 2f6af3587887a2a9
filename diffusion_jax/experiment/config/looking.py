"""What a user's own data hold, found out before a config is built for them."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_collections

from diffusion_jax.data.sources.folder_content import find_root, say_once
from diffusion_jax.data.sources.folder_scan import IMAGES, scan
from diffusion_jax.data.sources.parquet_folder import make_format
from diffusion_jax.data.sources.shard_folder import scan_shards
from diffusion_jax.data.sources.tar_folder import FORMAT
from diffusion_jax.data.sources.video_folder import KINDS
from diffusion_jax.wording import counted

# How much of the split "train" is held out for a split that a data set lacks, in percent.
_HELD_OUT = 5
_KINDS = {"image_folder": IMAGES, "video_folder": KINDS["frames"]}
_FORMATS = {"tar_folder": lambda: FORMAT, "parquet_folder": make_format}


class Found(NamedTuple):
    """What there is: the number of records of each split, the classes, and whether captions.

    numbers: of "repeats" and "weight", what records say of how much they count.
    """

    splits: Mapping[str, int]
    classes: tuple[str, ...]
    has_captions: bool
    numbers: tuple[str, ...] = ()


def look_at(source: Mapping[str, Any]) -> Found | None:
    """Look at the data of a data.source section; one line in the log says what they hold.

    None for a source that is no folder of the user, and for a folder that is not there.
    Raises ValueError or OSError for a folder that the source cannot read.
    """
    name, folder = (source[key] if key in source else None for key in ("name", "folder"))
    if name not in (*_KINDS, *_FORMATS) or not isinstance(folder, str):
        return None
    root = find_root(folder)
    if not Path(root).is_dir():
        return None
    if name in _FORMATS:
        columns = {key: source[key] for key in ("image", "label", "caption") if key in source}
        shards = scan_shards(root, _FORMATS[name](**columns))
        say_once(f"{root} holds {shards.in_words()}")
        return Found(shards.counts, shards.classes, shards.has_captions, shards.numbers)
    kind = KINDS[source["images"]] if source.get("images") in KINDS else _KINDS[name]
    options = {key: source[key] for key in ("caption", "folder_repeats") if key in source}
    found = scan(root, kind=kind, **options)
    say_once(f"{root} holds {found.in_words()}")
    splits = {split: len(items) for split, items in found.splits.items()}
    return Found(splits, found.classes(), bool(found.captions), found.numbers())


def hold_out(config: ml_collections.ConfigDict, given: Collection[str]) -> None:
    """Hold splits that a user's data lack out of the training split, unless splits are given.

    Where that would leave less than one record, they are the training split itself.
    """
    found = look_at(config.data.source.to_dict())
    splits = config.data.splits if "splits" in config.data else {}
    if found is None or any(is_given(f"data.splits.{role}", given) for role in splits):
        return
    lacking = [
        role
        for role in ("validation", "test")
        if role in splits and splits[role] is not None and role not in found.splits
    ]
    count = found.splits["train"] if "train" in found.splits else 0
    if lacking and count * _HELD_OUT < 100:
        say_once(
            f"{counted(count, 'record is', 'records are')} too few to hold any out of training"
        )
        config.data.splits.update(dict.fromkeys(lacking, "train"))
    elif lacking:
        end = 100
        for role in reversed(lacking):
            start, stop = end - _HELD_OUT, "" if end == 100 else f"{end}%"
            config.data.splits[role] = f"train[{start}%:{stop}]"
            end = start
        config.data.splits.train = f"train[:{end}%]"
        held = ", ".join(f"{role} {config.data.splits[role]}" for role in lacking)
        say_once(f"held out of the training split: {held}")


def is_given(path: str, given: Collection[str]) -> bool:
    """Tell whether a path of a config, a section above it or a key below it was overridden."""
    return any(f"{path}.".startswith(f"{key}.") or key.startswith(f"{path}.") for key in given)


def on_accelerator() -> bool:
    """Tell whether this machine computes on a GPU or TPU."""
    return jax.default_backend() != "cpu"
