"""SHA-256 of files, remembered as long as nothing touches them."""

import hashlib
import json
import logging
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from diffusion_jax.data.progress import log_progress

# A network disk answers slowly but many at once.
_READERS = 16
# A file that changed within this many nanoseconds may change again without a newer time.
_SETTLED = 2 * 10**9

_log = logging.getLogger(__name__)


def hash_files(paths: Sequence[Path], memory: Path) -> list[str]:
    """Hash the content of files; the hash of an unreadable file is the name of the error.

    memory: a JSON file that keeps what was hashed. A file is read again when its size, inode or one
    of its times differs; the time of the last change (ctime) cannot be set back by a program.
    """
    known = _read(memory)

    def find(path: Path) -> tuple[list[int], str]:
        try:
            status = path.stat()
            seen = [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]
            if str(path) in known and known[str(path)][0] == seen:
                return seen, known[str(path)][1]
            settled = time.time_ns() - status.st_ctime_ns > _SETTLED
            with path.open("rb") as file:
                return seen if settled else [], hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            return [], f"{type(error).__name__} {error.errno}"

    with ThreadPoolExecutor(_READERS) as pool:
        found = list(log_progress(pool.map(find, paths), len(paths), "reading files"))
    kept = {str(path): pair for path, pair in zip(paths, found, strict=True) if pair[0]}
    if {path: list(pair) for path, pair in kept.items()} != known:
        _write(memory, kept)
    return [digest for _, digest in found]


def _read(memory: Path) -> dict[str, list]:
    try:
        known = json.loads(memory.read_text())
        return {str(path): [list(seen), str(digest)] for path, (seen, digest) in known.items()}
    except OSError:  # not there yet, or _write says why it never will be
        return {}
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        _log.warning("%s is damaged (%s); all files are read again", memory, error)
        return {}


def _write(memory: Path, kept: dict[str, tuple[list[int], str]]) -> None:
    unfinished = memory.with_name(f"{memory.name}.{os.getpid()}")
    try:
        memory.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_text(json.dumps(kept))
        unfinished.replace(memory)
    except OSError as error:
        _log.warning("cannot write %s (%s); the next start reads all files again", memory, error)
