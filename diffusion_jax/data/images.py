"""How the records of a source become images of one size: the options, and what reads them."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import numpy as np

from diffusion_jax.data import transforms
from diffusion_jax.data.buckets import BucketRule, sort_into_buckets
from diffusion_jax.data.clips import ClipRule, check_rule, frames_of
from diffusion_jax.data.emphasis import ALIKE, Emphasis, read_emphasis
from diffusion_jax.data.masks import check_kinds
from diffusion_jax.data.numbers import NumberNames
from diffusion_jax.data.records import (
    VIEWS,
    Record,
    Records,
    features_of,
    find_features,
    is_video,
    make_reader,
)
from diffusion_jax.data.tags import TagRule
from diffusion_jax.wording import counted

# The column that is how opaque an image is.
ALPHA = "alpha"
# How many records are compared in length with a clip.
_LOOKED_AT = 8


class ImageOptions(NamedTuple):
    """How stored records become images.

    image_size: (height, width) in pixels, or one number for squares.
    num_frames: how many frames a clip of video has; None for images. An image is then a clip that
        repeats it.
    frame_stride: a clip takes each frame_stride-th frame of a record.
    channels, crop, resize, pad: see transforms.make_fit.
    buckets: images of similar proportions go together, in shapes of about the area of image_size
        whose sides divide by bucket_divisor and differ by at most the factor max_aspect: see
        buckets.bucket_shapes.
    cache: keep decoded images as uint8 in memory after their first use.
    max_corrupt: unreadable images to leave out with a warning, before it is an error.
    image_key, label_key, caption_key: names of features, see records.find_features.
    loss_mask: which pixels count in the loss: "alpha", as far as they are opaque, or another image
        of a record, such as "mask_image", as far as it is white; None counts all alike.
    masks: kinds of random masks, of masks.KINDS, for models that complete images; each sample takes
        one of them. () makes none.
    image_columns: other images of a record that become columns of a batch, in three channels.
    number_columns, frame_columns: numbers of a record, and of each of its frames, that become
        columns of a batch where the data have them.
    num_views: views of each time in a clip, besides the given one; None for data of one view.
    repeats_key: the feature that says how often a record comes in an epoch of training; weight_key:
        the one that says what its loss is multiplied by. None counts all records alike.
    caption: the caption of every record, in place of what the source has; None for these.
    tags: what lies between the tags of captions, such as ", "; None for captions that are no lists.
        Training then puts them in random order with shuffle_tags, and leaves each out with the
        probability drop_tags, but for the first keep_tags of them.
    """

    image_size: int | tuple[int, int]
    channels: Literal[1, 3] = 3
    crop: Literal["center", "random", "stretch"] = "center"
    pad: int = 0
    resize: Literal["bicubic", "area", "bilinear", "lanczos", "nearest"] = "bicubic"
    buckets: bool = False
    bucket_divisor: int = 64
    max_aspect: float = 2.0
    cache: bool = False
    max_corrupt: int = 10
    image_key: str | None = None
    label_key: str | None = None
    caption_key: str | None = None
    num_frames: int | None = None
    frame_stride: int = 1
    loss_mask: str | None = None
    masks: tuple[str, ...] = ()
    image_columns: tuple[str, ...] = ()
    number_columns: tuple[str, ...] = ()
    frame_columns: tuple[str, ...] = ()
    num_views: int | None = None
    repeats_key: str | None = None
    weight_key: str | None = None
    caption: str | None = None
    tags: str | None = None
    keep_tags: int = 0
    shuffle_tags: bool = True
    drop_tags: float = 0.0

    @property
    def tag_rule(self) -> TagRule | None:
        """What training does to tags; None where captions have none."""
        if self.tags is None:
            return None
        return TagRule(self.tags, self.keep_tags, self.shuffle_tags, self.drop_tags)

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns of a batch that are made of other images, or of the opacity of its image."""
        masks = () if self.loss_mask is None else (self.loss_mask,)
        return tuple(dict.fromkeys((*self.image_columns, *masks)))

    @property
    def clips(self) -> ClipRule | None:
        """How records become clips; None for images. Raises ValueError for a number below 1."""
        if self.num_frames is None:
            return None
        return check_rule(self.num_frames, self.frame_stride, self.num_views)

    @property
    def numbers(self) -> NumberNames:
        """The numbers of records and frames that become columns of a batch."""
        return NumberNames(self.number_columns, self.frame_columns)


