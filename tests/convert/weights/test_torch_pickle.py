"""Files by torch.save without torch: the tensors of a real one, and pickles that try more."""

import os
import pickle
import random
import re
import time
import zipfile
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.convert.weights import pickle_machine
from diffusion_jax.convert.weights.pickle_machine import Inert
from diffusion_jax.convert.weights.torch_pickle import read_torch

CKPT = Path(__file__).parents[1] / "data/lightning.ckpt"
OLD = Path(__file__).parents[1] / "data/old.pth"


@pytest.mark.parametrize("path", [CKPT, OLD])
def test_real_checkpoints_give_their_tensors(path):
    tensors = {name.removeprefix("model."): t for name, t in read_torch(path).items()}
    full = np.arange(24, dtype=np.float32).reshape(4, 6) / 8
    expected = {
        "full": full,
        "transposed": full.T,
        "part": full[1:3, ::2],
        "parameter": np.array([1.5, -2.0], np.float32),
        "half": np.array([0.5, 65504.0], np.float16),
        "bfloat16": np.array([[1.0], [-3.0]], jnp.bfloat16),
        "count": np.array(7),
        "mask": np.array([True, False]),
        "empty": np.zeros((0, 3), np.float32),
    }
    assert list(tensors) == list(expected)
    for name, array in expected.items():
        assert (tensors[name].shape, tensors[name].dtype) == (array.shape, array.dtype), name
        np.testing.assert_array_equal(tensors[name].load(), array, err_msg=name)


def test_compressed_archives_are_read_too(tmp_path):
    path = tmp_path / "x.ckpt"
    with zipfile.ZipFile(CKPT) as old, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    for name, tensor in read_torch(CKPT).items():
        np.testing.assert_array_equal(read_torch(path)[name].load(), tensor.load())


