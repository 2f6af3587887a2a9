"""The `data` section -> sources and batches by role: train, validation, test."""

import inspect
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax

from diffusion_jax.data.batches import Batches, Finish, eval_batches, make_batches
from diffusion_jax.data.emphasis import read_emphasis
from diffusion_jax.data.images import ImageOptions
from diffusion_jax.data.latent_cache import LatentCache, cached_batches
from diffusion_jax.data.records import FeatureNames, Records
from diffusion_jax.data.sources.fingerprint import data_fingerprint
from diffusion_jax.data.sources.open_source import (
    OWN_BUILDERS,
    class_names,
    find_prepared,
    open_source,
)
from diffusion_jax.experiment.config.binding import (
    ConfigError,
    Section,
    bind,
    bind_section,
    bind_shared,
    check_section,
    import_object,
    is_own,
    known_sections,
    options,
    value_of,
)
from diffusion_jax.experiment.network.frames import with_frames

ROLES = ("train", "validation", "test")
# What a run decides, not a data section.
_GIVEN = "source batch_size seed repeat process_index process_count finish".split()
# What the network decides.
_COLUMNS = ("image_columns", "number_columns", "frame_columns", "num_views")
_SOURCE = "config.data.source.name"
SOURCE = Section(
    "config.data.source",
    "Where the records come from: a source of this package, or any TFDS data set by name.",
    ((open_source, ("split",)),),
    OWN_BUILDERS,
    ("data_dir",),
    own=("split",),
)


class Data(NamedTuple):
    """A data set with its splits, and how its records become batches.

    image_shape: (h, w, c) of an image, or of a frame.
    splits: role -> TFDS split, None when the data set has none for the role. image_options: how
    records become images. batch_options: every option of `data.batches`, defaults included.
    prepared: the folder of the prepared data set that is read instead of the source, or None.
    """

    image_shape: tuple[int, int, int]
    name: str
    source_options: Mapping[str, Any]
    splits: Mapping[str, str | None]
    image_options: ImageOptions
    batch_options: Mapping[str, Any]
    prepared: str | None = None

    @property
    def num_frames(self) -> int | None:
        """How many frames a clip has; None where the batches hold images."""
        return self.image_options.num_frames

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """The shape of one sample: (h, w, c) of an image, or (t, h, w, c) of a clip."""
        return with_frames(self.num_frames, self.image_shape)

    def source(self, role: str) -> Records:
        """Open the records of a role: train, validation or test.

        Raises ConfigError when the config names no split for it.
        """
        if role not in ROLES:
            raise ConfigError(f"split {role!r} is unknown; choose from {', '.join(ROLES)}")
        split = self.splits[role]
        if split is None:
            raise ConfigError(f"config.data.splits.{role} is not set, so there is no {role} split")
        if self.prepared is not None:
            return open_source(self.prepared, split)
        if is_own(self.name):
            return import_object(self.name, _SOURCE)(split=split, **self.source_options)
        return open_source(self.name, split, **self.source_options)

    def class_names(self, source: Records) -> tuple[str, ...]:
        """Name the classes of the label that the batches carry; empty when there is none."""
        return class_names(source, label_key=self.image_options.label_key)

    def fingerprint(self, source: Records) -> dict[str, Any]:
        """Describe the content of a split: see sources.fingerprint.data_fingerprint."""
        names = {f"{kind}_key": self.batch_options[f"{kind}_key"] for kind in FeatureNames._fields}
        return data_fingerprint(source, **names)

    def without_folder(self, content: str | None) -> "Data":
        """Read a folder of images or videos that has moved from what was prepared of it.

        content: the digest of its fingerprint, None when it is not known. When the folder is there,
        or nothing of this content is prepared, the data stay as they are.
        """
        folder = self.source_options["folder"] if "folder" in self.source_options else None
        of_user = self.name.endswith("_folder")
        if not of_user or folder is None or Path(os.path.expanduser(folder)).exists():
            return self
        options = self.source_options
        found = find_prepared(content, value_of(open_source, options, "data_dir"))
        return self if found is None else self._replace(prepared=found)

    def with_columns(self, **columns: Any) -> "Data":
        """Add to the batches what a network reads of the records besides: see _COLUMNS."""
        return self._replace(
            batch_options={**self.batch_options, **columns},
            image_options=self.image_options._replace(**columns),
        )

    def train_batches(
        self, source: Records, *, batch_size: int, seed: int, finish: Finish | None = None
    ) -> Batches:
        """Make endless shuffled batches; batch k is a function of (seed, k).

        finish: what the prefetching threads do to each batch before it is handed out.
        """
        return self._call(make_batches, source, batch_size=batch_size, seed=seed, finish=finish)

    def cached_batches(
        self,
        cache: LatentCache,
        source: Records,
        *,
        batch_size: int,
        seed: int,
        finish: Finish | None = None,
    ) -> Batches:
        """Make the same batches in the same order out of a cache, with moments for images."""
        options = self.image_options
        emphasis = read_emphasis(
            source, repeats_key=options.repeats_key, weight_key=options.weight_key
        )
        given = {"batch_size": batch_size, "seed": seed, "finish": finish, "emphasis": emphasis}
        return self._call(cached_batches, cache, **given, tags=options.tag_rule)

    def eval_batches(
        self, source: Records, *, batch_size: int, finish: Finish | None = None
    ) -> Batches:
        """Make batches of each record once, in order, the last batch padded with weight 0.

        Where training cuts at random, evaluation cuts the middle.
        """
        given = {"batch_size": batch_size, "finish": finish, "crop": self._eval_crop}
        return self._call(eval_batches, source, **given)

    def first_row(self, source: Records, *, finish: Finish | None = None) -> dict[str, Any]:
        """Make a batch of one record for each process, as evaluation would, in this thread.

        It has all that embedders read. Buckets, repeats and weights are left aside, because they
        would be read of all records.
        """
        given = {"batch_size": jax.process_count(), "finish": finish, "crop": self._eval_crop}
        aside = {"buckets": False, "repeats_key": None, "weight_key": None}
        batches = self._call(eval_batches, source, **given, **aside, num_threads=0)
        return next(batches.iterate(0))

    @property
    def _eval_crop(self) -> str:
        return "center" if self.image_options.crop == "random" else self.image_options.crop

    def _call(self, make: Callable[..., Batches], source: Any, **given: Any) -> Batches:
        """Call a maker of batches with the batch options that it takes."""
        known = set(list(inspect.signature(make).parameters)[1:])  # without the source
        if "image_options" in known:
            known |= set(ImageOptions._fields)
        taken = {key: value for key, value in self.batch_options.items() if key in known}
        process = {"process_index": jax.process_index(), "process_count": jax.process_count()}
        return make(source, **taken | process | given)


