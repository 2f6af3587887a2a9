"""Small files that the documentation mentions, made for tools/run_docs.py."""

import io
import runpy
import sys
import tarfile
from pathlib import Path

import numpy as np
import yaml
from PIL import Image

HOME = Path("~").expanduser()


def photo() -> None:
    """Write photo.png and keep.png at the size of configs/sdxl.py:tiny."""
    _image(0).save("photo.png")
    half = np.zeros((32, 32), np.uint8)
    half[:, :16] = 255
    Image.fromarray(half).save("keep.png")


def pictures() -> None:
    """Write 24 images with captions in text files."""
    folder = HOME / "pictures"
    folder.mkdir()
    for index in range(24):
        _image(index).save(folder / f"{index}.png")
        (folder / f"{index}.txt").write_text(f"picture number {index}")


def photos() -> None:
    """Write 40 images in two sub-folders, one per class."""
    for name in ("cats", "dogs"):
        folder = HOME / "photos" / name
        folder.mkdir(parents=True)
        for index in range(20):
            _image(index).save(folder / f"{index}.png")


def shards() -> None:
    """Write a tar shard with 4 images of two classes."""
    (HOME / "shards").mkdir()
    with tarfile.open(HOME / "shards" / "train-0000.tar", "w") as shard:
        for index in range(4):
            image = io.BytesIO()
            _image(index).save(image, "PNG")
            name = ("cat", "dog")[index % 2].encode()
            for ending, content in (("png", image.getvalue()), ("cls", name)):
                member = tarfile.TarInfo(f"{index:04}.{ending}")
                member.size = len(content)
                shard.addfile(member, io.BytesIO(content))


def released_yaml() -> None:
    """Write sd_xl_base.yaml, with the content that the tests of the converter know."""
    tested = runpy.run_path("tests/convert/yaml/conftest.py")
    Path("sd_xl_base.yaml").write_text(yaml.safe_dump(tested["sd_xl_base"](), sort_keys=False))


def _image(seed: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


if __name__ == "__main__":
    folders = {"pictures": pictures, "photos": photos, "shards": shards}
    made = {"photo": photo, "yaml": released_yaml, **folders}
    made[sys.argv[1]]()
