"""One record of a source: its image, label and captions, decoded and checked."""

import functools
import logging
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from tensorflow_datasets.core import features as tfds_features

from diffusion_jax.data.clips import Clip, ClipRule, fit_clip, frame_rate, frames_of, unreadable
from diffusion_jax.data.numbers import NONE, NumberNames, numbers_of
from diffusion_jax.data.transforms import CorruptImageError, Fitted
from diffusion_jax.wording import counted

# Which part of a record is shown when nothing is drawn.
MIDDLE = 0.5
# How many views of each time a record has; a record without this field has one.
VIEWS = "num_views"
_USUAL_NAMES = {
    "image": ("image", "video"),
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

    image: uint8 [h, w, c], or [t, h, w, c] for a clip; None when it is unreadable. original_size,
    resized_size: (height, width) as in transforms.Fitted; for an unreadable image the size that was
    asked for. label, captions: None when the source has none. clip: None for an image. columns:
    other images of the record, uint8 [h, w, 3], fitted as its image is. numbers: other fields of
    the record, float32, [d], or [t, d] for the frames that are shown.
    """

    image: np.ndarray | None
    original_size: tuple[int, int]
    resized_size: tuple[int, int]
    label: int | None
    captions: tuple[str, ...] | None
    index: int
    clip: Clip | None = None
    columns: Mapping[str, np.ndarray] = {}
    numbers: Mapping[str, np.ndarray] = {}


class FeatureNames(NamedTuple):
    """Names of the features that a batch is made of."""

    image: str
    label: str | None
    caption: str | None


def features_of(source: Records) -> Mapping[str, Any]:
    """Find the features of a source by name, or the values of its first record."""
    info = getattr(source, "dataset_info", None)
    return dict(info.features) if info is not None else source[0]


def find_features(
    source: Records,
    *,
    image_key: str | None = None,
    label_key: str | None = None,
    caption_key: str | None = None,
) -> FeatureNames:
    """Find the names of the image, label and caption features of a source.

    A name that is given must exist. Otherwise it is the usual name ("image" or "video"; "label";
    "caption", "text" or "captions"), or the only image or class label at the top level; labels and
    captions are optional. A video is a sequence of encoded images; a caption feature holds one text
    or a sequence of texts.

    Raises:
        ValueError: no such feature, or several images to choose from; names the argument and the
            choices.
    """
    features = features_of(source)
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
        if kind == "image" and is_video(feature):
            return True
        if kind == "caption" and isinstance(feature, tfds_features.Sequence):
            feature = feature.feature
        return isinstance(feature, _FEATURES[kind])
    return name in _USUAL_NAMES[kind]


def is_video(feature: Any) -> bool:
    """Tell whether a feature of TFDS is a sequence of encoded images."""
    inner = feature.feature if isinstance(feature, tfds_features.Sequence) else None
    return type(inner) is tfds_features.Tensor and inner.np_dtype == np.object_


def make_reader(
    source: Records,
    fit: Callable[[Any, tuple[int, int]], Fitted],
    keys: FeatureNames,
    *,
    cache: bool,
    max_corrupt: int,
    clips: ClipRule | None = None,
    columns: Mapping[str, Callable[..., Fitted]] = MappingProxyType({}),
    numbers: NumberNames = NONE,
) -> Callable[..., Record]:
    """Make the function (record number, (height, width), place) -> Record; threads may share it.

    clips: how the frames of a record become its image; None for images. place: which of the clips
    of a record is shown, in [0, 1); by default the middle one. With cache=True a record is decoded
    once and kept, of a video all frames. An unreadable image gives image=None and a warning, and an
    error once there are more than max_corrupt of them. columns: other images of a record, with what
    fits each to the size that its image had: (record, (height, width), size before). numbers: the
    fields of a record that are numbers.

    Raises:
        ValueError: while reading, one unreadable image too many or no number; names the record.
    """
    kept: dict[tuple[int, tuple[int, int]], Callable[[float], Record]] = {}
    corrupt: set[int] = set()

    def load(index: int, size: tuple[int, int]) -> Callable[[float], Record]:
        fields = source[index]
        label = None if keys.label is None else int(fields[keys.label])
        texts = None if keys.caption is None else captions_of(fields[keys.caption])
        frames = frames_of(fields[keys.image]) if clips is not None else []
        views = int(fields[VIEWS]) if clips is not None and VIEWS in fields else 1

        def show(place: float) -> Record:
            clip, others, shown = None, {}, [0]
            try:
                if clips is None:
                    image, original_size, resized_size = fit(fields[keys.image], size)
                    others = {
                        name: fit_column(fields, size, original_size).pixels
                        for name, fit_column in columns.items()
                    }
                else:
                    shown = [0] * clips.shown  # of frames that cannot be read
                    fitted, clip, shown = fit_clip(fit_frame, len(frames), fps, clips, place, views)
                    image, original_size, resized_size = fitted
            except CorruptImageError as error:
                image, original_size, resized_size = None, size, size
                clip = None if clips is None else unreadable(clips, fps)
                _count_corrupt(corrupt, index, _name(fields, index), error, max_corrupt)
            sizes = (original_size, resized_size)
            read = numbers_of(numbers, fields, len(frames), shown, _name(fields, index))
            return Record(image, *sizes, label, texts, index, clip, others, read)

        if clips is None:
            record = show(MIDDLE)
            return lambda place: record
        fps = frame_rate(fields[keys.image], fields["fps"] if "fps" in fields else None)
        fps = fps if clips.num_views is None else None  # of several views, neighbours do not move
        fit_frame = lambda number: fit(frames[number], size)
        fit_frame = functools.cache(fit_frame) if cache else fit_frame
        return show

    def read(index: int, size: tuple[int, int], place: float = MIDDLE) -> Record:
        show = kept[index, size] if (index, size) in kept else load(index, size)
        if cache:
            kept[index, size] = show
        return show(place)

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
            f"{name} is {error}; that makes "
            f"{counted(len(corrupt), 'unreadable image', 'unreadable images')}, "
            f"max_corrupt = {max_corrupt} allows no more"
        ) from error


def _name(fields: dict[str, Any], index: int) -> str:
    names = [
        _text(fields[key]) for key in ("file_name", "filename", "image/filename") if key in fields
    ]
    return f"record {index}" + (f" ({names[0]})" if names else "")


def _text(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
