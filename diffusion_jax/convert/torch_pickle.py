"""Checkpoints that torch.save wrote, read without torch and without running what they hold.

Such a file is a ZIP of a pickle and the raw bytes of every storage. A pickle is a program: it may
name any function and call it. Here only three kinds of names resolve: the few from which tensors
are made; those of libraries that trainers leave behind (INERT), which become objects that do
nothing; every other name is refused.
"""

import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from diffusion_jax.convert.safetensors import LazyTensor, read_array

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
INERT = (
    "argparse",
    "datetime",
    "lightning",
    "lightning_fabric",
    "lightning_utilities",
    "numpy",
    "omegaconf",
    "pathlib",
    "pytorch_lightning",
    "torch",
    "torchmetrics",
    "typing",
)
# Harmless names of other modules that come with those: sets, counters, types, the bytes of scalars.
INERT_NAMES = {
    "_codecs": ("encode",),
    "collections": ("Counter", "defaultdict", "deque"),
    "copyreg": ("_reconstructor",),
    "builtins": ("bool", "bytes", "dict", "float", "frozenset", "int", "list", "object", "set")
    + ("slice", "str", "tuple", "type"),
}
OLD_NAMES = {"__builtin__": "builtins", "copy_reg": "copyreg"}
_LOCAL_HEADER = 30


class Inert:
    """What stands for an object of another library: it takes everything and does nothing."""

    def __new__(cls, *args: Any, **kwargs: Any) -> "Inert":
        return object.__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __call__(self, *args: Any, **kwargs: Any) -> "Inert":
        return Inert()

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, value: Any) -> None:
        pass

    def extend(self, values: Any) -> None:
        pass

    def add(self, value: Any) -> None:
        pass


class _Storage(NamedTuple):
    path: Path
    member: str
    offset: int
    dtype: np.dtype
    size: int


def read_torch(path: str | Path) -> dict[str, LazyTensor]:
    """Read the names and shapes of a checkpoint's tensors: {name: tensor}, loaded when asked for.

    A "state_dict" inside is unwrapped; what is no tensor is left out.
    Raises ValueError, naming the file, when it is no such file, is damaged, holds no tensors, or
    names something that is refused.
    """
    path = Path(path)
    try:
        with zipfile.ZipFile(path) as archive:
            content = _unpickle(path, archive)
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
        held = (
            sorted(map(str, content))[:5] if isinstance(content, dict) else type(content).__name__
        )
        raise ValueError(
            f"{path} holds no tensors by name, at its top or under 'state_dict', but {held}"
        )
    return tensors


def _unpickle(path: Path, archive: zipfile.ZipFile) -> Any:
    names = archive.namelist()
    pickles = [name for name in names if name.rpartition("/")[2] == "data.pkl"]
    if len(pickles) != 1:
        raise ValueError(f"{path} is a ZIP file, but no PyTorch checkpoint: it has no data.pkl")
    root = pickles[0].removesuffix("data.pkl")
    if f"{root}byteorder" in names and archive.read(f"{root}byteorder") != b"little":
        raise ValueError(f"{path} holds big-endian numbers; save it again on a common machine")
    with archive.open(pickles[0]) as file:
        reader = _Unpickler(file, path, archive, root)
        try:
            return reader.load()
        except ValueError as error:
            if str(path) in str(error):
                raise
            raise ValueError(f"{path} has a damaged pickle: {error}") from error
        except (
            pickle.UnpicklingError,
            EOFError,
            AttributeError,
            IndexError,
            KeyError,
            TypeError,
            UnicodeDecodeError,
        ) as error:
            raise ValueError(f"{path} has a damaged pickle: {error}") from error


class _Unpickler(pickle.Unpickler):
    """The standard machine; what it may look up is decided here."""

    def __init__(self, file: Any, path: Path, archive: zipfile.ZipFile, root: str) -> None:
        super().__init__(file, encoding="utf-8")
        self.path, self.archive, self.root = path, archive, root

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch._utils" and name == "_rebuild_tensor_v2":
            return self.tensor
        if module == "torch._utils" and name == "_rebuild_parameter":
            return lambda data, *_: data
        if module == "torch" and name in STORAGES:
            return np.dtype(STORAGES[name])
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        root = OLD_NAMES[module] if module in OLD_NAMES else module
        if root.partition(".")[0] in INERT or name in INERT_NAMES.get(root, ()):
            return type("Inert", (Inert,), {})
        raise ValueError(
            f"{self.path} asks for {module}.{name}, which is no part of a list of weights and may "
            "be harmful code; nothing was run. Get this model as a .safetensors file, or convert "
            "it where you trust it"
        )

    def persistent_load(self, pid: Any) -> _Storage:
        kind, dtype, key, _, size = pid
        if kind != "storage" or not isinstance(dtype, np.dtype):
            raise ValueError(f"{self.path} stores tensors in an unknown way ({kind}, {dtype})")
        member = f"{self.root}data/{key}"
        info = self.archive.getinfo(member)
        if info.file_size != size * dtype.itemsize:
            raise ValueError(
                f"{self.path} is damaged: {member} has {info.file_size} bytes for {size} {dtype}"
            )
        offset = -1
        if info.compress_type == zipfile.ZIP_STORED:
            offset = self._data_offset(info)
        return _Storage(self.path, member, offset, dtype, size)

    def _data_offset(self, info: zipfile.ZipInfo) -> int:
        with self.path.open("rb") as file:
            file.seek(info.header_offset)
            header = file.read(_LOCAL_HEADER)
        lengths = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
        offset = info.header_offset + _LOCAL_HEADER + lengths
        if header[:4] != b"PK\x03\x04" or offset + info.file_size > self.path.stat().st_size:
            raise ValueError(f"{self.path} is cut off or damaged at {info.filename}")
        return offset

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
    size = storage.dtype.itemsize
    if storage.offset >= 0:
        flat = read_array(storage.path, storage.offset + offset * size, (count,), storage.dtype)
    else:
        with zipfile.ZipFile(storage.path) as archive:
            raw = np.frombuffer(archive.read(storage.member), storage.dtype)
        flat = raw[offset : offset + count]
    if count == 0:
        return np.zeros(shape, storage.dtype)
    strides = tuple(stride * size for stride in strides)
    return np.lib.stride_tricks.as_strided(flat, shape, strides, writeable=False)
