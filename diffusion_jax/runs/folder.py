"""The folder of one run: its name, its saved config, and whom it belongs to."""

import contextlib
import datetime
import fcntl
import itertools
import logging
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np
from jax.experimental import multihost_utils

from diffusion_jax.experiment.config.as_json import read_json, to_data, write_json
from diffusion_jax.experiment.config.binding import ConfigError
from diffusion_jax.experiment.config.files import saved_config
from diffusion_jax.runs.comparison import MAY_CHANGE, differences, override_later
from diffusion_jax.train.checkpoints.reading import DamagedCheckpoint, load_metadata, saved_steps

SAVED_CONFIG = "config.json"
OLD_CONFIG = "configs/config.py"  # of runs of before; it is never executed
LOCK = ".lock"
LATEST = "latest"
_log = logging.getLogger(__name__)


class Record(NamedTuple):
    """What the folder of a run says about it.

    changes: what was changed on purpose, {"step", "path", "old", "new"} each. forked_from: the
    checkpoint that the run began from with all its state, or None.
    """

    config: ml_collections.ConfigDict
    changes: tuple[dict[str, Any], ...] = ()
    forked_from: str | None = None


def new_run_folder(
    logdir: str, config_path: str, *, name: str = "", postfix: str = ""
) -> pathlib.Path:
    """Name a fresh run: logdir/{timestamp}_{name or config}{postfix} (latent-diffusion's naming).

    A number is appended when the folder is there already: jobs of an array start in one second.
    """
    stamp = datetime.datetime.now().strftime("%Y-%m-%dT%H-%M-%S")
    stem, _, variant = pathlib.Path(config_path).name.partition(":")
    label = name or stem.removesuffix(".py") + (f"-{variant}" if variant else "")
    folder = pathlib.Path(logdir) / f"{stamp}_{label}{postfix}"
    copies = (folder.with_name(f"{folder.name}-{number}") for number in itertools.count(2))
    return next(path for path in itertools.chain([folder], copies) if not path.exists())


def point_latest(workdir: pathlib.Path) -> None:
    """Make `latest` beside a run a link to the run; another thing of that name stays."""
    link = workdir.parent / LATEST
    if link.exists() and not link.is_symlink():
        _log.info("%s is no link and stays as it is", link)
        return
    fresh = link.with_name(f".{LATEST}.{os.getpid()}")
    try:
        fresh.symlink_to(workdir.name)
        fresh.replace(link)
    except OSError as error:
        _log.warning("there is no link %s: %s", link, error.strerror)


def without_link(workdir: pathlib.Path) -> pathlib.Path:
    """Follow a link to a run, such as `latest`, which may point to another run soon."""
    return workdir.resolve() if workdir.is_symlink() else workdir


def has_run(workdir: pathlib.Path) -> bool:
    """Tell whether a folder holds a run: its saved config, or checkpoints, which have it too."""
    return (workdir / SAVED_CONFIG).is_file() or bool(saved_steps(workdir / "checkpoints"))


def check(
    workdir: pathlib.Path, config: ml_collections.ConfigDict, named: Sequence[str] = ()
) -> None:
    """Find out, writing nothing, whether a folder may become, or is, the home of a config.

    named: paths of the config that are changed on purpose.
    Raises ValueError when it belongs to another config (naming every difference) or holds files
    that are not a run's.
    """
    if has_run(workdir):
        record = find_record(workdir)[0]
        different = (
            [] if record is None else differences(record.config, config, MAY_CHANGE + tuple(named))
        )
        if different:
            raise ValueError(
                f"{workdir} belongs to another config, which differs in {'; '.join(different)}: "
                "choose another --workdir, or continue it with --resume and its own config; "
                "--change=PATH=VALUE changes a value of a run on purpose"
            )
        return
    # what a start that was cut short leaves
    mine = {LOCK, f"{SAVED_CONFIG}.tmp", OLD_CONFIG.split("/")[0], "checkpoints"}
    if workdir.is_file() or (workdir.is_dir() and {p.name for p in workdir.iterdir()} - mine):
        raise ValueError(
            f"{workdir} exists and is not the folder of a run; choose another --workdir"
        )


@contextlib.contextmanager
def claim(
    workdir: pathlib.Path,
    config: ml_collections.ConfigDict,
    named: Sequence[str] = (),
    *,
    save: bool = True,
) -> Iterator[None]:
    """Make a folder the home of a config, and keep other processes out until the block is left.

    named: see check. save: keep the config in the folder now.
    Raises what `check` raises, ValueError when another process trains there, and OSError when the
    folder cannot be written.
    """
    check(workdir, config, named)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        lock = (workdir / LOCK).open("a")
    except OSError as error:
        raise _cannot_write(workdir, error) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"another process trains in {workdir}; wait for it or choose another --workdir"
            ) from error
        if save:
            save_config(workdir, config)
        yield


