"""Weights that are none, are cut, lie elsewhere or say nonsense of themselves."""

import gzip
import json
import os
import pickle
import struct
import zipfile

import numpy as np
from faults.frame import BadInput, bad_inputs, launch
from PIL import Image

from diffusion_jax.convert.weights.claims import read_claims
from diffusion_jax.convert.weights.reading import open_weights

SAFETENSORS, INDEX = "x.safetensors", "model.safetensors.index.json"


def tensor(shape, first, last, dtype="F32"):
    return {"a": {"dtype": dtype, "shape": shape, "data_offsets": [first, last]}}


def file(header, body=bytes(4)):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(header)) + header + body


DAMAGED = "has a damaged header: a is"
HEADERS = {
    "longer than the file": (struct.pack("<Q", 10**9) + b'{"a":1}', "header would be 1000000000"),
    "negative offsets": (file(tensor([1], -4, 0)), DAMAGED),
    "offsets in the wrong order": (file(tensor([1], 4, 0)), DAMAGED),
    "offsets that are no integers": (file(tensor([1], 0.0, 4.0)), DAMAGED),
    "a negative shape": (file(tensor([-1, -1], 0, 4)), DAMAGED),
    "a shape of 2^124": (file(tensor([2**62, 2**62], 0, 4)), DAMAGED),
    "a shape of words": (file(tensor(["x"], 0, 4)), DAMAGED),
    "no shape": (file({"a": {"dtype": "F32", "data_offsets": [0, 4]}}), "does not describe a"),
    "an unknown dtype": (file(tensor([1], 0, 4, "Q4")), "stores a as Q4; known are F64"),
    "no JSON": (file(b'{"a":'), "its header is not JSON"),
    "latin-1": (file('{"é":1}'.encode("latin-1")), "its header is not JSON"),
    "100,000 brackets": (file(b'{"a":' + b"[" * 100_000), "its header is not JSON"),
    "a number of words": (file({"__metadata__": 3, **tensor([1], 0, 4)}), "map words to words"),
    "numbers for words": (file({"__metadata__": {"a": 3}}), "map words to words"),
    "words alone": (file({"__metadata__": {"a": "b"}}, b""), "holds no tensors"),
}


def by_pillow(path):
    Image.new("RGB", (8, 8)).save(path, "PNG")


def zipped(path, *names):
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name, "x")


