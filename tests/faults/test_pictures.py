"""Pictures and masks of `sample` that are none, and arrays that are no picture."""

import io
import os

import numpy as np
from faults.frame import BadInput, bad_inputs
from PIL import Image

from diffusion_jax.runs.inputs.arrays import as_image, as_mask, read_image, read_mask


def encoded(mode="RGB", form="PNG", size=(8, 8), **options):
    content = io.BytesIO()
    Image.new(mode, size).save(content, form, **options)
    return content.getvalue()


NONE, FILE, GONE = "is not a readable image", "is not a file", "does not exist"
FILES = {
    "nothing": (b"", NONE),
    "a text": (b"hello", NONE),
    "a drawing": (b"<svg/>", NONE),
    "a document": (b"%PDF-1.4\n", NONE),
    "a film": (b"\0\0\0\x18ftypmp42" + bytes(50), NONE),
    "an array": (b"\x93NUMPY\x01\0" + bytes(100), NONE),
    "a PNG that is cut": (encoded(size=(64, 64))[:60], NONE),
    "a PNG with opacity that is cut": (encoded("RGBA", size=(64, 64))[:70], NONE),
    "a JPEG that is cut": (encoded(form="JPEG")[:-20], NONE),
    "floating-point pixels": (encoded("F", "TIFF"), "floating-point pixels have no fixed white"),
    "a PPM of 60,000 pixels a side": (b"P6 60000 60000 255\n\0", NONE),
    "a PNG of 30,000 pixels a side": (encoded("1", size=(30_000, 30_000)), NONE),
    "a folder": (os.mkdir, FILE),
    "a pipe": (os.mkfifo, FILE),
    "a device": (lambda path: path.symlink_to("/dev/zero"), FILE),
    "a dead link": (lambda path: path.symlink_to("/nowhere"), GONE),
    "a link to itself": (lambda path: path.symlink_to(path), GONE),
}
PATHS = {
    "a file that is not there": ("/nowhere/x.png", GONE),
    "a zero byte": ("a\0b.png", GONE),
    "no name": ("", FILE),
    "a home that is not there": ("~nobody-at-all/x.png", GONE),
    "a list of users": ("/etc/passwd", NONE),
}
READERS = {"image": lambda path: read_image(path, 3), "mask": read_mask}
SHAPE = (8, 8, 3)
IMAGES = {
    "floats": (np.zeros(SHAPE), "has dtype float64; it should be uint8 pixels"),
    "bools": (np.zeros(SHAPE, bool), "has dtype bool"),
    "large integers": (np.zeros(SHAPE, np.int64), "has dtype int64"),
    "a path": ("x.png", "has dtype <U5"),
    "None": (None, "has dtype object"),
    "no pixels": (np.zeros((0, 8, 3), np.uint8), "has shape"),
    "another number of channels": (np.zeros((8, 8, 4), np.uint8), "has shape"),
    "another number of images": (np.zeros((3, *SHAPE), np.uint8), "has shape"),
    "five axes": (np.zeros((1, 1, *SHAPE), np.uint8), "has shape"),
    "one axis": (np.zeros(8, np.uint8), "has shape"),
    "ragged rows": ([[1, 2], [3]], "should be an array, and its rows"),
}
MASKS = {
    "a text": ("x", "has shape"),
    "None": (None, "has shape"),
    "objects": (np.full((8, 8), None), "has dtype object"),
    "complex numbers": (np.full((8, 8), 1j), "has dtype complex128"),
    "dates": (np.zeros((8, 8), "M8[s]"), r"has dtype datetime64\[s\]"),
    "infinity": (np.full((8, 8), np.inf), "64 of 64 values that are not finite"),
    "values of 2": (np.full((8, 8), 2.0), r"from 2\.0 to 2\.0; they should lie in"),
    "values below 0": (np.full((8, 8), -1), "from -1 to -1"),
    "no pixels": (np.zeros((0, 0)), "has shape"),
    "one axis": (np.zeros(8), "has shape"),
    "five channels": (np.zeros((2, 8, 8, 5)), "has shape"),
    "ragged rows": ([[1], [1, 2]], "should be an array, and its rows"),
}


def file(kind, name, content, says):
    def act(folder):
        path = folder / "x.png"
        if callable(content):
            content(path)
        else:
            path.write_bytes(content)
        READERS[kind](path)

    return BadInput(f"{kind}: {name}", act, says)


def path(kind, name, text, says):
    return BadInput(f"{kind}: {name}", lambda _: READERS[kind](text), says)


def image(name, value, says):
    return BadInput(f"an image of {name}", lambda _: as_image("image", value, 2, SHAPE), says)


def mask(name, value, says):
    return BadInput(f"a mask of {name}", lambda _: as_mask(value, 2, (8, 8)), says)


test_pictures = bad_inputs(
    [
        *(file(kind, name, *row) for kind in READERS for name, row in FILES.items()),
        *(path(kind, name, *row) for kind in READERS for name, row in PATHS.items()),
        *(image(name, *row) for name, row in IMAGES.items()),
        *(mask(name, *row) for name, row in MASKS.items()),
    ]
)
