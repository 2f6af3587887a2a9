"""When an override gives a section another name, the options of the old one go with it."""

import logging
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import ml_collections

from diffusion_jax.experiment.config.binding import Section, import_object, is_own, parameters_of
from diffusion_jax.experiment.config.catalogue import NAME, sections
from diffusion_jax.experiment.config.looking import hold_out, is_given

_log = logging.getLogger(__name__)
_SOURCE = "data.source"


def drop_leftovers(
    config: ml_collections.ConfigDict,
    before: Mapping[str, Any],
    after: Mapping[str, Any],
    given: Collection[str],
) -> None:
    """Remove options that a section's old name had and its new name has not; a log line says so.

    before, after: the names of its sections before and after it was overridden. given: the keys
    that were overridden, which stay.
    Where a folder of the user takes the place of another data set, splits that it lacks and that
    are not given are held out of its training split.
    """
    known = sections()
    for path, old in before.items():
        spec = _spec(known, path)
        if spec is None or path not in after or after[path] in (None, old or spec.default):
            continue
        left = list(_leftovers(spec, config, path, old, after[path], given))
        for key in left:
            del _at(config, path)[key]
        if left:
            _log.info(
                "config.%s.name was changed from %r to %r, which has no option %s; what the config "
                "gave %s is not used",
                path, old or spec.default, after[path], " or ".join(left),
                "it" if len(left) == 1 else "them",
            )  # fmt: skip
        if path == _SOURCE:
            hold_out(config, given)


def _spec(known: Mapping[str, Section], path: str) -> Section | None:
    own = path if path in known else path.rpartition(".")[0] + NAME
    return known[own] if own in known and known[own].table else None


def _leftovers(
    spec: Section,
    config: ml_collections.ConfigDict,
    path: str,
    old: Any,
    new: Any,
    given: Collection[str],
) -> Iterator[str]:
    before, after = _options_of(spec, old or spec.default, path), _options_of(spec, new, path)
    if before is None or after is None:
        return
    for key in list(_at(config, path)):
        had = key in before or _takes_any(spec, old)
        if key != "name" and had and key not in after and not is_given(f"{path}.{key}", given):
            yield key


def _options_of(spec: Section, name: Any, path: str) -> set[str] | None:
    """List what a section with this name may hold; None for a name that there is not."""
    targets = list(spec.targets)
    if isinstance(name, str) and name in spec.table:
        targets += [(spec.table[name], spec.given)]
        targets += spec.extras[name] if name in spec.extras else ()
    elif spec.own is not None and is_own(name):
        targets += [(import_object(name, f"config.{path}.name"), spec.own)]
    elif not _takes_any(spec, name):
        return None
    return {key for function, hidden in targets for key in parameters_of(function, hidden)}


def _takes_any(spec: Section, name: Any) -> bool:
    """Tell whether a name means a data set of TFDS, whose options only TFDS knows."""
    return spec.path == f"config.{_SOURCE}" and name not in spec.table and not is_own(name)


def _at(config: ml_collections.ConfigDict, path: str) -> ml_collections.ConfigDict:
    for key in path.split("."):
        config = config[key]
    return config
