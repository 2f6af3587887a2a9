"""A file is there as a whole, or the old one stays, and nothing else is left."""

import pytest

from diffusion_jax.data.whole_files import whole_file


def test_a_block_that_ends_well_replaces_the_file(tmp_path):
    path = tmp_path / "x.txt"
    path.write_text("old")
    with whole_file(path) as partial:
        partial.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


def test_a_block_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "x.txt"
    path.write_text("old")
    with pytest.raises(OSError, match="full"), whole_file(path) as partial:
        partial.write_text("ne")
        raise OSError("full")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
