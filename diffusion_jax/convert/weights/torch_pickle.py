"""Checkpoints that torch.save wrote, read without torch and without running what they hold.

Such a file is a ZIP of a pickle and the raw bytes of every storage (before PyTorch 1.6: pickles and
bytes one after the other). A pickle is a program: it may name any function and call it. Here the
few names from which tensors are made resolve, names of libraries that trainers leave behind
(INERT_ROOTS) stand for nothing, and every other name is refused.
"""

import io
import reprlib
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from diffusion_jax.convert.weights.pickle_machine import INERT, MAX_BYTES, Answers, run_pickle
from diffusion_jax.convert.weights.safetensors import LazyTensor, read_array

# The dtypes of storages, and of tensors that name theirs, by PyTorch's names.
DTYPES: dict[str, Any] = {
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": jnp.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
    "UntypedStorage": np.uint8,
    "float8_e4m3fn": jnp.float8_e4m3fn,
    "float8_e5m2": jnp.float8_e5m2,
    "uint16": np.uint16,
    "uint32": np.uint32,
    "uint64": np.uint64,
}
# Packages whose objects trainers store beside the weights: callbacks, configs, metrics.
INERT_ROOTS = frozenset(
    "argparse datetime lightning lightning_fabric lightning_utilities numpy omegaconf pathlib "
    "pytorch_lightning torch torchmetrics typing".split()
)
# Harmless names of other modules: sets, counters, types, the bytes of scalars.
INERT_NAMES = {
    "_codecs": ("encode",),
    "collections": ("Counter", "defaultdict", "deque"),
    "copyreg": ("_reconstructor",),
    "builtins": ("bool", "bytes", "dict", "float", "frozenset", "int", "list", "object", "set")
    + ("slice", "str", "tuple", "type"),
}
# Trainers keep the weights in a dictionary of one of these names; the first is taken.
WRAPPERS = ("state_dict", "model_state_dict", "model", "module", "params_ema", "params", "ema")
# Where AUTOMATIC1111's web interface keeps the vectors of new tokens.
INVERSION = "string_to_param"
OLD_NAMES = {"__builtin__": "builtins", "copy_reg": "copyreg"}
LEGACY_MAGIC = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19"
# An archive lists its members in a directory at its end; 16 MiB are more than 100,000 members.
MAX_DIRECTORY = 2**24
_END, _LONG_END, _END_BYTES = b"PK\x05\x06", b"PK\x06\x06", 2**16 + 98
_LOCAL_HEADER = 30
# What zipfile raises for an archive of nonsense.
_DAMAGE = (zipfile.BadZipFile, NotImplementedError, UnicodeDecodeError, zlib.error, EOFError)
_BLOCK = 2**24


class _Kind(NamedTuple):
    """What a pickle gets for the name of a dtype."""

    dtype: np.dtype


class _Maker(NamedTuple):
    """What a pickle gets for a function that makes something: tensor, typed, parameter, dict."""

    name: str


_MAKERS = {
    ("torch._utils", "_rebuild_tensor_v2"): "tensor",
    ("torch._utils", "_rebuild_tensor_v3"): "typed",
    ("torch._utils", "_rebuild_parameter"): "parameter",
    ("torch._utils", "_rebuild_parameter_with_state"): "parameter",
    ("collections", "OrderedDict"): "dict",
}


class _Storage(NamedTuple):
    """Numbers in a file: (number of the first, count) -> an array [count]."""

    dtype: np.dtype
    size: int
    read: Callable[[int, int], np.ndarray]


Locate = Callable[[str, np.dtype, int], _Storage]


