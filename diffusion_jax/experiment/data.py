"""The `data` section -> sources and batches by role: train, validation, test."""

import inspect
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax

from diffusion_jax.data.batches import Batches, eval_batches, make_batches
from diffusion_jax.data.latent_cache import LatentCache, cached_batches
from diffusion_jax.data.sources.open_source import class_names, open_source
from diffusion_jax.experiment.binding import (
    ConfigError,
    bind,
    import_object,
    is_own,
    known_sections,
    options,
    value_of,
)

ROLES = ("train", "validation", "test")
# What a run decides, not a data section.
_GIVEN = ("source", "batch_size", "seed", "repeat", "process_index", "process_count")
_SOURCE = "config.data.source.name"


class Data(NamedTuple):
    """A data set with its splits and how its records become batches; opens nothing before it is
    asked to.

    splits: role -> TFDS split, None when the data set has none for the role.
    """

    image_shape: tuple[int, int, int]
    name: str
    source_options: Mapping[str, Any]
    splits: Mapping[str, str | None]
    batch_options: Mapping[str, Any]

    def source(self, role: str) -> Any:
        """Open the records of a role: train, validation or test; ConfigError when the config names
        no split for it."""
        if role not in ROLES:
            raise ConfigError(f"split {role!r} is unknown; choose from {', '.join(ROLES)}")
        split = self.splits[role]
        if split is None:
            raise ConfigError(f"config.data.splits.{role} is not set, so there is no {role} split")
        if is_own(self.name):
            return import_object(self.name, _SOURCE)(split=split, **self.source_options)
        return open_source(self.name, split, **self.source_options)

    def class_names(self, source: Any) -> tuple[str, ...]:
        """Name the classes of the label that the batches carry; empty when there is none."""
        label_key = value_of(make_batches, self.batch_options, "label_key")
        return class_names(source, label_key=label_key)

    def train_batches(self, source: Any, *, batch_size: int, seed: int) -> Batches:
        """Shuffled batches without end; batch k is a function of (seed, k)."""
        return make_batches(
            source, batch_size=batch_size, seed=seed, **self.batch_options, **_process()
        )

    def cached_batches(self, cache: LatentCache, *, batch_size: int, seed: int) -> Batches:
        """The same batches in the same order out of a cache, with moments instead of images."""
        # `cache` of a config keeps decoded images, of which there are none.
        known = set(inspect.signature(cached_batches).parameters) - {"cache"}
        kept = {key: value for key, value in self.batch_options.items() if key in known}
        return cached_batches(cache, batch_size=batch_size, seed=seed, **kept, **_process())

    def eval_batches(self, source: Any, *, batch_size: int) -> Batches:
        """Each record once, in order, the last batch padded with weight 0."""
        known = inspect.signature(eval_batches).parameters
        kept = {key: value for key, value in self.batch_options.items() if key in known}
        if "crop" in kept and kept["crop"] == "random":
            kept["crop"] = "center"
        return eval_batches(source, batch_size=batch_size, **kept, **_process())


class Splits(NamedTuple):
    """The `data.splits` section: TFDS splits such as "train[:90%]"."""

    train: str = "train"
    validation: str | None = None
    test: str | None = None


def build_data(section: Mapping[str, Any]) -> Data:
    """Bind the `data` section; ConfigError for a wrong option. Opens nothing."""
    known_sections(section, ("source", "splits", "batches"), "config.data")
    for name in ("source", "batches"):
        if name not in section:
            raise ConfigError(f"config.data.{name} is missing")
    batches = bind(make_batches, section["batches"], "config.data.batches", given=_GIVEN)
    splits = bind(Splits, section["splits"] if "splits" in section else {}, "config.data.splits")
    size = batches["image_size"]
    height, width = (size, size) if isinstance(size, int) else size
    channels = value_of(make_batches, batches, "channels")
    source = section["source"]
    if "name" not in source:
        raise ConfigError("config.data.source.name is missing; name a TFDS data set")
    if is_own(source["name"]):
        bind(import_object(source["name"], _SOURCE), source, "config.data.source", given=("split",))
    return Data(
        (height, width, channels),
        source["name"],
        options(source),
        Splits(**splits)._asdict(),
        batches,
    )


def _process() -> dict[str, Any]:
    return {"process_index": jax.process_index(), "process_count": jax.process_count()}
