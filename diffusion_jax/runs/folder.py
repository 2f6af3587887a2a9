"""The folder of one run: its name, its saved config, and whom it belongs to."""

import contextlib
import datetime
import fcntl
import itertools
import pathlib
import pprint
import subprocess
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np
from jax.experimental import multihost_utils

from diffusion_jax.experiment.config_files import load_config, load_config_file

SAVED_CONFIG = "configs/config.py"
LOCK = ".lock"
_GIT_SECONDS = 10.0
# What may differ when a run is continued: how long, how fast, where, and what is watched; never
# what a step computes. lr_schedule is among them because it is as long as the run.
MAY_CHANGE = (
    "train.num_steps",
    "lr_schedule",
    "mesh",
    "hooks",
    "checkpoint",
    "sampler",
    "discretization",
    "guidance",
    "data.source.data_dir",
    "data.source.download",
    "data.batches.cache",
    "data.batches.num_threads",
    "data.batches.num_workers",
    "data.batches.prefetch",
)

# What may differ when a run is drawn from, evaluated or exported: how, and on which data and
# devices, never what was trained.
MAY_CHANGE_LATER = (
    "sampler",
    "guidance",
    "discretization",
    "data",
    "mesh",
    "train.batch_size",
    "first_stage.samples_at_a_time",
    "first_stage.tile",
)


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


def has_run(workdir: pathlib.Path) -> bool:
    """Tell whether a folder holds a run: its saved config is there."""
    return (workdir / SAVED_CONFIG).is_file()


def check(workdir: pathlib.Path, config: ml_collections.ConfigDict) -> None:
    """Find out, writing nothing, whether a folder may become, or is, the home of a config.

    Raises ValueError when it belongs to another config (naming every difference) or holds files
    that are not a run's.
    """
    if has_run(workdir):
        different = differences(load_saved_config(workdir), config)
        if different:
            raise ValueError(
                f"{workdir} belongs to another config, which differs in {'; '.join(different)}: "
                "choose another --workdir, or continue it with --resume and its own config"
            )
        return
    mine = {LOCK, pathlib.Path(SAVED_CONFIG).parts[0]}  # what a start that was cut short leaves
    if workdir.is_file() or (workdir.is_dir() and {p.name for p in workdir.iterdir()} - mine):
        raise ValueError(
            f"{workdir} exists and is not the folder of a run; choose another --workdir"
        )


@contextlib.contextmanager
def claim(workdir: pathlib.Path, config: ml_collections.ConfigDict) -> Iterator[None]:
    """Make a folder the home of a config, and keep other processes out until the block is left.

    Raises what `check` raises, ValueError when another process trains there, and OSError when the
    folder cannot be written.
    """
    check(workdir, config)
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
        save_config(workdir, config)
        yield


@contextlib.contextmanager
def claim_for_all(workdir: pathlib.Path, config: ml_collections.ConfigDict) -> Iterator[None]:
    """Claim the folder of a run in process 0 on behalf of all, see claim.

    Raises what claim raises; ValueError in the other processes, which wait for it.
    """
    with contextlib.ExitStack() as stack:
        if jax.process_count() == 1:
            stack.enter_context(claim(workdir, config))
        else:
            _together(lambda: stack.enter_context(claim(workdir, config)), workdir)
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


def save_config(workdir: pathlib.Path, config: ml_collections.ConfigDict) -> pathlib.Path:
    """Write the resolved config as a Python file that `--config` takes again."""
    path = workdir / SAVED_CONFIG
    text = pprint.pformat(to_plain(config), width=100, sort_dicts=True)
    module = (
        '"""The resolved config of this run; pass it as --config to repeat it."""\n\n'
        "import ml_collections\n\nCONFIG = "
        f"{text}\n\n\ndef get_config():\n    return ml_collections.ConfigDict(CONFIG)\n"
    )
    temporary = path.with_suffix(".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(module)
        temporary.replace(path)
    except OSError as error:
        raise _cannot_write(workdir, error) from error
    return path


def _cannot_write(workdir: pathlib.Path, error: OSError) -> OSError:
    reason = error.strerror or str(error)
    return type(error)(
        f"cannot write the run folder {workdir}: {reason}; choose another --workdir or --logdir"
    )


def load_saved_config(workdir: pathlib.Path) -> ml_collections.ConfigDict:
    """Read the config that a run was started with; FileNotFoundError when there is no run."""
    path = workdir / SAVED_CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"{workdir} is not the folder of a run: {path} does not exist")
    return load_config_file(path)


def load_run_config(
    workdir: pathlib.Path, overrides: Sequence[str] = ()
) -> ml_collections.ConfigDict:
    """Read the config that a run was started with, and override what does not change its model.

    Raises FileNotFoundError when the folder holds no run, ValueError for an override of anything
    else than MAY_CHANGE_LATER.
    """
    saved = load_saved_config(workdir)
    if not overrides:
        return saved
    config = load_config(str(workdir / SAVED_CONFIG), overrides)
    wrong = differences(saved, config, MAY_CHANGE_LATER)
    if wrong:
        raise ValueError(
            f"{workdir} was trained with another config, which differs in {'; '.join(wrong)}: only "
            f"config.{', config.'.join(MAY_CHANGE_LATER)} can be changed afterwards"
        )
    return config


def differences(
    ours: ml_collections.ConfigDict,
    theirs: ml_collections.ConfigDict,
    may_change: Sequence[str] = MAY_CHANGE,
) -> list[str]:
    """List 'path: ours -> theirs' for every leaf that differs, but for sections that may change."""
    left, right = dict(_leaves(to_plain(ours))), dict(_leaves(to_plain(theirs)))
    paths = sorted(set(left) | set(right))
    return [
        f"{path}: {left.get(path, 'unset')!r} -> {right.get(path, 'unset')!r}"
        for path in paths
        if left.get(path, "unset") != right.get(path, "unset")
        and not any(path == free or path.startswith(free + ".") for free in may_change)
    ]


def to_plain(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """Resolve references and placeholders into nested dicts of Python values."""
    return _plain(config.to_dict())


def git_revision() -> str:
    """Return the git revision of the code, '+' for uncommitted changes, 'unknown' without git."""
    package = pathlib.Path(__file__).parent
    try:
        revision = _git(package, "rev-parse", "HEAD")
        return revision + ("+" if _git(package, "status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"  # an installed package has no repository; the run is recorded all the same


def _git(folder: pathlib.Path, *command: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(folder), *command],
        capture_output=True,
        text=True,
        check=True,
        timeout=_GIT_SECONDS,
    )
    return done.stdout.strip()


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return tuple(_plain(item) for item in value)
    return value


def _leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
