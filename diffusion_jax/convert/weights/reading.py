"""Open weights by what they are: safetensors, sharded or not, folders of diffusers, torch.save."""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from diffusion_jax.convert.weights.safetensors import (
    LazyTensor,
    read_metadata,
    read_safetensors,
)
from diffusion_jax.convert.weights.torch_pickle import LEGACY_MAGIC, read_torch


class Weights(NamedTuple):
    """The tensors of a file or folder by name, where they are, and the words of a header."""

    path: Path
    tensors: Mapping[str, LazyTensor]
    metadata: Mapping[str, str] = {}


TORCH_SUFFIXES = (".ckpt", ".pt", ".pth", ".bin")
STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")
INDEXES = (".safetensors.index.json", ".bin.index.json")
INDEX = re.compile(r"\.(safetensors|bin)\.index(\.\w+)?\.json$")
MAX_JSON = 30_000_000
# The folders of a diffusers pipeline that hold weights.
COMPONENTS = ("unet", "vae", "text_encoder", "text_encoder_2", "image_encoder")


def open_weights(
    path: str | os.PathLike, component: str | None = None, *, variant: str | None = None
) -> Weights:
    """List the tensors of a file or folder, by name with shape and dtype; none is read yet.

    path: a safetensors file or a file by torch.save, whatever its name, the *.index.json of a
    sharded one, a folder with one of these, or a folder of diffusers. component: the part of a
    diffusers folder ("unet", "vae", ...). variant: "fp16" for the *.fp16.* files of a folder, and
    so on; without it they are taken where there are no others.
    Raises FileNotFoundError when there is no such file, and ValueError, naming the file and what it
    is instead, when it is none of these, is cut off, or holds anything but weights.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"there are no weights at {path}")
    if path.is_dir():
        return open_weights(weights_file(path, component, variant=variant))
    if not path.is_file():
        raise ValueError(f"{path} is a pipe or a device and should be a file")
    if INDEX.search(path.name):
        return Weights(path, _read_shards(path))
    is_torch = _sniff(path) == "torch"
    tensors = read_torch(path) if is_torch else read_safetensors(path)
    if not tensors:
        raise ValueError(f"{path} holds no tensors")
    return Weights(path, tensors, {} if is_torch else read_metadata(path))


def diffusers_components(path: str | os.PathLike) -> list[str]:
    """Name the parts of a diffusers folder that hold weights; none for anything else.

    A part that its model_index.json calls null is left out.
    """
    path = Path(path)
    index = read_json(path / "model_index.json")
    absent = [name for name, value in index.items() if value == [None, None]]
    return [name for name in COMPONENTS if name not in absent and (path / name).is_dir()]


def read_json(path: Path) -> dict[str, Any]:
    """Read a config of a folder; {} when there is none. ValueError when it is damaged."""
    if not path.is_file():
        return {}
    if path.stat().st_size > MAX_JSON:
        raise ValueError(f"{path} should be a config, and has more than {MAX_JSON:,} bytes")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: it is not JSON") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} is damaged: it should be a JSON object")
    return config


def weights_file(folder: Path, component: str | None = None, *, variant: str | None = None) -> Path:
    """Find the file (or index of shards) with the weights of a folder, or of one of its components.

    Raises FileNotFoundError when there is none, ValueError when component or variant has to be
    given.
    """
    parts = diffusers_components(folder)
    if component is not None and component in parts:
        folder = folder / component
    found = variants_of(folder)
    for chosen in (variant,) if variant else ("", "fp16", *(found if len(found) == 1 else ())):
        if chosen in found:
            return found[chosen]
    if parts and component not in parts:
        asked = "" if component is None else f", not {component!r}"
        raise ValueError(f"{folder} is a diffusers folder: choose one of {', '.join(parts)}{asked}")
    kind = f" {variant}" if variant else ""
    if found:
        raise ValueError(f"{folder} has no{kind} weights; choose a variant from {', '.join(found)}")
    raise FileNotFoundError(
        f"{folder} has no{kind} weights; looked for {', '.join(f'{s}.safetensors' for s in STEMS)}"
    )


def variants_of(folder: Path) -> dict[str, Path]:
    """Find the weights in a folder: {variant, "" for the plain one: file, or index of shards}."""
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    found: dict[str, Path] = {}
    for ending in (
        r"\.safetensors\.index{}\.json",
        r"{}\.safetensors",
        r"\.bin\.index{}\.json",
        r"{}\.bin",
    ):
        for stem in STEMS:
            pattern = re.compile(stem + ending.format(r"(?:\.(?!index)(\w+))?"))
            for match in filter(None, map(pattern.fullmatch, names)):
                found.setdefault(match[1] or "", folder / match[0])
    return found


def _read_shards(path: Path) -> dict[str, LazyTensor]:
    try:
        places = read_json(path)["weight_map"]
        shards = sorted(set(map(Path, places.values())))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f'{path} is no index of shards: it needs a "weight_map"') from error
    if not shards:
        raise ValueError(f"{path} names no shards and holds no tensors")
    tensors: dict[str, LazyTensor] = {}
    for shard in map(str, shards):
        is_beside = Path(shard).name == shard and (path.parent / shard).is_file()
        if not is_beside or INDEX.search(shard):
            raise FileNotFoundError(f"{path} names the shard {shard}, which is not beside it")
        held = open_weights(path.parent / shard).tensors
        absent = [name for name, where in places.items() if where == shard and name not in held]
        if absent:
            raise ValueError(f"{path} says that {shard} holds {absent[0]}, and it does not")
        tensors |= {name: held[name] for name, where in places.items() if where == shard}
    return tensors


def is_safetensors(path: Path) -> bool:
    """Tell by its first bytes whether a file is safetensors."""
    with path.open("rb") as file:
        return file.read(9)[8:] == b"{"


def _sniff(path: Path) -> str:
    """Tell by its first bytes whether a file is "safetensors" or "torch"; raise for another."""
    with path.open("rb") as file:
        start = file.read(512)
    if not start:
        raise ValueError(f"{path} is empty; download or copy it again")
    if start.startswith(b"version https://git-lfs"):
        raise ValueError(
            f"{path} is a git-lfs pointer, not the weights; run `git lfs pull` where it came from"
        )
    text = start.lstrip(b"\xef\xbb\xbf \r\n\t").lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        raise ValueError(f"{path} is a web page, not weights: the download went wrong")
    if start.startswith(b"GGUF"):
        raise ValueError(f"{path} is a GGUF file, which is not read; get it as .safetensors")
    if start.startswith(b"PK") or LEGACY_MAGIC in start[:32]:
        return "torch"
    if is_safetensors(path):
        return "safetensors"
    if start.startswith(b"\x80"):
        raise ValueError(f"{path} is a bare pickle, which may run code; it is not read")
    raise ValueError(f"{path} is neither safetensors nor a file by torch.save: {start[:24]!r}")
