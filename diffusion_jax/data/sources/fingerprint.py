"""What a run remembers of its data, and what differs when it goes on."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from diffusion_jax.data import transforms
from diffusion_jax.data.clips import frames_of
from diffusion_jax.data.records import FeatureNames, Records, captions_of, find_features
from diffusion_jax.data.sources.open_source import class_names

# Records that are read of a data set whose whole content no file vouches for.
_SAMPLES = 64


def data_fingerprint(
    source: Records,
    *,
    image_key: str | None = None,
    label_key: str | None = None,
    caption_key: str | None = None,
) -> dict[str, Any]:
    """Describe the content of a source so that another content can be told from it.

    Where the data lie does not matter. The keys, whose values JSON can hold, are num_examples;
    class_names; name, with the version, and split_sizes if TFDS knows the data set; and digest: the
    hash of all images, labels and captions of an image folder, or of 64 records of other sources,
    None when these differ each time they are read. image_key, label_key, caption_key: see
    find_features.
    """
    features = find_features(
        source, image_key=image_key, label_key=label_key, caption_key=caption_key
    )
    found: dict[str, Any] = {
        "num_examples": len(source),
        "class_names": list(class_names(source, label_key=label_key)),
    }
    info = getattr(source, "dataset_info", None)
    if info is not None:
        found["split_sizes"] = {name: part.num_examples for name, part in info.splits.items()}
        if "content" in (info.metadata or {}):
            return found | {"digest": info.metadata["content"]}
        found["name"] = info.full_name
    digests = {_digest(source, features) for _ in range(2)}
    return found | {"digest": digests.pop() if len(digests) == 1 else None}


def data_differences(saved: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """Say what differs between two fingerprints, in words for the user; empty when nothing does."""
    lines = []
    if saved["class_names"] != found["class_names"]:
        lines.append(_classes(saved["class_names"], found["class_names"]))
    for name in ("name", "num_examples", "split_sizes"):
        before, now = (part[name] if name in part else None for part in (saved, found))
        if before != now:
            lines.append(f"{name} = {now} was {before}")
    if saved["digest"] != found["digest"] and not lines:
        lines.append("other images, labels or captions (the digest of their content differs)")
    return lines


def _classes(saved: list[str], found: list[str]) -> str:
    numbers = {name: number for number, name in enumerate(found)}
    gone = [name for name in saved if name not in numbers]
    new = [name for name in found if name not in saved]
    moved = [
        f"{name} from {number} to {numbers[name]}"
        for number, name in enumerate(saved)
        if name in numbers and numbers[name] != number
    ]
    changes = {"without": gone, "with new": new, "with other numbers:": moved}
    shown = [
        f"{what} {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"
        for what, names in changes.items()
        if names
    ]
    return f"class_names: {len(found)} (was {len(saved)}), " + "; ".join(shown)


def _digest(source: Records, features: FeatureNames) -> str:
    digest = hashlib.sha256()
    numbers = np.linspace(0, len(source) - 1, min(len(source), _SAMPLES)).astype(int)
    for number in sorted(set(numbers.tolist())):
        record = source[number]
        label = None if features.label is None else int(record[features.label])
        texts = None if features.caption is None else captions_of(record[features.caption])
        digest.update(json.dumps([number, label, texts]).encode())
        for frame in frames_of(record[features.image]):
            digest.update(_image_bytes(frame))
    return digest.hexdigest()[:16]


def _image_bytes(image: Any) -> bytes:
    """Bytes that stand for an image; PNG encoders differ between machines, their pixels do not."""
    if isinstance(image, bytes) and not image.startswith(b"\x89PNG"):
        return image
    try:
        pixels = transforms.decode(image, 3)
    except transforms.CorruptImageError as error:
        return bytes(image) if isinstance(image, bytes) else str(error).encode()
    return str(pixels.shape).encode() + pixels.tobytes()
