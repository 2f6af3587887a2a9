"""Folders of images as people have them: what is wrong is told, what is odd is survived."""

import io
import os
import re
import socket
import struct
import zlib
from pathlib import Path

import pytest
from faults.frame import BadInput, Fault, bad_inputs, faults
from PIL import Image

from diffusion_jax.data.batches import make_batches
from diffusion_jax.data.records import captions_of
from diffusion_jax.data.sources.open_source import class_names, open_source


def opened(place, **options):
    """The data set of PLACE/photos, prepared in PLACE/tfds."""
    given = {"folder": place / "photos", "data_dir": place / "tfds"} | options
    return open_source("image_folder", "train", **given)


def encoded(mode="RGB", form="PNG", size=(8, 8), **options):
    file = io.BytesIO()
    Image.new(mode, size).save(file, form, **options)
    return file.getvalue()


def fill(folder, files):
    """Write {name: bytes, text, None for an image, or a function that makes it}."""
    photos = folder / "photos"
    photos.mkdir(exist_ok=True)
    for name, content in files.items():
        path = Path(os.fsdecode(os.fsencode(photos) + b"/" + os.fsencode(name)))
        path.parent.mkdir(parents=True, exist_ok=True)
        if callable(content):
            content(path)
        else:
            data = encoded() if content is None else content
            path.write_bytes(data if isinstance(data, bytes) else data.encode())


def link(target):
    return lambda path: path.symlink_to(target)


def itself(path):
    path.symlink_to(path)


def bind_socket(path):
    socket.socket(socket.AF_UNIX).bind(os.path.relpath(path))


def wrong(name, says, files, **options):
    def act(folder):
        fill(folder, files)
        places = {k: str(v).format(folder=folder) for k, v in options.items()}
        source = opened(folder, **places)
        next(make_batches(source, batch_size=1, image_size=8).iterate(0))

    return BadInput(name, act, says)


