"""Checkpoints that torch.save wrote, read without torch and without running what they hold.

Such a file is a ZIP of a pickle and the raw bytes of every storage (before PyTorch 1.6: pickles and
bytes one after the other). A pickle is a program: it may name any function and call it. Here the
few names from which tensors are made resolve, names of libraries that trainers leave behind (INERT)
become objects that do nothing, and every other name is refused.
"""

import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from diffusion_jax.convert.weights.safetensors import LazyTensor, read_array

STORAGES: dict[str, Any] = {
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
}
# Packages whose objects trainers store beside the weights: callbacks, configs, metrics.
INERT = frozenset(
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
OLD_NAMES = {"__builtin__": "builtins", "copy_reg": "copyreg"}
LEGACY_MAGIC = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19"
_LOCAL_HEADER = 30
# What pickle.Unpickler raises for a stream of nonsense, besides ValueError.
_DAMAGE = (
    pickle.UnpicklingError,
    AttributeError,
    EOFError,
    IndexError,
    KeyError,
    MemoryError,
    OverflowError,
    TypeError,
)


class Inert:
    """A stand-in for an object of another library, which takes everything and does nothing."""

    def __call__(self, *args: Any, **kwargs: Any) -> "Inert":
        """Stand in for what the call would make."""
        return Inert()

    def _ignore(self, *args: Any, **kwargs: Any) -> None:
        pass

    __init__ = __setstate__ = __setitem__ = append = extend = add = _ignore


class _Kind(NamedTuple):
    """What a pickle gets for a dtype: a tuple, because a pickle could change a dtype's state."""

    dtype: np.dtype


class _Storage(NamedTuple):
    """Numbers in a file that start at byte places[member], or at -1 if they are compressed."""

    path: Path
    member: str
    places: Mapping[str, int]
    dtype: np.dtype
    size: int


def read_torch(path: str | Path) -> dict[str, LazyTensor]:
    """Read the names and shapes of a checkpoint's tensors: {name: tensor}, loaded when asked for.

    A "state_dict" inside is unwrapped; everything that is no tensor is left out.
    Raises ValueError, naming the file, when torch.save did not write it, it is damaged, holds no
    tensors, or names something that is refused.
    """
    path = Path(path)
    with path.open("rb") as file:
        old = LEGACY_MAGIC in file.read(32)
    try:
        content = _read_old(path) if old else _read_archive(path)
    except zipfile.BadZipFile as error:
        raise ValueError(
            f"{path} is cut off or damaged ({error}); download or copy it again"
        ) from error
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    tensors = {}
    if isinstance(content, dict):
        tensors = {str(k): v for k, v in content.items() if isinstance(v, LazyTensor)}
    if not tensors:
        is_dict = isinstance(content, dict)
        held = sorted(map(str, content))[:5] if is_dict else type(content).__name__
        raise ValueError(
            f"{path} holds no tensors by name, at its top or under 'state_dict', but {held}"
        )
    return tensors


def _read_archive(path: Path) -> Any:
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        pickles = [name for name in names if name.rpartition("/")[2] == "data.pkl"]
        if len(pickles) != 1:
            raise ValueError(f"{path} is a ZIP file, but no PyTorch checkpoint: it has no data.pkl")
        root = pickles[0].removesuffix("data.pkl")
        if f"{root}byteorder" in names and archive.read(f"{root}byteorder") != b"little":
            raise ValueError(f"{path} holds big-endian numbers; save it again on a common machine")

        def locate(key: str, dtype: np.dtype, size: int) -> _Storage:
            info = archive.getinfo(f"{root}data/{key}")
            if info.file_size != size * dtype.itemsize:
                raise ValueError(
                    f"{path} is damaged: {info.filename} has {info.file_size} bytes for {size} "
                    f"{dtype}"
                )
            stored = info.compress_type == zipfile.ZIP_STORED
            places = {info.filename: _data_offset(path, info) if stored else -1}
            return _Storage(path, info.filename, places, dtype, size)

        with archive.open(pickles[0]) as file:
            return _unpickle(file, path, locate)


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
        return _Storage(path, key, places, dtype, size)

    with path.open("rb") as file:
        _, version, machine, content, keys = (_unpickle(file, path, locate) for _ in range(5))
        if version != 1001 or not isinstance(machine, dict) or not machine.get("little_endian"):
            raise ValueError(f"{path} is of a version or machine that is not known: {version}")
        offset = file.tell()
        for key in keys:
            dtype, size = kinds[key] if key in kinds else (None, -1)
            file.seek(offset)
            if dtype is None or int.from_bytes(file.read(8), "little") != size:
                raise ValueError(f"{path} is cut off or damaged at the storage {key}")
            places[key] = offset + 8
            offset = places[key] + size * dtype.itemsize
    if offset > path.stat().st_size or set(places) != set(kinds):
        raise ValueError(f"{path} is cut off: not all of its numbers are there; copy it again")
    return content


def _unpickle(file: Any, path: Path, locate: Callable[..., _Storage]) -> Any:
    try:
        return _Unpickler(file, path, locate).load()
    except ValueError as error:
        if str(path) in str(error):
            raise
        raise ValueError(f"{path} has a damaged pickle: {error}") from error
    except _DAMAGE as error:
        raise ValueError(f"{path} has a damaged pickle: {error}") from error


class _Unpickler(pickle.Unpickler):
    """pickle.Unpickler with its look-ups decided here.

    A pickle may also set the state of an object that it looked up, so every look-up makes a new
    function, class or tuple.
    """

    def __init__(self, file: Any, path: Path, locate: Callable[..., _Storage]) -> None:
        super().__init__(file, encoding="utf-8")
        self.path, self.locate = path, locate

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch._utils" and name == "_rebuild_tensor_v2":
            return lambda *arguments: self.tensor(*arguments)
        if module == "torch._utils" and name == "_rebuild_parameter":
            return lambda data, *_: data
        if module == "torch" and name in STORAGES:
            return _Kind(np.dtype(STORAGES[name]))
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module in ("torch._utils", "torch._tensor"):
            raise ValueError(
                f"{self.path} stores a tensor by {module}.{name}, which is not read here; save it "
                "again as .safetensors where PyTorch is"
            )
        root = OLD_NAMES[module] if module in OLD_NAMES else module
        if root.partition(".")[0] in INERT or name in INERT_NAMES.get(root, ()):
            return type("Inert", (Inert,), {})
        raise ValueError(
            f"{self.path} asks for {module}.{name}, which is no part of a list of weights and may "
            "be harmful code; nothing was run. Get this model as a .safetensors file, or convert "
            "it where you trust it"
        )

    def persistent_load(self, pid: Any) -> _Storage:
        what, kind, key, _, size, *view = pid
        known = what == "storage" and isinstance(kind, _Kind) and isinstance(key, str)
        if not known or not isinstance(size, int) or size < 0 or view not in ([], [None]):
            raise ValueError(f"{self.path} stores tensors in an unknown way: {pid}")
        return self.locate(key, kind.dtype, size)

    def tensor(
        self, storage: _Storage, offset: int, shape: Any, strides: Any, *_: Any
    ) -> LazyTensor:
        """Stand in for torch's function: a view of a storage, checked to stay inside of it."""
        shape, strides = tuple(shape), tuple(strides)
        whole = all(isinstance(n, int) and n >= 0 for n in (offset, *shape, *strides))
        last = sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
        empty = 0 in shape
        if (
            not whole
            or not isinstance(storage, _Storage)
            or (not empty and offset + last >= storage.size)
        ):
            raise ValueError(
                f"{self.path} is damaged: a tensor {shape} with strides {strides} at {offset} "
                "leaves its storage"
            )
        count = 0 if empty else last + 1
        return LazyTensor(
            shape, storage.dtype, lambda: _load(storage, offset, count, shape, strides)
        )


def _load(
    storage: _Storage, offset: int, count: int, shape: tuple[int, ...], strides: tuple[int, ...]
) -> np.ndarray:
    size, place = storage.dtype.itemsize, storage.places[storage.member]
    if place >= 0:
        flat = read_array(storage.path, place + offset * size, (count,), storage.dtype)
    else:
        with zipfile.ZipFile(storage.path) as archive:
            raw = np.frombuffer(archive.read(storage.member), storage.dtype)
        flat = raw[offset : offset + count]
    if count == 0:
        return np.zeros(shape, storage.dtype)
    strides = tuple(stride * size for stride in strides)
    return np.lib.stride_tricks.as_strided(flat, shape, strides, writeable=False)
