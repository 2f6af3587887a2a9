"""Vocabularies of CLIP that are none."""

import gzip
import os

from faults.frame import BadInput, bad_inputs

from diffusion_jax.data.tokenizer import clip_tokenizer

BOMB = gzip.compress(bytes(10**6)) * 300
FILES = {
    "no file": ("v.txt", None, "is no file"),
    "nothing": ("v.txt", b"", "is not the vocabulary of CLIP: 0 of its lines"),
    "a few lines": ("v.txt", b"#version\na b\n", "1 of its lines 2 to 48895 are pairs"),
    "pairs of other symbols": ("v.txt", b"x\n" + b"ab cd\n" * 50_000, "is not the vocabulary of"),
    "bytes of any kind": ("v.txt", bytes(range(256)), "cannot be read as a vocabulary"),
    "no gzip": ("v.txt.gz", b"a b", "cannot be read as a vocabulary: Not a gzipped file"),
    "a gzip that is cut": ("v.gz", gzip.compress(b"a b\n" * 99)[:-9], "cannot be read as a voc"),
    "a gzip with other bytes": ("v.gz", gzip.compress(b"a")[:9] + b"\xff" * 20, "cannot be read"),
    "a gzip of 300 MB": ("v.gz", BOMB, "is not the vocabulary of"),
    "no JSON": ("v.json", b"{", "is not a tokenizer.json"),
    "other JSON": ("v.json", b"[1]", "is not a tokenizer.json"),
}  # fmt: skip


def file(name, path, content, says):
    def act(folder):
        if content is not None:
            (folder / path).write_bytes(content)
        clip_tokenizer(str(folder / path))

    return BadInput(f"a vocabulary: {name}", act, says)


def path(name, says, text="", make=None):
    def act(folder):
        if make is not None:
            make(folder / "v.txt")
        clip_tokenizer(text or str(folder / "v.txt"))

    return BadInput(f"a vocabulary: {name}", act, says)


test_vocabularies = bad_inputs(
    [
        *(file(name, *row) for name, row in FILES.items()),
        path("a folder", "is no file", make=os.mkdir),
        path("a pipe", "is no file", make=os.mkfifo),
        path("a dead link", "is no file", make=lambda p: p.symlink_to("/nowhere")),
        path("a zero byte", "is no file", "a\0b"),
        path("a home that is not there", "is no file", "~nobody-at-all/v.txt"),
        BadInput("three tokens at least", lambda _: clip_tokenizer(max_length=2), "at least 3"),
        BadInput("an unknown pad", lambda _: clip_tokenizer(pad="x"), "pad = 'x' is unknown"),
    ]
)
