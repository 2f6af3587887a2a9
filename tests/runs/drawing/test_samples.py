"""Drawn images become single PNGs and a grid; a folder with files is left alone."""

import numpy as np
import pytest
from PIL import Image

from diffusion_jax.runs.drawing.recipe import Recipe, recipe_text
from diffusion_jax.runs.drawing.samples import check_empty, write_clips, write_samples
from diffusion_jax.runs.inputs.seeds import Seeds


def test_images_and_their_grid_are_written(tmp_path):
    images = np.arange(5 * 4 * 6 * 3, dtype=np.uint8).reshape(5, 4, 6, 3)
    grid = write_samples(tmp_path / "new", images)
    for index, image in enumerate(images):
        np.testing.assert_array_equal(Image.open(tmp_path / f"new/{index:05d}.png"), image)
    assert grid == tmp_path / "new/grid.png"
    assert {p.name for p in (tmp_path / "new").iterdir()} == {
        "grid.png", *(f"{index:05d}.png" for index in range(5))
    }  # fmt: skip


def test_clips_are_written_in_every_form(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    clips = np.arange(2 * 3 * 4 * 6 * 3, dtype=np.uint8).reshape(2, 3, 4, 6, 3)
    written = write_clips(tmp_path / "new", clips, fps=7.0)
    names = ["00000.gif", "00000.png", "00000", "00001.gif", "00001.png", "00001"]
    assert [path.name for path in written] == names  # no .mp4 without PyAV
    np.testing.assert_array_equal(Image.open(tmp_path / "new/00001/00002.png"), clips[1, 2])


def test_a_folder_that_cannot_be_made_is_told_before_anything_is_drawn(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("keep")
    for folder in (tmp_path / "file", tmp_path / "file" / "new" / "deep"):
        with pytest.raises(ValueError, match="/file is a file; choose an empty folder with --out"):
            check_empty(folder)
    monkeypatch.setattr("os.access", lambda path, mode: False)
    with pytest.raises(PermissionError, match="new cannot be written: .* is not writable"):
        check_empty(tmp_path / "new")


def test_a_folder_with_files_is_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(ValueError, match="already holds files; choose an empty folder with --out"):
        write_samples(tmp_path, np.zeros((1, 2, 2, 3), np.uint8))
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_each_image_tells_how_it_was_drawn(tmp_path):
    recipe = Recipe(["狐, é", "owl"], None, 5, "ddim", 2.0, Seeds(3), (2, 2), "m")
    grid = write_samples(tmp_path, np.zeros((2, 2, 2, 3), np.uint8), recipe)
    for path, index in ((tmp_path / "00000.png", 0), (tmp_path / "00001.png", 1), (grid, 0)):
        assert Image.open(path).info == {"parameters": recipe_text(recipe, index)}
