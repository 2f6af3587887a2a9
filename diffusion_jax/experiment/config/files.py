"""A config file, one of its variants and overrides -> a ConfigDict."""

import ast
import contextlib
import copy
import logging
import os
import pathlib
import traceback
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import ml_collections
from ml_collections import config_dict

from diffusion_jax.experiment.config.as_json import from_data, read_json
from diffusion_jax.experiment.config.binding import ConfigError, choices
from diffusion_jax.experiment.config.familiar import overrides_of

_log = logging.getLogger(__name__)

PREFIX = "--config."
# The value of an override that removes a key; the quoted word "'delete'" is a text.
DELETE = "delete"
_PACKAGE = pathlib.Path(__file__).parents[2]
# Where a bare name such as "mnist" is looked up: in an installed package, else in a checkout.
SHIPPED = (_PACKAGE / "configs", _PACKAGE.parent / "configs")


class ConfigFile(NamedTuple):
    """A path as load_config takes it, and its config; None where that needs overrides."""

    path: str
    config: ml_collections.ConfigDict | None


def load_config(
    path: str, overrides: Sequence[str] | Mapping[str, Any] = ()
) -> ml_collections.ConfigDict:
    """Load configs/x.py[:variant], a run's config.json or a shipped config ("mnist"); override it.

    A file may have a function finish(config, given) that looks, after the overrides, at what they
    name, such as a folder; given are the keys that were overridden.
    overrides: "--config.a.b=value" in the order in which they apply, or {"a.b": value}. As a
    sampler.name, names of other tools ("DPM++ 2M Karras", "turbo") are known, see familiar.py.
    Options of a section go when it gets another name that does not take them. A key that
    the file has keeps its type (an int serves as a float), unless either value is None; one that it
    lacks is added. The value `delete` removes a key or a section. As text, a tuple is (1,2) or 1,2,
    a section is a dict literal, and a text may be quoted: "'None'" is not None.
    A value that refers to another one follows it until it is overridden itself.
    Raises FileNotFoundError for a missing file, and ConfigError for a mistake in the file, an
    unknown variant and a value that does not fit.
    """
    file, variant = find_config(path)
    config, finish = _execute(file, variant)
    override_config(config, overrides)
    return _finished(path, file, config, finish, overrides)


def load_config_beside_file(
    path: str, overrides: Sequence[str] | Mapping[str, Any] = ()
) -> tuple[ml_collections.ConfigDict, ConfigFile]:
    """Load as load_config does -> (the config, what the file alone gives); it is executed once."""
    file, variant = find_config(path)
    written, finish = _execute(file, variant)
    config = override_config(copy.deepcopy(written), overrides)
    config = _finished(path, file, config, finish, overrides)
    try:
        return config, ConfigFile(path, _finished(path, file, written, finish, ()))
    except ConfigError as error:
        _log.info("%s", error)
        return config, ConfigFile(path, None)


def _finished(
    path: str,
    file: pathlib.Path,
    config: ml_collections.ConfigDict,
    finish: Callable[..., None] | None,
    overrides: Sequence[str] | Mapping[str, Any],
) -> ml_collections.ConfigDict:
    """Let the file finish its config; ConfigError where a value is still to be given."""
    if finish is not None:
        with config.unlocked(), _told(file):
            finish(config, [key for key, _ in _pairs(overrides)])
    try:
        config.to_dict()  # reads every value
    except config_dict.RequiredValueError as error:
        raise ConfigError(f"{path}: {error}; set it with {PREFIX}section.key=value") from error
    return config


def override_config(
    config: ml_collections.ConfigDict, overrides: Sequence[str] | Mapping[str, Any]
) -> ml_collections.ConfigDict:
    """Override values of a config in place, as load_config describes, and return it."""
    pairs, before = list(_spelled_out(_pairs(overrides))), names_of(config)
    with config.unlocked():
        for key, value in pairs:
            _override(config, key, value)
        after = names_of(config)
        if any(path in after and after[path] != name for path, name in before.items()):
            # It knows all sections, and guiders among them imports this file.
            from diffusion_jax.experiment.config.leftovers import drop_leftovers

            drop_leftovers(config, before, after, [key for key, _ in pairs])
    return config


def names_of(config: Any, path: str = "") -> dict[str, Any]:
    """Map the path of each section to its name; None for a section without one."""
    found: dict[str, Any] = {}
    for key, value in config.items(preserve_field_references=True):
        if isinstance(value, ml_collections.ConfigDict):
            section: Any = value
            own = dict(section.items(preserve_field_references=True))
            found[f"{path}{key}"] = own["name"] if "name" in own else None
            found |= names_of(section, f"{path}{key}.")
    return found


def _pairs(overrides: Sequence[str] | Mapping[str, Any]) -> list[tuple[str, Any]]:
    return list(overrides.items() if isinstance(overrides, Mapping) else map(_split, overrides))


