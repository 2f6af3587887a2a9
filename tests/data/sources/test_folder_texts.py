"""Metadata and captions as people write them, and one sentence for what cannot be read."""

import json
import os
from pathlib import Path

import pytest

from diffusion_jax.data.sources.folder_texts import find_metadata, read_captions, read_metadata


def write(folder, content, name="metadata.jsonl", images=("a.png", "sub/b.png")):
    for image in images:
        (folder / image).parent.mkdir(parents=True, exist_ok=True)
        (folder / image).touch()
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def rows(folder, content, name="metadata.jsonl"):
    found = read_metadata(write(folder, content, name))
    return [(row.path.relative_to(folder).as_posix(), row.label, row.captions) for row in found]


BOM = b"\xef\xbb\xbf"
LINE = b'{"file_name": "a.png", "text": "caf\xc3\xa9"}'


@pytest.mark.parametrize("content", [LINE, BOM + LINE, LINE + b"\r\n\r\n", b"\n" + LINE])
def test_json_lines(tmp_path, content):
    assert rows(tmp_path, content) == [("a.png", None, ("café",))]


def test_fields_of_json(tmp_path):
    lines = [
        {"file_name": "./a.png", "caption": ["x", 7], "label": 3, "text": "not this"},
        {"file_name": "sub/../sub/b.png", "text": [], "label": "dog"},
    ]
    assert rows(tmp_path, "\n".join(map(json.dumps, lines))) == [
        ("a.png", "3", ("x", "7")),
        ("sub/b.png", "dog", None),
    ]


@pytest.mark.parametrize("bom", [b"", BOM])
def test_tables(tmp_path, bom):
    table = 'file_name,text,label,id\r\na.png,"red, ""quick""\nfox",1,x\r\n\r\nsub/b.png,,,y\r\n'
    assert rows(tmp_path, bom + table.encode(), "metadata.csv") == [
        ("a.png", "1", ('red, "quick"\nfox',)),
        ("sub/b.png", None, ("",)),
    ]


def test_json_is_preferred(tmp_path):
    assert find_metadata(tmp_path) is None
    table = write(tmp_path, "file_name,text\n", "metadata.csv")
    assert find_metadata(tmp_path) == table
    lines = write(tmp_path, "{}")
    assert find_metadata(tmp_path) == lines


BAD = {
    '{"file_name": "a.png"}\n{"file_name": "./a.png"}': ":2 names './a.png' again after line 1;",
    '{"file_name": "/etc/hostname"}': ":1 names '/etc/hostname', which should lie in ",
    '{"file_name": "sub/../../x.png"}': ":1 names 'sub/../../x.png', which should lie in ",
    '{"file_name": "a.png", "text": "\\ud800"}': ":1: '\\ud800' is not valid Unicode",
    '{"file_name": "a.png", "label": "\\ud800"}': ":1: '\\ud800' is not valid Unicode",
    '{"file_name": "a.png", "label": ["x"]}': ":1: a label should be a text or a number, not ",
    '{"file_name": "a.png", "text": {"en": "x"}}': ":1: a caption should be a text or a list of",
    '{"file_name": 1}': ':1 should be an object with "file_name"',
    "[" * 100_000: ":1 is not JSON (",
    "": " holds no lines",
    b'{"file_name": "caf\xe9.png"}': " is not UTF-8 text (",
    BOM[:2] + b"\xff": " is not UTF-8 text (",
}


@pytest.mark.parametrize("content", BAD)
def test_bad_lines_are_named(tmp_path, content):
    with pytest.raises(ValueError) as error:
        rows(tmp_path, content)
    assert BAD[content] in str(error.value)
    assert str(error.value).startswith(str(tmp_path / "metadata.jsonl"))


@pytest.mark.parametrize("name", ["c.png", "sub", "a\0.png", "x" * 300])
def test_names_of_no_file(tmp_path, name):
    with pytest.raises(FileNotFoundError, match="jsonl:1 names .* which is no file in"):
        rows(tmp_path, json.dumps({"file_name": name}))