HEADER = r"metadata\.csv:1 should be a header with file_name"
TABLES = {
    "semicolons": ("file_name;text\n0.png;fox\n", HEADER),
    "tabs": ("file_name\ttext\n0.png\tfox\n", HEADER),
    "no file_name": ("image,text\n0.png,fox\n", HEADER),
    "a column twice": ("file_name,text,text\n0.png,a,b\n", HEADER),
    "nothing at all": ("", HEADER),
    "only a header": ("file_name,text\n", "holds no lines"),
    "a short row": ("file_name,text,label\n0.png,fox\n", ":2 should have 3 fields"),
    "a comma in a text": ("file_name,text\n0.png,red, fox\n", ":2 should have 2 fields"),
    "an open quotation mark": ('file_name,text\n0.png,"fox\n', ":2 is not CSV"),
    "a text of 200,000 letters": ("file_name,text\n0.png," + "x" * 200000, ":2 is not CSV"),
    "no name": ("file_name,text\n,fox\n", ":2 names '', which is no file"),
    "a name of 5,000 letters": (f"file_name\n{'a' * 5000}\n", ":2 names 'aaa.*is no file"),
    "an absolute name": ("file_name\n/etc/passwd\n", ":2 names '/etc/passwd', which should lie in"),
    "a name outside": ("file_name\n../0.png\n", r":2 names '\.\./0\.png', which should lie in"),
    "an image twice": ("file_name\n0.png\n0.png\n", ":3 names '0.png' again after line 2"),
    "an image that is not there": ("file_name\nz.png\n", ":2 names 'z.png', which is no file"),
    "latin-1": ("file_name,text\n0.png,café\n".encode("latin-1"), "is not UTF-8 text"),
    "UTF-16": ("file_name\n0.png\n".encode("utf-16"), "is not UTF-8 text"),
    "some labels": ("file_name,label\n0.png,a\n1.png,\n", "1.png has no label, but other images"),
}
LINES = {
    "a trailing comma": ('{"file_name": "0.png", "text": "a",}', ":1 is not JSON"),
    "half a line": ('{"file_name": "0.png"}\n{"file_na', ":2 is not JSON"),
    "an array over lines": ('[\n{"file_name": "0.png"}\n]', ":1 is not JSON"),
    "a list": ("[]", ":1 should be an object"),
    "a number": ("3", ":1 should be an object"),
    "brackets without end": ("[" * 100_000, ":1 is not JSON"),
    "an integer of 5,000 digits": ('{"label": ' + "9" * 5000 + "}", ":1 is not JSON"),
    "NaN": ('{"file_name": "0.png", "label": NaN}', ":1 is not JSON .NaN"),
    "a number for a name": ('{"file_name": 3}', ":1 should be an object with"),
    "null for a name": ('{"file_name": null}', ":1 should be an object with"),
    "a zero byte in a name": ('{"file_name": "0.png\\u0000"}', "which is no file"),
    "a dot for a name": ('{"file_name": "."}', "names '.', which is no file"),
    "a folder for a name": ('{"file_name": "sub"}', "names 'sub', which is no file"),
    "an absolute name": ('{"file_name": "/etc/passwd"}', "which should lie in"),
    "a name outside": ('{"file_name": "../../0.png"}', "which should lie in"),
    "an image twice": ('{"file_name": "0.png"}\n' * 2, ":2 names '0.png' again after line 1"),
    "a file of another kind": (
        '{"file_name": "metadata.jsonl"}',
        "holds 1 image, and none can be read",
    ),
    "a list of labels": ('{"file_name": "0.png", "label": ["a"]}', "should be a text or a number"),
    "true for a label": ('{"file_name": "0.png", "label": true}', "should be a text or a number"),
    "an empty label": ('{"file_name": "0.png", "label": ""}', "class '' of .* one line of valid"),
    "a label of two lines": ('{"file_name": "0.png", "label": "a\\nb"}', r"class 'a\\nb' of"),
    "an object for a caption": ('{"file_name": "0.png", "text": {}}', "a list of texts, not {}"),
    "half a surrogate": ('{"file_name": "0.png", "text": "\\ud800"}', "is not valid Unicode"),
    "half a surrogate for a label": ('{"file_name": "0.png", "label": "\\ud800"}', "not valid Un"),
    "no lines": ("\n\n", "holds no lines"),
    "UTF-16": ('{"file_name": "0.png"}'.encode("utf-16"), "is not UTF-8 text"),
    "bytes of any kind": (bytes(range(256)), "is not UTF-8 text"),
}
PHOTOS = "{folder}/photos"
FOLDERS = [
    wrong("no images", "holds no images, which end in", {}),
    wrong("only hidden images", "holds no images", {".0.png": None}),
    wrong("only formats that are not read", "holds no images", {"0.heic": "x", "1.svg": "x"}),
    wrong("an empty train folder", "train holds no images", {"train/x.md": "", "val/0.png": None}),
    wrong("images beside classes", "0.png, beside folders", {"0.png": None, "a/1.png": None}),
    wrong(
        "two folders of one split", "are both the split validation; join them",
        {"train/0.png": None, "val/1.png": None, "Valid/2.png": None},
    ),
    wrong("a class of two lines", r"class 'a\\nb' of", {"a\nb/0.png": None, "c/1.png": None}),
    wrong("a class that ends in a space", "class 'cat ' of", {"cat /0.png": None, "a/1.png": None}),
    wrong("a class in latin-1", "of valid Unicode", {b"caf\xe9/0.png": None, "a/1.png": None}),
    wrong("captions in latin-1", "0.txt is not UTF-8", {"0.png": None, "0.txt": b"caf\xe9"}),
    wrong("captions of some", "needs a text file beside", {"0.png": None}, caption="txt"),
    wrong("no metadata", "needs the file", {"0.png": None}, caption="metadata"),
    wrong("an unknown place of captions", "'x' is unknown; choose", {"0.png": None}, caption="x"),
    wrong("metadata is a folder", "should be a file of", {"0.png": None, "metadata.csv/a": ""}),
    wrong("metadata is a pipe", "should be a file of", {"0.png": None, "metadata.csv": os.mkfifo}),
    wrong(
        "metadata is a dead link", "should be a file of text",
        {"0.png": None, "metadata.jsonl": link("/nowhere")},
    ),
    wrong(
        "metadata beside the splits", "lies beside the folders of the splits",
        {"train/0.png": None, "val/1.png": None, "metadata.csv": "file_name\ntrain/0.png"},
    ),
    wrong("no image can be read", "holds 3 images, and none", {f"{i}.png": "x" for i in range(3)}),
    wrong("too many broken images", "max_corrupt = 10 allows", {f"{i}.png": "" for i in range(30)}),
    wrong("the folder is a file", "is a file and should", {"0.png": ""}, folder=PHOTOS + "/0.png"),
    wrong("the folder is not there", "is no folder", {}, folder="{folder}/nope"),
    wrong("the folder leads to itself", "is no folder", {"l": itself}, folder=PHOTOS + "/l"),
    wrong("the folder has no name", "should be the path of a folder", {}, folder=""),
    wrong("a zero byte in the folder", "should be the path of a folder", {}, folder="a\0b"),
    wrong("a home that is not there", "is no folder", {}, folder="~nobody-at-all/x"),
    wrong(
        "the data folder is a file", "could not be prepared", {"0.png": None},
        data_dir=PHOTOS + "/0.png",
    ),
    wrong("the data folder in /proc", "could not be prepared", {"0.png": None}, data_dir="/proc/x"),
    wrong("an unknown option", "max_corupt", {"0.png": None}, max_corupt=3),
]  # fmt: skip
BESIDE = {"0.png": None, "1.png": None, "sub/x.md": ""}
test_what_is_wrong_is_told = bad_inputs(
    [
        *FOLDERS,
        *(wrong(f"csv: {n}", s, BESIDE | {"metadata.csv": t}) for n, (t, s) in TABLES.items()),
        *(wrong(f"json: {n}", s, BESIDE | {"metadata.jsonl": t}) for n, (t, s) in LINES.items()),
    ]
)


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width, height, data=b"", *more):
    """A PNG whose header says what it likes."""
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    pieces = [(b"IHDR", header), *more, (b"IDAT", zlib.compress(data)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*piece) for piece in pieces)