def _spelled_out(pairs: Sequence[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    """Replace a familiar name of a sampler by what it means; what else is given stands."""
    given = {key for key, _ in pairs}
    for key, value in pairs:
        meant = overrides_of(value) if key == "sampler.name" and isinstance(value, str) else None
        if meant is None:
            yield key, value
            continue
        for name, text in map(_split, meant):
            if name == key or name not in given:
                yield name, text


def find_config(path: str) -> tuple[pathlib.Path, str]:
    """Find the file that a path or a bare name means -> (file, variant or "").

    A bare name, without an ending and a folder, is a shipped config and never a file beside you.
    Raises FileNotFoundError with the files that there are.
    """
    name, _, variant = str(path).partition(":")
    file = pathlib.Path(os.path.expanduser(name))
    is_bare = file.name == name and not file.suffix
    whole = pathlib.Path(os.path.expanduser(path))  # a run's folder may have a colon in its name
    if whole.is_file() and (whole.suffix or not is_bare):
        return whole, ""
    for candidate in [folder / f"{name}.py" for folder in SHIPPED] if is_bare else [file]:
        if candidate.is_file():
            return candidate, variant
    there = [other.name for other in file.parent.glob("*.py")]
    if is_bare or not there:
        there = [other.stem for folder in SHIPPED for other in folder.glob("*.py")]
    what = "is a folder" if file.is_dir() else "does not exist"
    if is_bare and file.is_file():
        what = f"is no shipped config, and a file is named by its path: ./{name}"
    raise FileNotFoundError(f"the config file {name} {what}; {choices(file.name, there)}")


def _execute(
    path: pathlib.Path, variant: str
) -> tuple[ml_collections.ConfigDict, Callable[..., None] | None]:
    """Execute a config file once and call its get_config -> (config, its `finish` if it has one).

    A .json file, such as the config.json of a run, is data and runs nothing. VARIANTS of the file
    lists the variants that it has, if it is there.
    Raises ConfigError, naming file and line, for any error inside.
    """
    if path.suffix == ".json":
        return saved_config(read_json(path), str(path)), None
    module = types.ModuleType(f"config_{path.stem}")
    module.__file__ = str(path)
    with _told(path):
        exec(compile(path.read_bytes(), str(path), "exec"), vars(module))
        known = getattr(module, "VARIANTS", (variant,))
        if variant and variant not in known:
            raise ConfigError(f"variant {variant!r} is unknown; {choices(variant, known)}")
        config = module.get_config(variant) if variant else module.get_config()
        if not isinstance(config, ml_collections.ConfigDict):
            raise ConfigError(f"get_config() = {config!r:.80} should be a ConfigDict")
    return config, getattr(module, "finish", None)


@contextlib.contextmanager
def _told(path: pathlib.Path) -> Iterator[None]:
    """Turn an error inside a config file into a ConfigError with its file and line."""
    try:
        yield
    except (Exception, SystemExit) as error:
        words = " ".join(f"{_place(path, error)}: {error}".split())
        raise ConfigError(words if len(words) < 500 else f"{words[:500]} ...") from error


def saved_config(record: Mapping[str, Any], where: str) -> ml_collections.ConfigDict:
    """Make the config out of what a run saved beside it; ConfigError, naming `where`, if broken."""
    if "config" not in record:
        raise ConfigError(f"{where} holds {', '.join(record) or 'nothing'} and should hold config")
    return from_data(record["config"], where)


def _place(path: pathlib.Path, error: BaseException) -> str:
    """Name the file and the line where an error arose, and its kind if that is no ValueError."""
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == str(path)]
    if isinstance(error, SyntaxError) and error.filename == str(path):
        lines = [error.lineno]
    place = f"{path}:{lines[-1]}" if lines else str(path)
    return place if isinstance(error, ValueError) else f"{place}: {type(error).__name__}"


def _split(override: str) -> tuple[str, "_Text"]:
    key, equals, text = override.removeprefix(PREFIX).partition("=")
    if not (override.startswith(PREFIX) and equals and all(key.split("."))):
        raise ConfigError(f"{override} should be --config.section.key=value")
    return key, _Text(text)


class _Text(str):
    """A value as it stands on a command line."""


def _override(config: ml_collections.ConfigDict, key: str, value: Any) -> None:
    *sections, last = key.split(".")
    for section in sections:
        if section not in config:
            config[section] = ml_collections.ConfigDict()
        config = config[section]
        if not isinstance(config, ml_collections.ConfigDict):
            raise ConfigError(
                f"config.{key} = {value!r} cannot be set: {section!r} is a value and has no keys"
            )
    if isinstance(value, str) and value == DELETE:
        if last not in config:
            raise ConfigError(f"config.{key} is not there to be deleted; {choices(last, config)}")
        del config[last]
        return
    kind = _type_of(config, last) if last in config else type(None)
    value = _of_type(kind, value, f"config.{key}")
    if value is None and kind is ml_collections.ConfigDict:
        if not sections:
            raise ConfigError(f"config.{key} = None should be a dict of keys, or `{DELETE}`")
        del config[last]  # which a plain value, even None, may not replace
    config[last] = value


def _type_of(config: ml_collections.ConfigDict, key: str) -> type:
    try:
        return config.get_type(key)
    except config_dict.RequiredValueError:  # a required value that nobody has given yet
        return config.get_ref(key).get_type()


def _of_type(kind: type, value: Any, path: str) -> Any:
    """Return a value as the type that the file has; a text of the command line is read first."""
    if isinstance(value, _Text):
        value = _literal(value, is_text=kind is str)
    if kind is type(None) or value is None:
        return value
    if kind is float and type(value) is int:
        return float(value)
    if kind in (tuple, list):
        if isinstance(value, str) and "," in value:
            value = value.split(",")
        return kind(value) if isinstance(value, (tuple, list)) else kind([value])
    if kind is ml_collections.ConfigDict and isinstance(value, Mapping):
        return value
    if type(value) is not kind:
        wanted = "a dict of keys" if kind is ml_collections.ConfigDict else kind.__name__
        raise ConfigError(f"{path} = {value!r} should be {wanted}")
    return value


def _literal(text: str, *, is_text: bool) -> Any:
    """Read a text as a Python literal if it is one.

    With is_text, a text is wanted: only None and what is quoted is read, all else stays as it is.
    """
    try:
        value = ast.literal_eval(text.capitalize() if text in ("true", "false") else text)
    except (ValueError, SyntaxError):
        return str(text)
    return value if not is_text or value is None or isinstance(value, str) else str(text)
