"""Files are hashed again whenever anything may have touched them, and only then."""

import hashlib
import json
import os
from pathlib import Path

import pytest

from diffusion_jax.data.sources import file_hashes
from diffusion_jax.data.sources.file_hashes import hash_files


def sha256(content):
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def opened(monkeypatch):
    """The names of the files that were read."""
    names, original = [], Path.open

    def spy(self, *arguments, **options):
        names.append(self.name)
        return original(self, *arguments, **options)

    monkeypatch.setattr(Path, "open", spy)
    return names


def hashes(paths, memory, opened):
    opened.clear()
    found = hash_files(paths, memory)
    return found, sorted(name for name in opened if name in "abc")


def test_files_are_read_once_until_they_are_touched(tmp_path, monkeypatch, opened):
    monkeypatch.setattr(file_hashes, "_SETTLED", -1)
    paths, memory = [tmp_path / name for name in "abc"], tmp_path / "folder" / "memory.json"
    for path in paths:
        path.write_bytes(path.name.encode())
    expected = [sha256(b"a"), sha256(b"b"), sha256(b"c")]
    assert hashes(paths, memory, opened) == (expected, ["a", "b", "c"])
    assert hashes(paths, memory, opened) == (expected, [])
    # The same size and times: what `cp -p` and archives leave behind.
    times = paths[1].stat()
    paths[1].write_bytes(b"B")
    os.utime(paths[1], ns=(times.st_atime_ns, times.st_mtime_ns))
    expected[1] = sha256(b"B")
    assert hashes(paths, memory, opened) == (expected, ["b"])
    assert hashes(paths[:2], memory, opened) == (expected[:2], [])
    assert list(json.loads(memory.read_text())) == [str(path) for path in paths[:2]]
    memory.write_text("{")
    assert hashes(paths, memory, opened) == (expected, ["a", "b", "c"])


def test_a_file_that_changed_just_now_is_not_remembered(tmp_path, opened):
    """Clocks of disks are coarse: it may change again within the same tick."""
    path = tmp_path / "a"
    path.write_bytes(b"a")
    for _ in range(2):
        assert hashes([path], tmp_path / "memory", opened) == ([sha256(b"a")], ["a"])


@pytest.mark.parametrize("content", ["{", "[1]", '{"a": 3}', "3", "null"])
def test_a_damaged_memory_is_told_and_made_again(tmp_path, caplog, content):
    path, memory = tmp_path / "file", tmp_path / "memory.json"
    path.write_bytes(b"a")
    memory.write_text(content)
    assert hash_files([path], memory) == [sha256(b"a")]
    assert "memory.json is damaged" in caplog.text


def test_what_cannot_be_read_has_a_hash_too(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    missing, folder = tmp_path / "missing", tmp_path
    found = hash_files([missing, folder], tmp_path / "file" / "memory.json")
    assert found == ["FileNotFoundError 2", "IsADirectoryError 21"]