def check_alike(options: ImageOptions, loss: str) -> None:
    """Raise ConfigError for options that a loss does not read which counts all pixels alike.

    loss: its name, for the message.
    """
    for name in ("loss_mask", "weight_key"):
        value = getattr(options, name)
        if value is not None:
            raise ConfigError(
                f"config.data.batches.{name} = {value!r} should be left out: {loss} counts all "
                "pixels of all samples alike"
            )


class Splits(NamedTuple):
    """The `data.splits` section: TFDS splits such as "train[:90%]"."""

    train: str = "train"
    validation: str | None = None
    test: str | None = None


def build_data(section: Any) -> Data:
    """Bind the `data` section; ConfigError for a wrong option. Opens nothing."""
    known_sections(section, ("source", "splits", "batches"), "config.data")
    for name in ("source", "batches"):
        if name not in section:
            raise ConfigError(f"config.data.{name} is missing")
    path = "config.data.batches"
    bound = bind_shared(section["batches"], path, (ImageOptions, _COLUMNS), (make_batches, _GIVEN))
    images, order = ImageOptions(**bound[0]), bound[1]
    _check_tags(images)
    splits = bind(Splits, {"splits": {}, **section}["splits"], "config.data.splits")
    size, source = images.image_size, section["source"]
    height, width = (size, size) if isinstance(size, int) else size
    _check_source(source)
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(make_batches).parameters.items()
        if name not in _GIVEN and parameter.default is not parameter.empty
    }
    return Data(
        (height, width, images.channels),
        source["name"],
        options(source),
        Splits(**splits)._asdict(),
        images,
        {**images._asdict(), **defaults, **order},
    )


def _check_tags(images: ImageOptions) -> None:
    """Raise ConfigError for options of tags without what lies between them."""
    for name in ("keep_tags", "shuffle_tags", "drop_tags"):
        value, default = getattr(images, name), ImageOptions._field_defaults[name]
        if value != default and images.tags is None:
            raise ConfigError(
                f"config.data.batches.{name} = {value!r} needs config.data.batches.tags, what lies "
                "between the tags of a caption, such as ', '"
            )
    if images.tags == "":
        raise ConfigError("config.data.batches.tags = '' should be what lies between tags: ', '")


def _check_source(source: Any) -> None:
    """Raise ConfigError for a source without a name, and for an option that it does not take."""
    check_section(source, SOURCE.path)
    if "name" not in source:
        raise ConfigError(f"{_SOURCE} is missing; name a TFDS data set")
    name = source["name"]
    if not isinstance(name, str) or not name:
        raise ConfigError(f"{_SOURCE} = {name!r} should be the name of a TFDS data set")
    if name in SOURCE.table:
        bind_section(SOURCE, source)
    elif is_own(name):
        bind(import_object(name, _SOURCE), source, SOURCE.path, given=("split",))
    else:  # a builder of TFDS takes more than open_source knows
        bind(open_source, source, SOURCE.path, given=("split",))
