"""The safetensors format: 8 bytes of header length, a JSON header, and the bytes of the tensors.

It is read and written here and not by the package `safetensors`, whose writer needs every tensor of
a file in memory at once (10 GB on the host for SDXL) and whose NumPy side has no bfloat16.
Source: https://github.com/huggingface/safetensors, "Format".
"""

import functools
import io
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

DTYPES: dict[str, Any] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": jnp.bfloat16,
    "F8_E4M3": jnp.float8_e4m3fn,
    "F8_E5M2": jnp.float8_e5m2,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U64": np.uint64,
    "U32": np.uint32,
    "U16": np.uint16,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
CODES = {np.dtype(dtype): code for code, dtype in DTYPES.items()}
# The official reader refuses longer headers too.
MAX_HEADER = 100_000_000
LENGTH_BYTES = 8
_BLOCK = 2**24


class LazyTensor(NamedTuple):
    """A tensor of a file: its shape and dtype are known, `load` reads its numbers."""

    shape: tuple[int, ...]
    dtype: np.dtype
    load: Callable[[], np.ndarray]


def read_safetensors(path: str | os.PathLike) -> dict[str, LazyTensor]:
    """Read the header of a file: {name: tensor}.

    Raises ValueError, naming the file, when it is cut off or its header does not describe each of
    its bytes once, as the official reader does.
    """
    path = Path(path)
    header, start = _read_header(path)
    _take_metadata(path, header)
    entries = {name: _check_entry(path, name, entry) for name, entry in header.items()}
    last = 0
    for name, (_, _, begin, end) in sorted(entries.items(), key=lambda item: item[1][2:]):
        if begin != last:
            raise ValueError(
                f"{path} has a damaged header: {name} begins at byte {begin} of the content, and "
                f"the tensor before it ends at {last}"
            )
        last = end
    size = path.stat().st_size
    if start + last > size:
        raise ValueError(
            f"{path} is cut off: it has {size} bytes and its tensors end at byte {start + last}; "
            "download or copy it again"
        )
    if start + last < size:
        raise ValueError(
            f"{path} is damaged: it has {size} bytes and its tensors end at byte {start + last}"
        )
    return {
        name: LazyTensor(
            shape, dtype, functools.partial(read_array, path, start + begin, shape, dtype)
        )
        for name, (shape, dtype, begin, _) in entries.items()
    }


def read_metadata(path: str | os.PathLike) -> dict[str, str]:
    """Read the words that the header of a file holds beside its tensors."""
    path = Path(path)
    return _take_metadata(path, _read_header(path)[0])


def _take_metadata(path: Path, header: dict[str, Any]) -> dict[str, str]:
    metadata = header.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata
    is_mapping = isinstance(metadata, dict)
    if not is_mapping or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError(f"{path} has a damaged header: its __metadata__ should map words to words")
    return metadata


def read_array(path: Path, offset: int, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Read one array of little-endian numbers that starts at a byte of a file."""
    count = int(np.prod(shape, dtype=np.int64))
    raw = np.fromfile(path, np.uint8, count * dtype.itemsize, offset=offset)
    if raw.size != count * dtype.itemsize:
        raise ValueError(f"{path} became shorter while it was read")
    return raw.view(dtype).reshape(shape)


def count_nonfinite(array: np.ndarray) -> int:
    """Count the numbers of an array that are NaN or infinite."""
    exponents = {np.dtype(np.float16): 0x7C00, np.dtype(jnp.bfloat16): 0x7F80}
    if array.dtype not in exponents:
        return array.size - int(np.count_nonzero(np.isfinite(array)))
    # NumPy looks at 16-bit numbers one by one; as integers they are many times faster.
    mask = np.uint16(exponents[array.dtype])
    return int(np.count_nonzero((array.view(np.uint16) & mask) == mask))


def _read_header(path: Path) -> tuple[dict[str, Any], int]:
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(LENGTH_BYTES), "little")
        if length > MAX_HEADER:
            raise ValueError(f"{path} is no safetensors file: its header would be {length} bytes")
        if LENGTH_BYTES + length > size:
            raise ValueError(
                f"{path} is cut off: it has {size} bytes, fewer than its header needs; "
                "download or copy it again"
            )
        text = file.read(length)
    try:
        header = json.loads(text, object_pairs_hook=_unique)
    except KeyError as error:
        raise ValueError(f"{path} has a damaged header: it describes {error} twice") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no safetensors file: its header is not JSON") from error
    if not isinstance(header, dict):
        raise ValueError(f"{path} is no safetensors file: its header is not a JSON object")
    return header, LENGTH_BYTES + length


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make a dictionary; KeyError for a name that comes twice, ValueError for half a character."""
    found: dict[str, Any] = {}
    for name, value in pairs:
        name.encode()
        if name in found:
            raise KeyError(name)
        found[name] = value
    return found


def _check_entry(path: Path, name: str, entry: Any) -> tuple[tuple[int, ...], np.dtype, int, int]:
    try:
        shape, code = tuple(entry["shape"]), entry["dtype"]
        begin, end = entry["data_offsets"]
        sane = all(type(n) is int and n >= 0 for n in (*shape, begin, end))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} has a header that does not describe {name}: {entry!r:.80}"
        ) from error
    if not isinstance(code, str) or code not in DTYPES:
        raise ValueError(f"{path} stores {name} as {str(code):.40}; known are {', '.join(DTYPES)}")
    dtype = np.dtype(DTYPES[code])
    if not sane or end - begin != int(np.prod(shape, dtype=object)) * dtype.itemsize:
        raise ValueError(
            f"{path} has a damaged header: {name} is {code} {shape} in bytes {begin} to {end}"
        )
    return shape, dtype, begin, end


def write_safetensors(
    file: io.BufferedIOBase,
    described: Mapping[str, tuple[Sequence[int], Any]],
    tensors: Iterator[tuple[str, np.ndarray]],
    metadata: Mapping[str, str],
) -> None:
    """Write a file tensor by tensor, holding one at a time.

    described: {name: (shape, dtype)} of all; tensors: the same names in the same order, with their
    numbers. Raises ValueError when a tensor is not what was described.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name, (shape, dtype) in described.items():
        dtype = np.dtype(dtype)
        end = offset + int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        entry = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        header[name] = entry
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    # The first tensor starts at a multiple of 8.
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(LENGTH_BYTES, "little") + text)
    written = 0
    for (name, (shape, dtype)), (given, array) in zip(described.items(), tensors, strict=True):
        if (given, tuple(array.shape), array.dtype) != (name, tuple(shape), np.dtype(dtype)):
            raise ValueError(
                f"{name} {tuple(shape)} {np.dtype(dtype)} was announced and "
                f"{given} {array.shape} {array.dtype} came"
            )
        written += _write_array(file, array)
    if written != offset:
        raise ValueError(f"{offset} bytes were announced and {written} were written")


def _write_array(file: io.BufferedIOBase, array: np.ndarray) -> int:
    """Write an array in C order, a slab at a time: a transposed view is never copied whole."""
    if array.ndim == 0 or array.flags.c_contiguous:
        return file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    rows = max(1, _BLOCK // max(1, array[0].nbytes))
    return sum(
        file.write(np.ascontiguousarray(array[i : i + rows]).reshape(-1).view(np.uint8).data)
        for i in range(0, len(array), rows)
    )