def read_torch(path: str | Path) -> dict[str, LazyTensor]:
    """Read the names and shapes of a checkpoint's tensors: {name: tensor}, loaded when asked for.

    Dictionaries named as in WRAPPERS are unwrapped; everything that is no tensor is left out.
    Raises ValueError, naming the file, when torch.save did not write it, it is damaged, encrypted,
    holds no tensors or more than fits a list of weights, or names something that is refused; and
    when a tensor is loaded, if its bytes differ from their checksum.
    """
    path = Path(path)
    with path.open("rb") as file:
        old = LEGACY_MAGIC in file.read(32)
    try:
        content = _read_old(path) if old else _read_archive(path)
    except _DAMAGE as error:
        raise ValueError(
            f"{path} is cut off or damaged ({error}); download or copy it again"
        ) from error
    tensors = _tensors_of(content) if isinstance(content, dict) else {}
    if not tensors:
        is_dict = isinstance(content, dict)
        held = reprlib.repr(sorted(map(str, content))) if is_dict else type(content).__name__
        raise ValueError(
            f"{path} holds no tensors by name, at its top or under a name such as "
            f"{', '.join(WRAPPERS)}, but {held}"
        )
    return tensors


def _tensors_of(content: Mapping[Any, Any]) -> dict[str, LazyTensor]:
    """Collect the tensors of a dictionary, or of the dictionary with the weights inside of it."""
    for _ in WRAPPERS:
        inner = (content[name] for name in WRAPPERS if isinstance(content.get(name), dict))
        content = next(inner, content)
    if isinstance(content.get(INVERSION), dict):
        content = {f"{INVERSION}/{name}": value for name, value in content[INVERSION].items()}
    return {str(name): v for name, v in content.items() if isinstance(v, LazyTensor)}


def _read_archive(path: Path) -> Any:
    _check_directory(path)
    with zipfile.ZipFile(path) as archive:
        members = {info.filename: info for info in archive.infolist()}
        if len(members) != len(archive.infolist()):
            raise ValueError(f"{path} is damaged: it names one of its members twice")
        for name, info in members.items():
            if info.header_offset < 0:
                raise ValueError(f"{path} is cut off or damaged at {name}")
            if info.flag_bits & 1:
                raise ValueError(f"{path} is encrypted; decrypt it before it is used here")
            if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise ValueError(f"{path} holds {name} in a compression that is not read")
    pickles = [name for name in members if name.rpartition("/")[2] == "data.pkl"]
    if any(name.rpartition("/")[2] == "constants.pkl" for name in members):
        raise ValueError(f"{path} is a TorchScript program, which is not read or run")
    if len(pickles) != 1:
        raise ValueError(f"{path} is a ZIP file, but no PyTorch checkpoint: it has no data.pkl")
    root = pickles[0].removesuffix("data.pkl")
    order = members[f"{root}byteorder"] if f"{root}byteorder" in members else None
    if order is not None and _read_member(path, order).tobytes() != b"little":
        raise ValueError(f"{path} holds big-endian numbers; save it again on a common machine")
    checked: set[str] = set()

    def locate(key: str, dtype: np.dtype, size: int) -> _Storage:
        info = members[f"{root}data/{key}"]
        if info.file_size != size * dtype.itemsize:
            raise ValueError(
                f"{path} is damaged: {info.filename} has {info.file_size} bytes for {size} {dtype}"
            )
        if info.compress_type == zipfile.ZIP_STORED:
            _data_offset(path, info)

        def read(first: int, count: int) -> np.ndarray:
            places = first * dtype.itemsize, count * dtype.itemsize
            raw = _read_member(path, info, *places, check=key not in checked)
            checked.add(key)
            return raw.view(dtype)

        return _Storage(dtype, size, read)

    info = members[pickles[0]]
    if info.file_size > MAX_BYTES:
        raise ValueError(f"{path} has a damaged pickle: it has {info.file_size:,} bytes")
    return _unpickle(io.BytesIO(_read_member(path, info).tobytes()), path, locate)