class Call:
    """Pickles as a call of a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def archive(path, content, protocol=2, **members):
    """Write a file as torch.save does, around any pickle."""
    with zipfile.ZipFile(path, "w") as file:
        data = content if isinstance(content, bytes) else pickle.dumps(content, protocol)
        file.writestr("archive/data.pkl", data)
        for name, value in members.items():
            file.writestr(f"archive/{name}", value)
    return path


def mark(path):
    """What malicious code would do."""
    Path(path).touch()


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize(
    ("function", "name"),
    [
        (os.system, r"(posix|nt|os)\.system"),
        (exec, r"(builtins|__builtin__)\.exec"),
        (eval, r"(builtins|__builtin__)\.eval"),
        (getattr, r"(builtins|__builtin__)\.getattr"),
        (__import__, r"(builtins|__builtin__)\.__import__"),
        (os.putenv, r"(posix|nt|os)\.putenv"),
    ],
)
def test_code_is_refused_by_name(function, name, protocol, tmp_path):
    harm = tmp_path / "harm"
    path = archive(tmp_path / "x.ckpt", {"a": Call(function, f"touch {harm}")}, protocol)
    with pytest.raises(ValueError, match=rf"asks for {name}, .*nothing was run.*safetensors"):
        read_torch(path)
    assert not harm.exists()


@pytest.mark.parametrize(
    "lines",
    [
        b"ctorch.hub\nload\n(S'x'\ntR.",
        b"cnumpy.testing._private.utils\nrunstring\n(S'open(%r,chr(119))'\n(dtR.",
        b"cpathlib\nPath.touch\n(S'%s'\ntR.",
        b"ctorch\nload.__globals__\n.",
    ],
)
def test_names_of_known_libraries_do_nothing(lines, tmp_path):
    harm = tmp_path / "harm"
    path = archive(tmp_path / "x.ckpt", b"\x80\x02" + lines.replace(b"%s", bytes(harm)))
    with pytest.raises(ValueError, match="holds no tensors by name.*(Inert|type)"):
        read_torch(path)
    assert not harm.exists()


@pytest.mark.parametrize(
    "looked_up",
    [b"ctorch\nFloatStorage\n", b"ctorch._utils\n_rebuild_tensor_v2\n", b"ctorch\nload\n"],
)
def test_the_state_of_what_is_looked_up_cannot_be_set(looked_up, tmp_path):
    """The opcode b gives an object a state: None or attributes here."""

    def seen():
        dtype = str(np.dtype(np.float32).__reduce__())
        return dict(vars(Inert)), dtype

    before = seen()
    for state in (b"(I3\nS'<'\nNNNI4\nI4\nI16\nt", b"N}S'__call__'\nI1\ns\x86"):
        path = archive(tmp_path / "x.ckpt", b"\x80\x02" + looked_up + state + b"b.")
        with pytest.raises(ValueError, match="damaged pickle|holds no tensors"):
            read_torch(path)
    assert seen() == before


def tensor_pickle(offset=0, shape=(2,), strides=(1,), size=2, kind="FloatStorage", key="0"):
    """Write the opcodes of one tensor, in which every number can lie."""

    def numbers(values):
        return b"(" + b"".join(b"I%d\n" % value for value in values) + b"t"

    return (
        b"\x80\x02}U\x01xctorch._utils\n_rebuild_tensor_v2\n("
        + b"(U\x07storagectorch\n%s\nU\x01%sU\x03cpuI%d\ntQ" % (kind.encode(), key.encode(), size)
        + b"I%d\n" % offset
        + numbers(shape)
        + numbers(strides)
        + b"I00\n}tRs."
    )


def test_the_pickle_written_here_is_read(tmp_path):
    data = np.array([3.0, 4.0], np.float32).tobytes()
    path = archive(tmp_path / "x.pt", tensor_pickle(), **{"data/0": data})
    assert read_torch(path)["x"].load().tolist() == [3.0, 4.0]


@pytest.mark.parametrize(
    "numbers",
    [
        {"shape": (3,)},
        {"offset": 1},
        {"offset": -1},
        {"strides": (2,)},
        {"strides": (-1,)},
        {"shape": (2, 2), "strides": (1, 1)},
        {"shape": (1, 2), "strides": (10**9, 2)},
    ],
)
def test_tensors_that_leave_their_storage_are_refused(numbers, tmp_path):
    path = archive(tmp_path / "x.pt", tensor_pickle(**numbers), **{"data/0": bytes(8)})
    with pytest.raises(ValueError, match="leaves its storage"):
        read_torch(path)


@pytest.mark.parametrize(
    ("content", "members", "message"),
    [
        (tensor_pickle(size=3), {"data/0": bytes(8)}, "has 8 bytes for 3 float32"),
        (tensor_pickle(), {}, "damaged pickle"),
        (tensor_pickle(kind="Size"), {"data/0": bytes(8)}, "stores tensors in an unknown way"),
        (tensor_pickle()[:-9], {"data/0": bytes(8)}, "damaged pickle"),
        (b"\x80\x02(1234.", {}, "damaged pickle"),
        (b"\x80\x63.", {}, "damaged pickle"),
        ({"epoch": 1}, {}, r"holds no tensors by name.*\['epoch'\]"),
        ([1], {}, "holds no tensors by name.*list"),
        (tensor_pickle(), {"data/0": bytes(8), "byteorder": b"big"}, "big-endian"),
    ],
)
def test_damaged_pickles_are_told(content, members, message, tmp_path):
    path = archive(tmp_path / "x.pt", content, **members)
    with pytest.raises(ValueError, match=message) as error:
        read_torch(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("around", [b"}U\x0astate_dict", b"}U\x05model}U\x06module", b"}U\x03ema"])
def test_dictionaries_of_trainers_are_unwrapped(around, tmp_path):
    inner = tensor_pickle().removeprefix(b"\x80\x02").removesuffix(b".")
    content = b"\x80\x02" + around + inner + b"s" * around.count(b"}") + b"."
    path = archive(tmp_path / "x.pt", content, **{"data/0": bytes(8)})
    assert list(read_torch(path)) == ["x"]


def test_a_dictionary_that_holds_itself_is_told(tmp_path):
    path = archive(tmp_path / "x.pt", b"\x80\x02}q\x00U\x05modelh\x00s.")
    with pytest.raises(ValueError, match="holds no tensors by name"):
        read_torch(path)


def test_archives_of_other_things_are_told(tmp_path):
    path = tmp_path / "x.ckpt"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("word/document.xml", "<x/>")
    with pytest.raises(ValueError, match="a ZIP file, but no PyTorch checkpoint"):
        read_torch(path)
    archive(path, {}, **{"constants.pkl": b"x"})
    with pytest.raises(ValueError, match="a TorchScript program, which is not read or run"):
        read_torch(path)


@pytest.mark.filterwarnings("ignore:invalid escape sequence")
@pytest.mark.parametrize("kind", ["stored", "compressed", "old"])
def test_any_change_of_a_file_is_read_or_told(kind, tmp_path):
    path, draw = tmp_path / "x.ckpt", random.Random(0)
    content = (OLD if kind == "old" else CKPT).read_bytes()
    if kind == "compressed":
        with zipfile.ZipFile(CKPT) as old, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
            for name in old.namelist():
                new.writestr(name, old.read(name))
        content = path.read_bytes()
    for _ in range(200):
        changed, place = bytearray(content), draw.randrange(len(content))
        changed[place : place + draw.randrange(3)] = draw.randbytes(draw.randrange(3))
        path.write_bytes(changed)
        try:
            for tensor in read_torch(path).values():
                tensor.load()
        except ValueError as error:
            assert str(path) in str(error)


@pytest.mark.parametrize("kept", [0.3, 0.6, 0.9, 0.999])
@pytest.mark.parametrize("whole", [CKPT, OLD])
def test_cut_off_files_are_told(whole, kept, tmp_path):
    content = whole.read_bytes()
    path = tmp_path / "x.ckpt"
    path.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(ValueError, match=r"x.ckpt (is cut off|has a damaged pickle)"):
        read_torch(path)


def test_old_files_that_lie_are_told(tmp_path):
    content, path = OLD.read_bytes(), tmp_path / "x.pth"
    swapped = re.sub(rb"(little_endianq.)\x88", b"\\1\x89", content)
    # The length before the numbers of a storage: 24 float32.
    longer = content.replace((24).to_bytes(8, "little"), (25).to_bytes(8, "little"))
    for changed, message in ((swapped, "version or machine"), (longer, "damaged at the storage")):
        assert changed != content
        path.write_bytes(changed)
        with pytest.raises(ValueError, match=message):
            read_torch(path)


def test_tensors_of_other_kinds_are_not_left_out_in_silence(tmp_path):
    path = archive(tmp_path / "x.pt", b"\x80\x02ctorch._utils\n_rebuild_sparse_tensor\n.")
    with pytest.raises(ValueError, match="by torch._utils._rebuild_sparse_tensor, which is not"):
        read_torch(path)


@pytest.mark.parametrize("name", ["float8_e4m3fn", "float8_e5m2"])
def test_tensors_that_name_their_dtype_are_read(name, tmp_path):
    """torch.save writes float8 so: an untyped storage, and the dtype with the tensor."""
    storage = b"(U\x07storagectorch.storage\nUntypedStorage\nU\x010U\x03cpuI4\ntQ"
    start = b"\x80\x02}U\x01xctorch._utils\n_rebuild_tensor_v3\n(" + storage
    content = start + b"I1\n(I3\nt(I1\nt\x89}ctorch\n" + name.encode() + b"\ntRs."
    numbers = np.array([9.0, 0.5, -2.0, 448.0], getattr(jnp, name))
    tensor = read_torch(archive(tmp_path / "x.pt", content, **{"data/0": numbers.tobytes()}))["x"]
    assert tensor.dtype == numbers.dtype
    np.testing.assert_array_equal(tensor.load(), numbers[1:])


_DOUBLED = b")" + b"2\x86" * 60  # a tuple of two equal tuples, sixty times


@pytest.mark.parametrize(
    "content",
    [
        b"}" + _DOUBLED + b"Ns.",
        b"(" + _DOUBLED + b"\x91.",
        b"\x8f(" + _DOUBLED + b"\x90.",
        _DOUBLED + b"Q.",
        b"}r\xff\xff\xff\x7f.",
        b"\x96" + (2**42).to_bytes(8, "little") + b".",
        b"\x8d" + (2**42).to_bytes(8, "little") + b".",
        b"\x95" + (2**42).to_bytes(8, "little") + b"N.",
        b"L" + b"9" * 400_000 + b"L\n.",
        b"]" * 40_000 + b"a" * 39_999 + b".",
        b"N" * 200_000 + b".",
        b"N" * 100_000_000 + b".",
    ],
    ids="hash frozenset set repr memo bytes text frame long deep count size".split(),
)
def test_bombs_are_refused_at_once(content, tmp_path, monkeypatch):
    """Short pickles that would take minutes or gigabytes: the archive is compressed here."""
    monkeypatch.setattr(pickle_machine, "MAX_INSTRUCTIONS", 100_000)  # types are checked in tests
    path = tmp_path / "x.ckpt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("archive/data.pkl", b"\x80\x04" + content)
    start = time.process_time()
    with pytest.raises(ValueError, match="x.ckpt (has a damaged pickle|holds no tensors)"):
        read_torch(path)
    assert time.process_time() - start < 2.0


def test_changed_bytes_differ_from_their_checksum(tmp_path):
    path = archive(tmp_path / "x.pt", tensor_pickle(), **{"data/0": b"\x01\x02\x03\x04" * 2})
    content = path.read_bytes()
    path.write_bytes(content.replace(b"\x01\x02\x03\x04" * 2, b"\x01\x02\x03\x04\x01\x02\x03\x05"))
    with pytest.raises(ValueError, match="data/0 differs from its checksum"):
        read_torch(path)["x"].load()
    part = archive(tmp_path / "part.pt", tensor_pickle(shape=(1,)), **{"data/0": b"abcdefgh"})
    part.write_bytes(part.read_bytes().replace(b"abcdefgh", b"abcdefgX"))
    with pytest.raises(ValueError, match="data/0 differs from its checksum"):
        read_torch(part)["x"].load()


def test_archives_without_checksums_are_read(tmp_path):
    """torch.serialization.set_crc32_options(False) writes 0 in their place."""
    path = archive(tmp_path / "x.pt", tensor_pickle(), **{"data/0": bytes(8)})
    with zipfile.ZipFile(path) as file:
        sums = {info.CRC.to_bytes(4, "little") for info in file.infolist()}
    content = path.read_bytes()
    for checksum in sums:
        content = content.replace(checksum, bytes(4))
    path.write_bytes(content)
    assert read_torch(path)["x"].load().tolist() == [0.0, 0.0]


def test_archives_that_cannot_be_read_are_told(tmp_path):
    path = archive(tmp_path / "x.pt", tensor_pickle(), **{"data/0": bytes(8)})
    encrypted = bytearray(path.read_bytes())
    encrypted[encrypted.index(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(encrypted)
    with pytest.raises(ValueError, match="is encrypted; decrypt it"):
        read_torch(path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_LZMA) as file:
        file.writestr("archive/data.pkl", tensor_pickle())
    with pytest.raises(ValueError, match="data.pkl in a compression that is not read"):
        read_torch(path)
    with zipfile.ZipFile(path, "w") as file, pytest.warns(UserWarning, match="Duplicate name"):
        file.writestr("archive/data.pkl", tensor_pickle())
        file.writestr("archive/data.pkl", tensor_pickle())
    with pytest.raises(ValueError, match="names one of its members twice"):
        read_torch(path)
    path.write_bytes(b"PK" + bytes(100) + b"PK\x05\x06" + bytes(8) + b"\xff\xff\xff\x7f" + bytes(6))
    with pytest.raises(ValueError, match="2,147,483,647 bytes of names, and not of weights"):
        read_torch(path)
