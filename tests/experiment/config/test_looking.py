"""What a user's data hold, before anything is built for them."""

import numpy as np
import pytest
from PIL import Image

from diffusion_jax.experiment.config.looking import look_at


def test_a_folder_is_looked_at_and_other_sources_are_not(tmp_path):
    for name in ("train/cat/a.png", "train/fox/b.png", "val/cat/c.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(tmp_path / name)
    source = {"name": "image_folder", "folder": str(tmp_path)}
    found = look_at(source)
    assert found == ({"train": 2, "validation": 1}, ("cat", "fox"), False, ())
    (tmp_path / "train/cat/a.txt").write_text("a")
    assert look_at(source) == found  # one text is not a text for each
    with pytest.raises(FileNotFoundError, match="caption = 'txt' needs a text file beside each"):
        look_at({**source, "caption": "txt"})
    for other in ({"name": "cifar10"}, {"name": "image_folder", "folder": "none"}, {}):
        assert look_at(other) is None
    assert look_at({"name": "video_folder", "folder": 3}) is None


def test_numbers_of_records_are_found(tmp_path):
    (tmp_path / "3_fox").mkdir()
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(tmp_path / "3_fox/a.png")
    source = {"name": "image_folder", "folder": str(tmp_path)}
    assert look_at(source) == ({"train": 1}, ("3_fox",), False, ())
    assert look_at({**source, "folder_repeats": True}) == (
        {"train": 1},
        ("fox",),
        False,
        ("repeats",),
    )
