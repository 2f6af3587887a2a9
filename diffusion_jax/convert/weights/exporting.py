"""Write parameters as released weights, with the exact names and axes, leaf by leaf."""

import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from diffusion_jax.convert.weights.names import (
    FileTensor,
    NameMap,
    average_name,
    file_tensors,
    find_kind,
    leaves_of,
    to_file,
)
from diffusion_jax.convert.weights.safetensors import CODES, count_nonfinite, write_safetensors
from diffusion_jax.data.progress import log_progress
from diffusion_jax.types import PyTree
from diffusion_jax.wording import counted

# transformers refuses files that do not say which framework they are for.
METADATA = {"format": "pt"}


class Exported(NamedTuple):
    """What will be written of a network: {name: (shape, dtype)}, and its arrays in this order."""

    described: dict[str, tuple[tuple[int, ...], np.dtype]]
    tensors: Iterator[tuple[str, np.ndarray]]


def export_network(
    params: PyTree, path: str | os.PathLike, kind: str, *, dtype: Any = None
) -> None:
    """Write one network into a new .safetensors file that import_network reads back.

    kind: "unet", "dit", "vae", "clip text" or "clip vision". CLIP gets the names of transformers,
    the others the names of the original implementations. dtype: None keeps the dtype of each leaf.
    Raises ValueError for an unknown kind, and what export_params and save_weights raise.
    """
    save_weights(path, [export_params(params, find_kind(kind).name_map, dtype=dtype)])


def export_params(
    params: PyTree,
    name_map: NameMap | str,
    prefix: str = "",
    *,
    dtype: Any = None,
    ema: bool = False,
    nonfinite: bool = False,
) -> Exported:
    """Translate parameters into the tensors of a file, one at a time.

    dtype: None keeps the dtype of each leaf. ema: the parameters are averages, and get the names
    of averages (see average_name). nonfinite: NaN and infinite numbers are written, too.
    On a pod every process has to iterate over the tensors, because split leaves are gathered.
    Raises ValueError when a dtype cannot be written or two leaves would get one name; and, while
    the tensors are read, for numbers that are NaN, infinite or too large for the dtype.
    """
    leaves = leaves_of(params)
    wanted = file_tensors(params, name_map)

    def name(tensor: FileTensor) -> str:
        return average_name(prefix, tensor.name) if ema else prefix + tensor.name

    def kind(tensor: FileTensor) -> np.dtype:
        chosen = np.dtype(leaves[tensor.parts[0].path].dtype if dtype is None else dtype)
        if chosen not in CODES:
            raise ValueError(f"dtype {chosen} of {tensor.name} cannot be written as safetensors")
        return chosen

    described = {name(tensor): (tensor.shape, kind(tensor)) for tensor in wanted}
    return Exported(
        described,
        ((name(tensor), _gather(tensor, leaves, kind(tensor), nonfinite)) for tensor in wanted),
    )


def save_weights(
    path: str | os.PathLike,
    exported: Iterable[Exported],
    extras: Mapping[str, np.ndarray] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write networks and extra arrays (such as buffers) into one new .safetensors file.

    metadata: words for its header.

    The file appears only when it is complete; on a pod process 0 writes it. The host holds at most
    one tensor beside the parameters.
    Raises FileExistsError when there is something at path, ValueError for another suffix or when
    two tensors have one name.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"{path} should end in .safetensors")
    if path.exists():
        raise FileExistsError(f"{path} exists; choose another name or remove it")
    parts = [*exported, _extra(extras or {})]
    described: dict[str, Any] = {}
    for part in parts:
        twice = described.keys() & part.described.keys()
        if twice:
            raise ValueError(f"{path} would hold {min(twice)} twice")
        described |= part.described
    tensors = (pair for part in parts for pair in part.tensors)
    if jax.process_index() != 0:
        for _ in tensors:
            pass
        return
    check_target(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with unfinished.open("xb") as file:
            shown = log_progress(tensors, len(described), f"writing {path.name}")
            write_safetensors(file, described, shown, METADATA | dict(metadata or {}))
            file.flush()
            os.fsync(file.fileno())
        unfinished.rename(path)
    finally:
        unfinished.unlink(missing_ok=True)


def check_target(path: Path) -> None:
    """Raise ValueError, naming what stands in the way, when a new file cannot be written."""
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if not folder.is_dir():
        raise ValueError(f"{path} cannot be written: {folder} is a file")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(f"{path} cannot be written: the folder {folder} is read-only")


def _extra(extras: Mapping[str, np.ndarray]) -> Exported:
    arrays = {name: np.asarray(array) for name, array in extras.items()}
    described = {name: (array.shape, array.dtype) for name, array in arrays.items()}
    return Exported(described, iter(arrays.items()))


def _gather(
    tensor: FileTensor, leaves: Mapping[str, Any], dtype: np.dtype, nonfinite: bool
) -> np.ndarray:
    arrays = [to_file(on_host(leaves[part.path], part.index), tensor.axes) for part in tensor.parts]
    array = arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
    return as_written(tensor.name, array, dtype, nonfinite)


def as_written(name: str, array: np.ndarray, dtype: np.dtype, nonfinite: bool) -> np.ndarray:
    """Cast the numbers of a tensor to the dtype of the file.

    Raises ValueError for numbers that are NaN, infinite or too large for it, unless nonfinite.
    """
    with np.errstate(over="ignore"):  # it is an error below
        cast = array.astype(dtype, copy=False)
    count = 0 if nonfinite else count_nonfinite(cast)
    if not count:
        return cast
    lost = count - count_nonfinite(array)
    if lost:
        raise ValueError(
            f"{counted(lost, f'number of {name} becomes', f'numbers of {name} become')} infinite "
            f"as {dtype}; choose dtype = bfloat16 or float32, or --nonfinite to write them all the "
            "same"
        )
    raise ValueError(
        f"{counted(count, f'number of {name} is', f'numbers of {name} are')} NaN or infinite; "
        "--nonfinite writes them all the same"
    )


def on_host(leaf: Any, index: int | None = None) -> np.ndarray:
    """Fetch a leaf, or one block of a stacked one, to the host; on a pod all processes call it."""
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        leaf = multihost_utils.process_allgather(leaf, tiled=True)
    return np.asarray(leaf if index is None else leaf[index])