def _check_directory(path: Path) -> None:
    """Raise ValueError for an archive with more members than any list of weights has."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _END_BYTES))
        tail = file.read()
    end, long = tail.rfind(_END), tail.rfind(_LONG_END)
    size = int.from_bytes(tail[end + 12 : end + 16], "little") if end >= 0 else 0
    size = int.from_bytes(tail[long + 40 : long + 48], "little") if long >= 0 else size
    if size > MAX_DIRECTORY:
        raise ValueError(f"{path} is a ZIP file with {size:,} bytes of names, and not of weights")


def _read_member(
    path: Path, info: zipfile.ZipInfo, first: int = 0, count: int | None = None, check: bool = True
) -> np.ndarray:
    """Read bytes of a member of an archive, and compare its checksum; 0 stands for none."""
    count = info.file_size if count is None else count
    if info.compress_type == zipfile.ZIP_DEFLATED:
        try:
            with zipfile.ZipFile(path) as archive, archive.open(info) as file:
                file.seek(first)
                raw = np.frombuffer(file.read(count), np.uint8)
                while file.read(_BLOCK):  # zipfile compares the checksum at the end
                    pass
        except _DAMAGE as error:
            raise ValueError(
                f"{path} is damaged at {info.filename} ({error}); download or copy it again"
            ) from error
        if len(raw) != count:
            raise ValueError(f"{path} is cut off or damaged at {info.filename}")
        return raw
    place, checksum = _data_offset(path, info), 0
    raw = read_array(path, place + first, (count,), np.dtype(np.uint8))
    if check and info.CRC:
        whole = count == info.file_size
        for start in range(0, info.file_size, _BLOCK):
            size = min(_BLOCK, info.file_size - start)
            block = raw[start : start + size] if whole else None
            block = read_array(path, place + start, (size,), raw.dtype) if block is None else block
            checksum = zlib.crc32(block.data, checksum)
        if checksum != info.CRC:
            raise ValueError(
                f"{path} is damaged: {info.filename} differs from its checksum; download or copy "
                "it again"
            )
    return raw


def _data_offset(path: Path, info: zipfile.ZipInfo) -> int:
    with path.open("rb") as file:
        file.seek(info.header_offset)
        header = file.read(_LOCAL_HEADER)
    lengths = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
    offset = info.header_offset + _LOCAL_HEADER + lengths
    if header[:4] != b"PK\x03\x04" or offset + info.file_size > path.stat().st_size:
        raise ValueError(f"{path} is cut off or damaged at {info.filename}")
    return offset


def _read_old(path: Path) -> Any:
    """Read the format before 1.6: magic, version, machine, content, keys, then the storages."""
    places: dict[str, int] = {}
    kinds: dict[str, tuple[np.dtype, int]] = {}

    def locate(key: str, dtype: np.dtype, size: int) -> _Storage:
        if kinds.setdefault(key, (dtype, size)) != (dtype, size):
            raise ValueError(f"{path} is damaged: it says two things of the storage {key}")

        def read(first: int, count: int) -> np.ndarray:
            return read_array(path, places[key] + first * dtype.itemsize, (count,), dtype)

        return _Storage(dtype, size, read)

    with path.open("rb") as file:
        head = io.BytesIO(file.read(MAX_BYTES))
        _, version, machine, content, keys = (_unpickle(head, path, locate) for _ in range(5))
        if version != 1001 or not isinstance(machine, dict) or not machine.get("little_endian"):
            shown = reprlib.repr(version)
            raise ValueError(f"{path} is of a version or machine that is not known: {shown}")
        offset = head.tell()
        for key in keys if isinstance(keys, list) else ():
            known = isinstance(key, str) and key in kinds
            dtype, size = kinds[key] if known else (None, -1)
            file.seek(offset)
            if dtype is None or int.from_bytes(file.read(8), "little") != size:
                shown = reprlib.repr(key)
                raise ValueError(f"{path} is cut off or damaged at the storage {shown}")
            places[key] = offset + 8
            offset = places[key] + size * dtype.itemsize
    if offset > path.stat().st_size or set(places) != set(kinds):
        raise ValueError(f"{path} is cut off: not all of its numbers are there; copy it again")
    return content


def _unpickle(file: io.BytesIO, path: Path, locate: Locate) -> Any:
    def look_up(module: str, name: str) -> Any:
        return _look_up(path, module, name)

    def call(what: Any, arguments: tuple) -> Any:
        return _call(path, what, arguments)

    def load(pid: Any) -> _Storage:
        what, kind, key, _, size, *view = pid
        known = what == "storage" and isinstance(kind, _Kind) and isinstance(key, str)
        if not known or not isinstance(size, int) or size < 0 or view not in ([], [None]):
            raise ValueError(f"{path} stores tensors in an unknown way: {reprlib.repr(pid)}")
        return locate(key, kind.dtype, size)

    try:
        return run_pickle(file, Answers(look_up, call, load))
    except ValueError as error:
        if str(path) in str(error):
            raise
        raise ValueError(f"{path} has a damaged pickle: {error}") from error


def _look_up(path: Path, module: str, name: str) -> Any:
    if (module, name) in _MAKERS:
        return _Maker(_MAKERS[module, name])
    if module in ("torch", "torch.storage") and name in DTYPES:
        return _Kind(np.dtype(DTYPES[name]))
    if module in ("torch._utils", "torch._tensor"):
        raise ValueError(
            f"{path} stores a tensor by {module}.{name}, which is not read here; save it again as "
            ".safetensors where PyTorch is"
        )
    root = OLD_NAMES[module] if module in OLD_NAMES else module
    if root.partition(".")[0] in INERT_ROOTS or name in INERT_NAMES.get(root, ()):
        return INERT
    raise ValueError(
        f"{path} asks for {module}.{name}, which is no part of a list of weights and may be "
        "harmful code; nothing was run. Get this model as a .safetensors file, or convert it where "
        "you trust it"
    )


def _call(path: Path, what: Any, arguments: tuple) -> Any:
    maker = what.name if isinstance(what, _Maker) else None
    if maker == "dict":
        return dict(pair for pair in arguments[0] if isinstance(pair[0], str)) if arguments else {}
    if maker == "parameter":
        return arguments[0]
    if maker == "tensor":
        return _tensor(path, *arguments[:4])
    if maker == "typed":
        storage, offset, shape, strides, _, _, kind, *_ = arguments
        if not isinstance(kind, _Kind) or not isinstance(storage, _Storage):
            raise ValueError(f"{path} stores a tensor of a dtype that is not read here")
        size = kind.dtype.itemsize // storage.dtype.itemsize

        def read(first: int, count: int) -> np.ndarray:
            return storage.read(first * size, count * size).view(kind.dtype)

        typed = _Storage(kind.dtype, storage.size // size, read)
        return _tensor(path, typed, offset, shape, strides)
    return INERT


def _tensor(path: Path, storage: Any, offset: int, shape: Any, strides: Any) -> LazyTensor:
    """Describe a view of a storage, checked to stay inside of it."""
    shape, strides = tuple(shape), tuple(strides)
    whole = all(isinstance(n, int) and n >= 0 for n in (offset, *shape, *strides))
    last = sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    empty = 0 in shape
    if (
        not whole
        or not isinstance(storage, _Storage)
        or (not empty and offset + last >= storage.size)
    ):
        view = reprlib.repr((offset, shape, strides))
        raise ValueError(
            f"{path} is damaged: a tensor with (offset, shape, strides) {view} leaves its storage"
        )

    def load() -> np.ndarray:
        if empty:
            return np.zeros(shape, storage.dtype)
        size = storage.dtype.itemsize
        steps = tuple(stride * size for stride in strides)
        flat = storage.read(offset, last + 1).view(f"u{size}")  # as_strided knows no float8
        strided = np.lib.stride_tricks.as_strided(flat, shape, steps, writeable=False)
        return strided.view(storage.dtype)

    return LazyTensor(shape, storage.dtype, load)