NEITHER = "is neither safetensors nor a file by torch.save"
FILES = {
    "nothing": (b"", "is empty; download or copy it again"),
    "seven bytes": (b"1234567", NEITHER),
    "a text": (b"hello world, this is a text", NEITHER),
    "a picture": (by_pillow, NEITHER),
    "HDF5": (b"\x89HDF\r\n\x1a\n" + bytes(100), NEITHER),
    "gzip": (gzip.compress(b"abc" * 100), NEITHER),
    "NumPy's": (lambda path: np.savez(path.open("wb"), a=np.zeros(3)), "it has no data.pkl"),
    "a zip of texts": (lambda path: zipped(path, "a.txt"), "it has no data.pkl"),
    "an empty zip": (zipped, "it has no data.pkl"),
    "a bare pickle": (pickle.dumps({"a": 1}), "a bare pickle, which may run code"),
    "a git-lfs pointer": (b"version https://git-lfs.github.com/spec/v1\n", "run `git lfs pull`"),
    "a web page": (b"<!DOCTYPE html><html></html>", "is a web page, not weights"),
    "a folder": (os.mkdir, "has no weights; looked for"),
    "a pipe": (os.mkfifo, "is a pipe or a device and should be a file"),
    "a device": (lambda path: path.symlink_to("/dev/zero"), "is a pipe or a device"),
    "a dead link": (lambda path: path.symlink_to("/nowhere"), "there are no weights at"),
    "a link to itself": (lambda path: path.symlink_to(path), "there are no weights at"),
}
INDEXES = {
    "no JSON": ("{", 'it needs a "weight_map"'),
    "without a map": ("{}", 'it needs a "weight_map"'),
    "a list": ('{"weight_map": ["a"]}', 'it needs a "weight_map"'),
    "numbers": ('{"weight_map": {"a": 1}}', 'it needs a "weight_map"'),
    "no shards": ('{"weight_map": {}}', "names no shards"),
    "a shard that is not there": ('{"weight_map": {"a": "b.safetensors"}}', "is not beside it"),
    "a shard outside": ('{"weight_map": {"a": "../b.safetensors"}}', "is not beside it"),
    "itself": (f'{{"weight_map": {{"a": "{INDEX}"}}}}', "is not beside it"),
}
VAE = '{"_class_name": "AutoencoderKL", "%s": %s}'
FOLDERS = {
    "an index that is no JSON": ({"model_index": "{"}, "model_index.json is damaged"),
    "an index that is a list": ({"model_index": "[]"}, "model_index.json is damaged"),
    "a UNet's config that is no JSON": ({"unet/config": "{"}, "unet/config.json is damaged"),
    "heads in words": ({"unet/config": '{"attention_head_dim": "x"}'}, "should be of another kind"),
    "no heads": ({"unet/config": '{"attention_head_dim": 0}'}, "should be numbers of heads"),
    "betas below 0": ({"scheduler/scheduler_config": '{"beta_start": -1.0}'}, "has no schedule of"),
    "betas of NaN": ({"scheduler/scheduler_config": '{"beta_start": NaN}'}, "has no schedule of"),
    "no timesteps": ({"scheduler/scheduler_config": '{"num_train_timesteps": 0}'}, "no schedule"),
    "given betas in words": (
        {"scheduler/scheduler_config": '{"trained_betas": ["x"]}'}, "has no schedule of betas",
    ),
    "a prediction of 3": (
        {"scheduler/scheduler_config": '{"prediction_type": 3}'}, "should be of another kind",
    ),
    "a scaling factor in words": (
        {"vae/config": VAE % ("scaling_factor", '"x"')}, "scaling_factor = 'x' should be of",
    ),
    "a scaling factor of 0": ({"vae/config": VAE % ("scaling_factor", 0)}, "should be above 0"),
    "a scaling factor of NaN": ({"vae/config": VAE % ("scaling_factor", "NaN")}, "above 0"),
    "groups of a half": ({"vae/config": VAE % ("norm_num_groups", 0.5)}, "should be of another"),
}  # fmt: skip


def opened(name, content, says, path=SAFETENSORS):
    def act(folder):
        place = folder / path
        if callable(content):
            content(place)
        else:
            place.write_bytes(content if isinstance(content, bytes) else content.encode())
        open_weights(place)

    return BadInput(f"weights: {name}", act, says)


def claimed(name, configs, says):
    def act(folder):
        for part, text in ({"model_index": "{}", "unet/config": "{}"} | configs).items():
            (folder / part).parent.mkdir(exist_ok=True)
            (folder / f"{part}.json").write_text(text)
        read_claims(folder)

    return BadInput(f"a folder of diffusers: {name}", act, says)


def described(name, says, path):
    return BadInput(f"describe: {name}", lambda folder: launch("describe", path), says)


test_weight_files = bad_inputs(
    [
        *(opened(f"a header with {name}", *row) for name, row in HEADERS.items()),
        *(opened(name, *row) for name, row in FILES.items()),
        *(opened(f"an index: {name}", *row, path=INDEX) for name, row in INDEXES.items()),
        *(claimed(name, *row) for name, row in FOLDERS.items()),
        described("no name", "describe what\\? give a file", ""),
        described("a zero byte in the name", "there are no weights at a", "a\0b"),
        described("a name of 5,000 letters", "File name too long", "a" * 5000),
        described("a home that is not there", "there are no weights at", "~nobody-at-all/x.ckpt"),
        described("an address", "there are no weights at", "https://x.org/y.safetensors"),
    ]
)