@contextlib.contextmanager
def claim_for_all(
    workdir: pathlib.Path,
    config: ml_collections.ConfigDict,
    named: Sequence[str] = (),
    *,
    save: bool = True,
) -> Iterator[None]:
    """Claim the folder of a run in process 0 on behalf of all, see claim.

    Raises what claim raises; ValueError in the other processes, which wait for it.
    """
    with contextlib.ExitStack() as stack:
        if jax.process_count() == 1:
            stack.enter_context(claim(workdir, config, named, save=save))
        else:
            _together(
                lambda: stack.enter_context(claim(workdir, config, named, save=save)), workdir
            )
        yield


def _together(act: Callable[[], Any], workdir: pathlib.Path) -> None:
    failed: Exception | None = None
    if jax.process_index() == 0:
        try:
            act()
        except (ValueError, OSError) as error:
            failed = error
    went_well = multihost_utils.broadcast_one_to_all(np.int32(failed is None))
    if failed is not None:
        raise failed
    if not went_well:
        raise ValueError(f"process 0 could not open {workdir}; its message says why")


def save_config(
    workdir: pathlib.Path,
    config: ml_collections.ConfigDict,
    changes: Sequence[Mapping[str, Any]] = (),
    forked_from: str | None = None,
) -> pathlib.Path:
    """Write what a run is made of as data, whole or not at all; `--config` takes the file too."""
    path = workdir / SAVED_CONFIG
    record = {
        "about": "The config of this run as data; --config=config.json repeats the run.",
        "config": to_data(config),
        "changes": [dict(change) for change in changes],
        "forked_from": forked_from,
    }
    try:
        write_json(path, record)
    except OSError as error:
        raise _cannot_write(workdir, error) from error
    return path


def _cannot_write(workdir: pathlib.Path, error: OSError) -> OSError:
    reason = error.strerror or str(error)
    return type(error)(
        f"cannot write the run folder {workdir}: {reason}; choose another --workdir or --logdir"
    )


def load_saved_config(workdir: pathlib.Path) -> ml_collections.ConfigDict:
    """Read the config that a run was started with, see load_record."""
    return load_record(workdir).config


def load_record(workdir: pathlib.Path) -> Record:
    """Read what the folder of a run says about it; nothing is executed.

    Without a whole config.json, the newest checkpoint tells it.
    Raises FileNotFoundError when there is no run, ConfigError when nothing can be read.
    """
    record, error = find_record(workdir)
    if record is not None:
        if error is not None:
            _log.warning("%s; a checkpoint tells the config of the run", error)
        return record
    if error is not None:
        raise ConfigError(f"{error}; name the config of the run: --config=FILE --workdir={workdir}")
    old = ""
    if (workdir / OLD_CONFIG).is_file():
        program = workdir / OLD_CONFIG
        old = f"; {OLD_CONFIG} is a program, which runs only when it is named: --config={program}"
    raise FileNotFoundError(
        f"{workdir} is not the folder of a run: {workdir / SAVED_CONFIG} does not exist{old}"
    )


def find_record(workdir: pathlib.Path) -> tuple[Record | None, ConfigError | None]:
    """Find the record of a run, None if there is none -> (record, what is wrong with its file)."""
    path, wrong = workdir / SAVED_CONFIG, None
    if path.is_file():
        try:
            return _record(read_json(path), str(path)), None
        except ConfigError as error:
            wrong = error
    directory = workdir / "checkpoints"
    for step in reversed(saved_steps(directory)):
        try:
            return _record(load_metadata(directory, step=step), f"{directory}/{step}"), wrong
        except (DamagedCheckpoint, ConfigError) as error:
            _log.info("%s", error)
    return None, wrong


def _record(data: Mapping[str, Any], where: str) -> Record:
    config = saved_config(data, where)
    changes = tuple(data["changes"]) if "changes" in data else ()
    return Record(config, changes, data["forked_from"] if "forked_from" in data else None)


def load_run_config(
    workdir: pathlib.Path, overrides: Sequence[str] | Mapping[str, Any] = ()
) -> ml_collections.ConfigDict:
    """Read the config that a run was started with, and override what does not change its model.

    Raises FileNotFoundError when the folder holds no run, ValueError for an override of anything
    else than MAY_CHANGE_LATER.
    """
    return override_later(load_saved_config(workdir), overrides, str(workdir))
