"""What is remembered of a user's folder: its files, texts and what was left out of it."""

import pytest
from PIL import Image

from diffusion_jax.data.sources.folder_content import (
    find_root,
    fingerprint,
    memory_of,
    name_of,
    text_options,
    texts_of,
)
from diffusion_jax.data.sources.folder_scan import Kind, scan

VIDEOS = Kind("video", "videos", (".mp4",), frames=True)


def test_every_file_of_a_folder_of_frames_counts(tmp_path):
    folder = tmp_path / "videos" / "clip"
    folder.mkdir(parents=True)
    for number in (2, 10, 1):
        Image.new("L", (2, 2), number).save(folder / f"{number}.png")
    root = tmp_path / "videos"
    memory = memory_of(root, tmp_path)
    found = scan(root, kind=VIDEOS)
    assert [path.name for path in found.items()[0].files()] == ["1.png", "2.png", "10.png"]
    hashes, content = fingerprint(found, memory)
    assert len(hashes) == 3 and fingerprint(scan(root, kind=VIDEOS), memory)[1] == content
    Image.new("L", (2, 2), 99).save(folder / "2.png")
    assert fingerprint(scan(root, kind=VIDEOS), memory)[1] != content


def test_texts_are_there_or_not(tmp_path):
    for name in ("a", "b"):
        Image.new("L", (2, 2)).save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text("x\ny" if name == "a" else "z")
    found = scan(tmp_path)
    options = {"classes": (), "has_captions": True, "several_captions": True, "numbers": ()}
    assert text_options(found) == options
    first = found.items()[0]
    assert texts_of(first, several=True) == {"caption": ["x", "y"]}
    assert texts_of(first, several=False) == {"caption": "x"}
    assert texts_of(first._replace(label="cat", captions=None), several=False) == {"label": "cat"}


def test_names_tell_folders_and_variants_apart(tmp_path):
    assert name_of(tmp_path / "my photos!", "1").startswith("my_photos_-")
    assert name_of(tmp_path, "1") != name_of(tmp_path, "2")
    assert memory_of(tmp_path / "a", tmp_path) != memory_of(tmp_path / "b", tmp_path)
    with pytest.raises(ValueError, match="folder = '' should be the path of a folder"):
        find_root("")


def test_a_folder_inside_a_package():
    assert (find_root("package:numpy/linalg") / "__init__.py").is_file()
    with pytest.raises(ModuleNotFoundError, match="pip install no_such_package"):
        find_root("package:no_such_package/data")
