"""What a set of images is to a metric, and its file: moments of its features, and some of them."""

import hashlib
import zipfile
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from diffusion_jax.data.whole_files import whole_file
from diffusion_jax.metrics.statistics import Kept, Moments, Statistic, keep, moments

FORMAT = 1
# How many features of a set are kept: 256 MB of 1,280 numbers each.
LIMIT = 50_000
# What the statistics of EDM and ADM are called in their files.
_MEAN, _COVARIANCE = "mu", "sigma"


class Summary(NamedTuple):
    """A set of images in the eyes of a feature network.

    features: the name of the network. key: a digest of its weights, None where a file does not say.
    kept: features of the records themselves, None where a file holds moments alone.
    """

    features: str
    key: str | None
    moments: Moments
    kept: Kept | None


def summary(features: str, key: str, *, limit: int = LIMIT) -> Statistic:
    """Make the stream of a Summary over features [b d]."""
    parts = (moments(), keep(limit))

    def update(state: tuple, rows: np.ndarray, ids: np.ndarray) -> tuple:
        return tuple(part.update(own, rows, ids) for part, own in zip(parts, state, strict=True))

    def result(state: tuple) -> Summary:
        found = (part.result(own) for part, own in zip(parts, state, strict=True))
        return Summary(features, key, *found)

    return Statistic(lambda: tuple(part.init() for part in parts), update, result)


def save_summary(path: Path, found: Summary, data: str) -> None:
    """Write a Summary with its checksum, as a whole or not at all.

    data: the key of the images, see load_summary.
    """
    assert found.kept is not None  # what is written here was made here
    arrays = {
        "format": np.int64(FORMAT),
        "features": np.str_(found.features),
        "key": np.str_(found.key),
        "data": np.str_(data),
        "count": np.int64(found.moments.count),
        _MEAN: found.moments.mean,
        _COVARIANCE: found.moments.covariance,
        "ids": found.kept.ids,
        "rows": found.kept.rows,
    }
    save_npz(path, {**arrays, "checksum": np.str_(_checksum(arrays))})


def load_summary(path: Path, features: str, key: str, data: str | None = None) -> Summary:
    """Read what save_summary wrote, or statistics of EDM and ADM (mu and sigma).

    features, key: of the network that is asked for. data: the key of the images, None for any.
    Raises ValueError when the file is damaged, or is of another network or other images.
    """
    arrays = read_npz(path)
    if "checksum" not in arrays:
        return _moments_alone(path, arrays, features)
    labels = {name: str(arrays[name]) for name in ("features", "key", "data") if name in arrays}
    if str(arrays.pop("checksum")) != _checksum(arrays):
        raise ValueError(f"{path} is damaged: its checksum is wrong; delete it to make it again")
    if int(arrays["format"]) != FORMAT:
        raise ValueError(f"{path} has format {arrays['format']}, which should be {FORMAT}")
    if (labels["features"], labels["key"]) != (features, key):
        other = "other weights of " if labels["features"] == features else ""
        raise ValueError(
            f"{path} holds statistics of {other}{labels['features']}; make them with {features} "
            "and the weights that are used now"
        )
    if data is not None and labels["data"] != data:
        raise ValueError(f"{path} holds statistics of other images; delete it to make it again")
    found = Moments(int(arrays["count"]), arrays[_MEAN], arrays[_COVARIANCE])
    return Summary(features, key, found, Kept(arrays["ids"], arrays["rows"]))


def save_npz(path: Path, arrays: dict[str, Any]) -> None:
    """Write arrays to a .npz file, as a whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as partial, partial.open("wb") as file:
        np.savez(file, **arrays)


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """Read the arrays of a .npz file; nothing in it is run.

    Raises FileNotFoundError where there is none, ValueError where it is damaged.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there are no statistics at {path}")
    try:
        with np.load(path, allow_pickle=False) as stored:
            return dict(stored) if isinstance(stored, np.lib.npyio.NpzFile) else {}
    except (ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path} is damaged: it is not a .npz file of arrays") from error


def _moments_alone(path: Path, arrays: dict[str, np.ndarray], features: str) -> Summary:
    if _MEAN not in arrays or _COVARIANCE not in arrays:
        held = ", ".join(arrays) or "one array"
        raise ValueError(f"{path} holds {held}; statistics have {_MEAN} and {_COVARIANCE}")
    mean, covariance = (arrays[name].astype(np.float64) for name in (_MEAN, _COVARIANCE))
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        raise ValueError(
            f"{path} has {_MEAN} of shape {mean.shape} and {_COVARIANCE} of shape "
            f"{covariance.shape}, which should be [d] and [d, d]"
        )
    return Summary(features, None, Moments(0, mean, covariance), None)


def _checksum(arrays: dict[str, Any]) -> str:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        digest.update(f"{name} {array.dtype} {array.shape};".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()
