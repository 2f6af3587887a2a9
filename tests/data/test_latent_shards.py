"""Shards of a cache: which records each has, and what is not read back when it was changed."""

from pathlib import Path

import numpy as np
import pytest

from diffusion_jax.data import latent_shards
from diffusion_jax.data.latent_shards import (
    Entry,
    Shards,
    claim_folder,
    missing_shards,
    read_index,
    read_null,
    unpack,
    verify_shards,
    write_null,
    write_shard,
)
from diffusion_jax.data.records import Record


def entry(number, value=0.5):
    record = Record(None, (4, 4), (4, 4), None, ("a",), number)
    return Entry(record, 0, np.full((1, 1, 1, 2), value, np.float32), {})


def write(shards, shard, **changes):
    entries = [entry(number, **changes) for number in shards.records(shard)]
    write_shard(shards, shard, entries, [(4, 4)], "float16")


@pytest.fixture
def shards(tmp_path):
    return Shards(tmp_path, claim_folder(tmp_path, {"size": 3}), num_records=5, shard_size=2)


def test_the_last_shard_has_what_is_left(shards):
    assert shards.num_shards == 3
    assert [list(shards.records(n)) for n in range(3)] == [[0, 1], [2, 3], [4]]
    assert shards.path(2).name == "00002-of-00003.arrayrecord"


def test_shards_are_missing_until_both_their_files_are_there(shards):
    for shard in (0, 2):
        write(shards, shard)
    assert missing_shards(shards) == [1]
    with pytest.raises(ValueError, match="00001-of-00003.arrayrecord of .* is missing"):
        verify_shards(shards)
    verify_shards(shards, [0, 2])
    shards.path(0).with_suffix(".json").unlink()
    assert missing_shards(shards) == [0, 1]
    with pytest.raises(ValueError, match="00000-of-00003.json of the latent cache is missing"):
        verify_shards(shards, [0])


def test_an_index_says_what_lies_in_the_shard(shards):
    write(shards, 1)
    index = read_index(shards, 1)
    assert (index["shard"], index["buckets"], index["shapes"]) == (1, [0, 0], [[4, 4]])
    assert index["bytes"] == shards.path(1).stat().st_size


def test_equal_entries_give_equal_bytes(shards):
    write(shards, 0)
    first = shards.path(0).read_bytes(), shards.path(0).with_suffix(".json").read_bytes()
    write(shards, 0)
    assert first == (
        shards.path(0).read_bytes(), shards.path(0).with_suffix(".json").read_bytes()
    )  # fmt: skip


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (1e6, r"moments of record 0 reaches 1e\+06, which float16 cannot hold; choose another"),
        (np.nan, "moments of record 0 is not finite"),
    ],
)
def test_values_that_cannot_be_kept_are_named(shards, value, message):
    with pytest.raises(ValueError, match=message):
        write(shards, 0, value=value)
    assert missing_shards(shards) == [0, 1, 2]


def test_what_stands_for_a_dropped_text_comes_back_as_it_was(shards):
    null = {"cached/clip/0": np.arange(6, dtype=np.float32).reshape(2, 3)}
    write_null(shards, null)
    np.testing.assert_array_equal(read_null(shards)["cached/clip/0"], null["cached/clip/0"])
    path = shards.folder / "null.bin"
    packed = bytearray(path.read_bytes())
    packed[-1] ^= 1
    with pytest.raises(ValueError, match="its checksum differs"):
        unpack(bytes(packed))
    path.write_bytes(packed)
    with pytest.raises(ValueError, match="null.bin of the latent cache is damaged"):
        read_null(shards)
    path.unlink()
    with pytest.raises(ValueError, match="null.bin of the latent cache is missing"):
        read_null(shards)


def test_a_folder_belongs_to_what_it_was_made_from(shards, tmp_path):
    assert claim_folder(tmp_path, {"size": 3}) == shards.digest
    with pytest.raises(ValueError, match=r"made with size = 3 \(this config has 4\)"):
        claim_folder(tmp_path, {"size": 4})
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").write_text("")
    with pytest.raises(ValueError, match="holds no latent cache .* but mine.txt"):
        claim_folder(tmp_path / "other", {"size": 3})


def test_a_full_disk_is_told_and_nothing_is_left(shards, monkeypatch):
    class Full:
        def __init__(self, path, options):
            Path(path).write_text("half")

        def write(self, record):
            pass

        def close(self):  # as array_record says it
            raise RuntimeError("write() failed: No space left on device; at byte 200704; Failed to")

    monkeypatch.setattr(latent_shards, "ArrayRecordWriter", Full)
    with pytest.raises(OSError, match=r"shard .*00001-of-.* failed: No space left on device$"):
        write(shards, 1)
    assert [path.name for path in shards.folder.iterdir()] == ["key.json"]