class Images(NamedTuple):
    """The images of a source.

    read: (record number, (height, width), place=0.5) -> Record, from any thread; place in [0, 1)
    tells which clip of a video is shown. shapes: every (height, width) that occurs. members: the
    record numbers of each shape, int64 [n_i]. emphasis: how much each record counts.
    """

    read: Callable[..., Record]
    shapes: tuple[tuple[int, int], ...]
    members: tuple[np.ndarray, ...]
    emphasis: Emphasis = ALIKE

    def read_or_next(self, number: int, size: tuple[int, int], *place: float) -> Record:
        """Read a record, or if its image is unreadable the first readable one that follows.

        Which one that is depends on nothing but the source, so a resumed run sees the same.
        Raises ValueError when no record has a readable image.
        """
        count = sum(map(len, self.members))
        for offset in range(count):
            record = self.read((number + offset) % count, size, *place)
            if record.image is not None:
                return record
        raise ValueError(f"none of the {count} records has a readable image")


def open_images(source: Records, options: ImageOptions, *, at_least: int = 1) -> Images:
    """Check the options against a source and sort its records into shapes, decoding nothing.

    at_least: how many records a shape needs; see buckets.fill_buckets.

    Raises:
        ValueError: an option outside its choices, or a feature that the source does not have.
    """
    size = transforms.check_size(options.image_size)
    ways: Any = {"crop": options.crop, "resize": options.resize, "pad": options.pad}
    fit = transforms.make_fit(channels=options.channels, **ways)
    features = find_features(
        source,
        image_key=options.image_key,
        label_key=options.label_key,
        caption_key=options.caption_key,
    )
    check_kinds(options.masks)
    if options.num_frames is None and _holds_video(source, features.image):
        raise ValueError(
            f"num_frames = None should be the length of a clip: {features.image!r} of this data "
            "set is video"
        )
    if options.clips is not None and options.masks:
        raise ValueError(
            f"masks = {options.masks!r} are for images, and num_frames = {options.num_frames} "
            "makes clips of video"
        )
    if options.clips is not None:
        _check_lengths(source, features.image, options.clips)
    read = make_reader(
        source,
        fit,
        features,
        cache=options.cache,
        max_corrupt=options.max_corrupt,
        clips=options.clips,
        columns=_columns(source, features.image, options, ways),
        numbers=options.numbers.among(features_of(source)),
    )
    if options.caption is not None:
        read = functools.partial(_captioned, read, options.caption)
    rule = None
    if options.buckets:
        rule = BucketRule(options.bucket_divisor, options.max_aspect, options.pad)
    emphasis = read_emphasis(source, repeats_key=options.repeats_key, weight_key=options.weight_key)
    shapes, members = sort_into_buckets(
        source, features.image, size, rule, at_least=at_least, repeats=emphasis.repeats
    )
    return Images(read, shapes, members, emphasis)


def _captioned(read: Callable[..., Record], caption: str, *where: Any) -> Record:
    return read(*where)._replace(captions=(caption,))


def _columns(
    source: Records, image: str, options: ImageOptions, ways: Mapping[str, Any]
) -> dict[str, Callable[..., transforms.Fitted]]:
    """Make what fits other images to the size of theirs; ValueError for one that is not there."""
    features = features_of(source) if options.columns else {}
    for name in options.columns:
        if name not in features and name != ALPHA:
            argument = "loss_mask" if name == options.loss_mask else "image_columns"
            choices = ", ".join([ALPHA, *features] if argument == "loss_mask" else features)
            raise ValueError(f"{argument} = {name!r} is no feature; choose from {choices}")

    def fit(
        name: str, fields: Mapping[str, Any], size: tuple[int, int], like: tuple[int, int]
    ) -> transforms.Fitted:
        if name in fields:
            pixels = transforms.decode(fields[name], 3)
        else:
            pixels = np.repeat(transforms.decode_alpha(fields[image]), 3, -1)
        pixels = transforms.stretched(pixels, like, ways["resize"])
        return transforms.fit(pixels, image_size=size, **ways)

    return {name: functools.partial(fit, name) for name in options.columns}


def _holds_video(source: Records, name: str) -> bool:
    info = getattr(source, "dataset_info", None)
    return info is not None and is_video(info.features[name])


def _check_lengths(source: Records, name: str, rule: ClipRule) -> None:
    """Raise ValueError when the first records are all too short for a clip, stills left aside.

    So it does when they have too few views, or have views that the clips do not show.
    """
    records = [source[number] for number in range(min(len(source), _LOOKED_AT))]
    views = [int(record[VIEWS]) if VIEWS in record else 1 for record in records]
    wanted = 1 if rule.num_views is None else 1 + rule.num_views
    if max(views) < wanted or max(views) > wanted == 1:
        raise ValueError(
            f"the first records of this data set have {counted(max(views), 'view', 'views')} of "
            f"each time, and the model takes {wanted}"
        )
    longest = max(
        len(frames_of(record[name])) // own for record, own in zip(records, views, strict=True)
    )
    if (1 < longest or wanted > 1) and longest < rule.span:
        raise ValueError(
            f"num_frames = {rule.num_frames} with frame_stride = {rule.stride} takes {rule.span} "
            f"frames, but the first records of this data set have at most {longest}"
        )
