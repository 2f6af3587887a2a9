"""Prepare a data set once and find it again, or fail within seconds instead of minutes."""

import contextlib
import difflib
import fcntl
import io
import logging
import os
import re
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import tensorflow_datasets as tfds
from tensorflow_datasets.core import naming, read_only_builder, registered
from tensorflow_datasets.core.utils import tqdm_utils

# Seconds to wait for the host of a data set before saying that it cannot be reached.
_CONNECT_TIMEOUT = 5
_REMOVE_SECONDS = 60.0
_LOOK_SECONDS = 0.1

_log = logging.getLogger(__name__)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep TFDS from drawing progress bars and announcing downloads where there are none.

    `prepare` logs the one line that matters.
    """
    tfds_log = logging.getLogger("absl")
    level, bars = tfds_log.level, tqdm_utils._active
    tfds_log.setLevel(logging.ERROR)
    tqdm_utils.display_progress_bar(False)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        tfds_log.setLevel(level)
        tqdm_utils.display_progress_bar(bars)


def prepare(builder: tfds.core.DatasetBuilder) -> None:
    """Prepare as ArrayRecord unless that was done or another process is doing it right now.

    TFDS writes into a folder of its own per process and renames it at the end; whoever comes second
    finds the name taken, and the data of the first is as good. What killed processes have left is
    removed, and a log line says how much earlier versions of the same folder take.

    Raises:
        OSError: the data directory cannot be written.
    """
    if builder.is_prepared():
        return
    target = Path(builder.data_dir)
    place = target.parent.parent if builder.builder_config else target.parent
    _log.info("preparing %s in %s%s", builder.info.full_name, target, _others(target, place))
    no_bucket = tfds.download.DownloadConfig(try_download_gcs=False)
    try:
        with _without_leftovers(place):
            builder.download_and_prepare(file_format="array_record", download_config=no_bucket)
    except (OSError, RuntimeError) as error:
        # ArrayRecord says with a RuntimeError that a disk is full.
        if isinstance(error, RuntimeError) and "write() failed" not in str(error):
            raise
        if not (target / "dataset_info.json").exists():
            raise OSError(
                f"data_dir: {builder.info.full_name} could not be prepared in {target} "
                f"({type(error).__name__}: {error})"
            ) from error
        builder.info.read_from_directory(target)


@contextlib.contextmanager
def _without_leftovers(place: Path) -> Iterator[None]:
    """Prepare inside: first remove what dead processes have left of the data sets in a folder.

    Whoever prepares there holds the lock together with others, and the system takes it from dead
    processes; so who gets it alone knows that what is incomplete belongs to nobody.
    """
    place.mkdir(parents=True, exist_ok=True)
    with (place / ".lock").open("a") as lock:
        if _locks(lock, fcntl.LOCK_EX):
            for folder in [*place.glob("incomplete.*"), *place.glob("*/incomplete.*")]:
                shutil.rmtree(folder)
        _locks(lock, fcntl.LOCK_SH, _REMOVE_SECONDS)  # at most while another process removes
        yield


def _locks(lock: IO[str], kind: int, seconds: float = 0.0) -> bool:
    """Take a lock; False when another process holds it for longer or the disk knows no locks."""
    until = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(lock, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > until:
                return False
        except OSError:
            return False
        else:
            return True
        time.sleep(_LOOK_SECONDS)


def _others(target: Path, place: Path) -> str:
    """Say how much space other versions of the same folder of images take."""
    stem = re.fullmatch(r"(.+-)[0-9a-f]{12}", target.parent.name)
    others = [path for path in place.glob(f"{stem[1]}*") if path != target.parent] if stem else []
    size = sum(file.stat().st_size for path in others for file in path.rglob("*") if file.is_file())
    return f"; {len(others)} other versions take {size / 1e6:.1f} MB there" if size else ""


def prepared_builder(
    name: str, *, data_dir: str, download: bool, **builder_config: Any
) -> tfds.core.DatasetBuilder:
    """Find a builder whose data are on disk, or with download=True fetch and prepare them.

    Raises:
        FileNotFoundError, ConnectionError, ModuleNotFoundError, ValueError: as open_source.
    """
    if (Path(name) / "features.json").exists():
        return tfds.builder_from_directory(name)
    if name.startswith((".", "/", "~")):
        raise FileNotFoundError(
            f"{name} is not a prepared TFDS data set, which is a folder with features.json and "
            "dataset_info.json"
        )
    try:
        naming.parse_builder_name_kwargs(name)
    except ValueError as error:  # its words are a page
        raise ValueError(
            f"{name!r} is no name of a TFDS data set; write name, name/config or name:1.2.3"
        ) from error
    if name.startswith("huggingface:") and not download:  # TFDS would ask the web for half a minute
        raise FileNotFoundError(
            f"the data set {name!r} is on the web; set download=True to fetch it"
        )
    try:
        return read_only_builder.builder_from_files(name, data_dir=data_dir, **builder_config)
    except registered.DatasetNotFoundError:
        builder = _builder_from_code(name, data_dir, builder_config)
    if not download:
        raise FileNotFoundError(
            f"the data set {name!r} is not prepared in {data_dir}; set download=True to fetch "
            f"{builder.info.download_size or 'it'} now, or {_elsewhere(name)}"
        )
    _check_reachable(name, builder)
    try:
        prepare(builder)
    except ImportError as error:
        raise ModuleNotFoundError(
            f"preparing {name!r} needs a package that is not installed ({error}); reading it does "
            f"not, so {_elsewhere(name)}"
        ) from error
    return builder


def _builder_from_code(
    name: str, data_dir: str, builder_config: dict[str, Any]
) -> tfds.core.DatasetBuilder:
    try:
        return tfds.builder(name, data_dir=data_dir, **builder_config)
    except registered.DatasetNotFoundError as error:
        known = tfds.list_builders(with_community_datasets=False)
        close = difflib.get_close_matches(name, known, n=3)
        hint = f", did you mean {' or '.join(close)}?" if close else ""
        raise ValueError(
            f"TFDS knows no data set {name!r} and none is prepared in {data_dir}{hint}"
        ) from error
    except ImportError as error:
        raise FileNotFoundError(
            f"the data set {name!r} is not prepared in {data_dir}, and its builder needs a package "
            f"that is not installed ({error}); {_elsewhere(name)}"
        ) from error
    except (AssertionError, ValueError, TypeError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"the data set {name!r} does not take {builder_config or 'this configuration'}: "
            f"{reason[:300]}"
        ) from error


def _check_reachable(name: str, builder: tfds.core.DatasetBuilder) -> None:
    """One request with a short timeout, since TFDS retries an unreachable host for minutes."""
    urls = list(type(builder).url_infos or {})
    if not urls:
        return
    try:
        with urllib.request.urlopen(urls[0], timeout=_CONNECT_TIMEOUT):
            pass
    except urllib.error.HTTPError:
        return  # the host is there; whether it likes this request is for the download to find out
    except OSError as error:
        raise ConnectionError(
            f"the data set {name!r} is not prepared in {os.fspath(builder.data_dir)} and {urls[0]} "
            f"does not answer ({type(error).__name__}); with a network, {_elsewhere(name)}"
        ) from error


def _elsewhere(name: str) -> str:
    return (
        f"prepare it on another machine (tfds build {name} --file_format=array_record) and pass "
        "its data_dir"
    )