BAD_TABLES = {
    "name,text\na.png,x\n": ":1 should be a header with file_name",
    "file_name;text\na.png;x\n": ":1 should be a header with file_name",
    "": ":1 should be a header with file_name",
    "file_name,text\n": " holds no lines",
    "file_name,text\na.png,red, quick\n": ":2 should have 2 fields like the header; put quotation",
    "file_name,text\na.png\n": ":2 should have 2 fields like the header",
    'file_name,text\na.png,"x\n': ":2 is not CSV (",
    "file_name,text\na.png,x\na.png,y\n": ":3 names 'a.png' again after line 2",
}


@pytest.mark.parametrize("content", BAD_TABLES)
def test_bad_tables_are_named(tmp_path, content):
    with pytest.raises(ValueError) as error:
        rows(tmp_path, content, "metadata.csv")
    assert str(error.value).startswith(str(tmp_path / "metadata.csv") + BAD_TABLES[content])


def test_captions_of_one_image(tmp_path):
    path = tmp_path / "a.txt"
    for content, expected in [(BOM + b" a fox \r\n\r\nred\n", ("a fox", "red")), (b" \n", ("",))]:
        path.write_bytes(content)
        assert read_captions(path) == expected
    path.write_bytes("füchse".encode("utf-16"))
    with pytest.raises(ValueError, match=r"a\.txt is not UTF-8 text .*; save it as UTF-8"):
        read_captions(path)


def test_spaces_behind_commas_are_no_part_of_a_table(tmp_path):
    (tmp_path / "a.png").touch()
    file = tmp_path / "metadata.csv"
    file.write_text("file_name, text, label\na.png, a fox, cat \n")
    ((_, label, captions, *_),) = read_metadata(file)
    assert (label, captions) == ("cat", ("a fox",))


@pytest.mark.parametrize("make", [os.mkfifo, Path.mkdir, lambda path: path.symlink_to("/nowhere")])
def test_metadata_that_is_no_file_is_an_error(tmp_path, make):
    make(tmp_path / "metadata.csv")
    with pytest.raises(ValueError, match=r"metadata\.csv should be a file of text"):
        find_metadata(tmp_path)


def test_numbers_are_read_out_of_objects_and_tables(tmp_path):
    (tmp_path / "a.png").touch()
    object_ = '{"file_name": "a.png", "repeats": 3, "weight": 0}'
    table = "file_name,weight,repeats\na.png,0.0, 3\n"
    for name, content in (("metadata.jsonl", object_), ("metadata.csv", table)):
        (row,) = read_metadata(write(tmp_path, content, name))
        assert row.numbers == (("repeats", 3.0), ("weight", 0.0))
    (row,) = read_metadata(write(tmp_path, "file_name,weight\na.png,\n", "metadata.csv"))
    assert row.numbers == ()


@pytest.mark.parametrize(
    ("field", "sentence"),
    [
        ('"repeats": 0', "repeats = 0 should be a whole number between 1 and"),
        ('"repeats": 2.5', "repeats = 2.5 should be a whole number between 1 and"),
        ('"repeats": true', "repeats = True should be a whole number between 1 and"),
        ('"weight": -1', "weight = -1 should be a number between 0 and"),
        ('"weight": "heavy"', "weight = 'heavy' should be a number between 0 and"),
        ('"weight": [1]', r"weight = \[1\] should be a number between 0 and"),
        ('"weight": 1e400', "weight = inf should be a number between 0 and"),
    ],
)
def test_bad_numbers_are_named(tmp_path, field, sentence):
    (tmp_path / "a.png").touch()
    with pytest.raises(ValueError, match=rf"metadata\.jsonl:1: {sentence}"):
        rows(tmp_path, f'{{"file_name": "a.png", {field}}}', "metadata.jsonl")
