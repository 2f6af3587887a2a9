"""One record of a source: its image, label and captions, decoded and checked."""

import logging
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from tensorflow_datasets.core import features as tfds_features

from diffusion_jax.data.transforms import CorruptImageError, Fitted

_USUAL_NAMES = {
    "image": ("image",),
    "label": ("label",),
    "caption": ("caption", "text", "captions"),
}
_FEATURES = {
    "image": tfds_features.Image,
    "label": tfds_features.ClassLabel,
    "caption": tfds_features.Text,
}

_log = logging.getLogger(__name__)


@runtime_checkable
class Records(Protocol):
    """A sequence of dicts that can be read in any order; from TFDS it also has .dataset_info."""

    def __len__(self) -> int:
        """Count the records."""
        ...

    def __getitem__(self, index: int, /) -> Any:
        """Read one record."""
        ...


class Record(NamedTuple):
    """A decoded record.

    image: uint8 [h, w, c], None when it is unreadable. original_size, resized_size: (height, width)
    as in transforms.Fitted; for an unreadable image the size that was asked for. label, captions:
    None when the source has none.
    """

    image: np.ndarray | None
    original_size: tuple[int, int]
    resized_size: tuple[int, int]
    label: int | None
    captions: tuple[str, ...] | None
    index: int


class FeatureNames(NamedTuple):
    """Names of the features that a batch is made of."""

    image: str
    label: str | None
    caption: str | None


def find_features(
    source: Records,
    *,
    image_key: str | None = None,
    label_key: str | None = None,
    caption_key: str | None = None,
) -> FeatureNames:
    """Find the names of the image, label and caption features of a source.

    A name that is given must exist. Otherwise it is the usual name ("image"; "label"; "caption",
    "text" or "captions"), or the only image or class label at the top level; labels and captions
    are optional. A caption feature holds one text or a sequence of texts.

    Raises:
        ValueError: no such feature, or several images to choose from; names the argument and the
            choices.
    """
    info = getattr(source, "dataset_info", None)
    features = dict(info.features) if info is not None else source[0]
    image = _choose(features, "image", image_key)
    if image is None:
        raise ValueError(
            "image_key = None leaves open which feature is the image; choose from "
            f"{', '.join(features)}"
        )
    label = _choose(features, "label", label_key)
    caption = _choose(features, "caption", caption_key)
    return FeatureNames(image, label, caption)


def _choose(features: Mapping[str, Any], kind: str, given: str | None) -> str | None:
    if given is not None and given not in features:
        raise ValueError(f"{kind}_key = {given!r} is no feature; choose from {', '.join(features)}")
    found = [name for name, feature in features.items() if _is_kind(kind, name, feature)]
    usual = [name for name in _USUAL_NAMES[kind] if name in found]
    # A lone text is no caption: many data sets have an "id" or a "file_name" and nothing else.
    lone = found if len(found) == 1 and kind != "caption" else []
    candidates = [given] if given is not None else usual + lone
    return candidates[0] if candidates else None


def _is_kind(kind: str, name: str, feature: Any) -> bool:
    """Tell by its type whether a feature of TFDS is of a kind, or by its name a value of a dict."""
    if isinstance(feature, tfds_features.FeatureConnector):
        if kind == "caption" and isinstance(feature, tfds_features.Sequence):
            feature = feature.feature
        return isinstance(feature, _FEATURES[kind])
    return name in _USUAL_NAMES[kind]


def make_reader(
    source: Records,
    fit: Callable[[Any, tuple[int, int]], Fitted],
    keys: FeatureNames,
    *,
    cache: bool,
    max_corrupt: int,
) -> Callable[[int, tuple[int, int]], Record]:
    """Make the function (record number, (height, width)) -> Record; threads may share it.

    With cache=True a record is decoded once and kept. An unreadable image gives image=None and a
    warning, and an error once there are more than max_corrupt of them.

    Raises:
        ValueError: while reading, one unreadable image too many; names the record.
    """
    kept: dict[tuple[int, tuple[int, int]], Record] = {}
    corrupt: set[int] = set()

    def read(index: int, size: tuple[int, int]) -> Record:
        if (index, size) in kept:
            return kept[index, size]
        fields = source[index]
        try:
            image, original_size, resized_size = fit(fields[keys.image], size)
        except CorruptImageError as error:
            image, original_size, resized_size = None, size, size
            _count_corrupt(corrupt, index, _name(fields, index), error, max_corrupt)
        label = None if keys.label is None else int(fields[keys.label])
        texts = None if keys.caption is None else captions_of(fields[keys.caption])
        record = Record(image, original_size, resized_size, label, texts, index)
        if cache:
            kept[index, size] = record
        return record

    return read


def captions_of(value: Any) -> tuple[str, ...]:
    """Read the captions of a record, at least one, from a text or a sequence of texts.

    From a sequence of dicts, which TFDS turns into a dict of sequences, it takes "text" (as in
    coco_captions). Without any text the caption is "".
    """
    if isinstance(value, Mapping) and "text" in value:
        value = value["text"]
    if isinstance(value, (bytes, str)):
        return (_text(value),)
    if not isinstance(value, (list, tuple, np.ndarray)):
        raise TypeError(f"a caption should be a text or a sequence of texts, not {value!r:.80}")
    return tuple(_text(text) for text in value) or ("",)


def _count_corrupt(
    corrupt: set[int], index: int, name: str, error: CorruptImageError, max_corrupt: int
) -> None:
    if index not in corrupt:
        corrupt.add(index)
        _log.warning("skipped %s: %s", name, error)
    if len(corrupt) > max_corrupt:
        raise ValueError(
            f"{name} is {error}; that makes {len(corrupt)} unreadable images, "
            f"max_corrupt = {max_corrupt} allows no more"
        ) from error


def _name(fields: dict[str, Any], index: int) -> str:
    names = [
        _text(fields[key]) for key in ("file_name", "filename", "image/filename") if key in fields
    ]
    return f"record {index}" + (f" ({names[0]})" if names else "")


def _text(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