def animation(form):
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    return encoded("RGB", form, save_all=True, append_images=frames)


def odd(name, expected, files, **options):
    """A folder that is read all the same: the number of images, or what to look at besides."""

    def act(folder):
        fill(folder, files)
        source = opened(folder, **options)
        found = {
            "num_examples": len(source),
            "class_names": list(class_names(source)),
            "skipped": list(source.dataset_info.metadata["skipped"]),
        }
        wanted = {"num_examples": expected} if isinstance(expected, int) else dict(expected)
        texts = wanted.pop("captions", None)
        assert {key: found[key] for key in wanted} == wanted
        assert texts is None or [captions_of(row["caption"])[0] for row in source] == texts
        next(make_batches(source, batch_size=1, image_size=8).iterate(0))

    return Fault(name, act)


def broken(name, content, ending="png"):
    """An image that cannot be read beside one that can."""
    wanted = {"num_examples": 1, "skipped": [f"1.{ending}"]}
    return odd(name, wanted, {"0.png": None, f"1.{ending}": content})


def text(content, *expected):
    return {"num_examples": len(expected), "captions": [*expected]}, content


TEXT_BOMB = b"a\0\0" + zlib.compress(bytes(50_000_000))
BMP_HEADER = (100, 0, 0, 54, 40, 60_000, 60_000, 1, 24, *(0,) * 6)
LARGE_BMP = b"BM" + struct.pack("<IHHIIiiHHIIIIII", *BMP_HEADER)
TIFF_ENTRY = b"\x01\0\0\x01\x03\0\x01\0\0\0\x10\0\0\0"
LOOPING_TIFF = b"II*\0\x08\0\0\0" + TIFF_ENTRY + b"\x08\0\0\0"
LOOP = {"cat/0.png": None, "cat/up": link(".."), "dog/1.png": None, "dog/loop": itself}
ODD = [
    odd("folders in circles", {"num_examples": 2, "class_names": ["cat", "dog"]}, LOOP),
    odd("links that lead to themselves", 1, {"0.png": None, "1.png": itself, "sub": itself}),
    odd("dead links", 1, {"0.png": None, "1.png": link("/nowhere"), "sub": link("/nowhere")}),
    odd("a pipe", 1, {"0.png": None, "1.png": os.mkfifo, "1.txt": os.mkfifo}),
    odd("a socket", 1, {"0.png": None, "1.png": bind_socket}),
    odd("a device", 1, {"0.png": None, "1.png": link("/dev/zero")}),
    odd("a folder called x.png", 2, {"a.png/0.png": None, "b/1.png": None}),
    odd("hidden files", 1, {"0.png": None, ".1.png": None, "Thumbs.db": "x", ".DS_Store": "x"}),
    odd(
        "splits in capital letters with files beside",
        {"num_examples": 1, "class_names": ["a", "b"]},
        {"Train/a/0.png": None, "VAL/a/1.png": None, "test/b/2.png": None, "3.png": None, "x": ""},
    ),
    odd("a name of two lines", 2, {"a\nb.png": None, "c.png": None}),
    odd("a name in latin-1", 1, {b"caf\xe9.png": None}),
    odd("a name of emoji", 2, {"🦊.png": None, "🦊\u200d.png": None}),
    odd("formats that are not read", 1, {"0.png": None, "1.heic": "x", "2.svg": "<svg/>"}),
    odd("an ending that is not the format", 1, {"0.png": encoded("RGB", "JPEG")}),
    odd("captions that end in .caption", text("", "fox")[0], {"0.png": None, "0.caption": "fox"}),
    odd(
        "an image with both captions", text("", "fox")[0],
        {"0.png": None, "0.caption": "cat", "0.txt": "fox"},
    ),
    *(
        odd(f"an image of mode {mode} as {form}", 1, {f"0.{form}": encoded(mode, form, **more)})
        for mode, form, more in (
            ("CMYK", "jpeg", {}), ("CMYK", "tiff", {}), ("YCbCr", "jpeg", {}), ("LA", "png", {}),
            ("P", "png", {"transparency": 0}), ("I;16", "png", {}), ("1", "png", {}),
            ("LAB", "tiff", {}), ("I", "tiff", {}), ("RGBA", "webp", {}), ("L", "gif", {}),
        )
    ),
    *(
        odd(f"an animation as {form}", 1, {f"0.{ending}": animation(form)})
        for form, ending in
        (("GIF", "gif"), ("WEBP", "webp"), ("PNG", "png"), ("TIFF", "tiff"), ("MPO", "jpg"))
    ),
    broken("an empty file", b""),
    broken("a JPEG that is cut", encoded("RGB", "JPEG")[:-20], "jpg"),
    broken("a PNG that is cut", encoded()[:-25]),
    broken("a drawing called png", "<svg/>"),
    broken("floating-point pixels", encoded("F", "TIFF"), "tiff"),
    broken("a picture of no size", png(0, 0)),
    broken("a picture of 100,000 pixels a side", png(100_000, 100_000)),
    broken("a picture of 2^31 pixels a side", png(2**31 - 1, 2**31 - 1)),
    broken("a text that unfolds to 50 MB", png(8, 8, b"", (b"zTXt", TEXT_BOMB))),
    broken("a large BMP", LARGE_BMP, "bmp"),
    broken("a large PPM", b"P6 60000 60000 255\n\0\0\0", "ppm"),
    broken("a TIFF that leads to itself", LOOPING_TIFF, "tiff"),
    *(
        odd(f"csv: {name}", expected, {"0.png": None, "metadata.csv": content})
        for name, (expected, content) in {
            "quotation marks": text('file_name,text\n0.png,"a ""red"" fox, x"', 'a "red" fox, x'),
            "a byte order mark": text("\ufefffile_name,text\n0.png,fox\n", "fox"),
            "lines of Windows": text("file_name,text\r\n0.png,fox\r\n", "fox"),
            "lines of old Macs": text("file_name,text\r0.png,fox\r", "fox"),
            "spaces behind commas": text("file_name, text\n0.png, fox\n", "fox"),
            "two lines in quotation marks": text('file_name,text\n0.png,"a\nfox"\n', "a\nfox"),
        }.items()
    ),
    *(
        odd(f"json: {name}", expected, {"0.png": None, "metadata.jsonl": content})
        for name, (expected, content) in {
            "two captions": text('{"file_name": "0.png", "text": ["a", "b"]}', "a"),
            "a byte order mark": text('\ufeff{"file_name": "0.png", "text": "a"}', "a"),
            "lines of Windows": text('{"file_name": "0.png", "text": "a"}\r\n', "a"),
            "a number": text('{"file_name": "0.png", "text": 3}', "3"),
            "emoji": text('{"file_name": "0.png", "text": "🦊"}', "🦊"),
            "empty lines": text('\n\n{"file_name": "0.png", "text": ""}\n\n', ""),
        }.items()
    ),
]  # fmt: skip
test_what_is_odd_is_survived = faults(ODD)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody who may not read")
@pytest.mark.parametrize(
    ("closed", "says"),
    [
        ("", r"photos cannot be listed \(Permission denied\)"),
        ("a", r"photos/a cannot be listed \(Permission denied\)"),
        ("metadata.csv", r"metadata\.csv cannot be read \(Permission denied\)"),
    ],
)
def test_what_may_not_be_read_is_told(closed, says):
    import tempfile

    with tempfile.TemporaryDirectory() as name:  # tmp_path is closed to others altogether
        folder = Path(name)
        folder.chmod(0o777)
        fill(folder, {"a/0.png": None} | ({closed: "file_name\na/0.png"} if "." in closed else {}))
        (folder / "photos" / closed).chmod(0)
        os.seteuid(65534)
        try:
            with pytest.raises(OSError, match=says):
                opened(folder)
        finally:
            os.seteuid(0)


def test_names_of_cases_differ():
    names = [case.name for case in (*FOLDERS, *ODD)]
    assert len(set(names)) == len(names) and not any(re.search(r"\n", name) for name in names)
