"""What a folder is taken for: splits, classes and captions, and every file that is left out."""

import os

import pytest

from diffusion_jax.data.sources.folder_scan import scan


def make(root, *names, text=None):
    """Empty files, since nothing is opened: a name that ends in / is a folder."""
    for name in names:
        path = root / name
        (path if name.endswith("/") else path.parent).mkdir(parents=True, exist_ok=True)
        if not name.endswith("/"):
            path.write_text(text or "")
    return root


def names(found):
    return {split: [item.name for item in items] for split, items in found.splits.items()}


SPLITS = {
    "train and val": (
        ["train/cat/0.png", "val/cat/1.png"],
        {"train": ["train/cat/0.png"], "validation": ["val/cat/1.png"]},
        ("cat",),
    ),
    "beside folders of the system": (
        ["train/cat/0.png", "val/dog/1.png", "__MACOSX/train/cat/0.png", "@eaDir/0.png"],
        {"train": ["train/cat/0.png"], "validation": ["val/dog/1.png"]},
        ("cat", "dog"),
    ),
    "beside another folder and loose images": (
        ["train/cat/0.png", "test/cat/1.png", "old/cat/2.png", "3.png", "notes.md"],
        {"train": ["train/cat/0.png"], "test": ["test/cat/1.png"]},
        ("cat",),
    ),
    "in capital letters": (
        ["Train/cat/0.png", "VALIDATION/cat/1.png", "Testing/cat/2.png"],
        {
            "train": ["Train/cat/0.png"],
            "validation": ["VALIDATION/cat/1.png"],
            "test": ["Testing/cat/2.png"],
        },
        ("cat",),
    ),
    "train beside no other images": (
        ["train/0.png", "docs/about.md", "__MACOSX/0.png"],
        {"train": ["train/0.png"]},
        (),
    ),
    "a class called train": (
        ["train/0.png", "tram/1.png"],
        {"train": ["train/0.png", "tram/1.png"]},
        ("train", "tram"),
    ),
    "without train": (
        ["val/0.png", "test/1.png", "__MACOSX/2.png"],
        {"train": ["test/1.png", "val/0.png"]},
        ("test", "val"),
    ),
    "classes beside a folder of the system": (
        ["cat/0.png", "dog/1.png", "__MACOSX/cat/0.png", "lost+found/x.png"],
        {"train": ["cat/0.png", "dog/1.png"]},
        ("cat", "dog"),
    ),
}


@pytest.mark.parametrize("case", SPLITS)
def test_splits_and_classes(tmp_path, case):
    files, expected, classes = SPLITS[case]
    found = scan(make(tmp_path, *files))
    assert names(found) == expected
    assert found.classes() == classes


def test_two_folders_of_one_split_are_an_error(tmp_path):
    make(tmp_path, "train/0.png", "val/1.png", "Valid/2.png")
    with pytest.raises(ValueError, match=r"Valid and .*val are both the split validation; join"):
        scan(tmp_path)


def test_links_are_followed_but_not_in_circles(tmp_path):
    make(tmp_path / "disk", "cats/0.png", "1.png")
    make(tmp_path / "photos", "dogs/2.png")
    (tmp_path / "photos/cats").symlink_to(tmp_path / "disk/cats")
    (tmp_path / "photos/dogs/3.png").symlink_to(tmp_path / "disk/1.png")
    (tmp_path / "photos/dogs/up").symlink_to(tmp_path / "photos")
    found = scan(tmp_path / "photos")
    assert names(found) == {"train": ["cats/0.png", "dogs/2.png", "dogs/3.png"]}
    assert found.classes() == ("cats", "dogs")
    (tmp_path / "linked").symlink_to(tmp_path / "photos")
    assert names(scan(tmp_path / "linked")) == names(found)


def test_what_is_no_image_is_counted(tmp_path):
    make(tmp_path, "0.png", "0.txt", "b.TXT", "c.heic", "README", ".DS_Store", "._0.png", "d.png/")
    (tmp_path / "dead.png").symlink_to("/nowhere.png")
    os.mkfifo(tmp_path / "pipe.png")
    found = scan(tmp_path, caption="none")
    assert names(found) == {"train": ["0.png"]}
    assert found.ignored == {
        ".txt": 2, ".heic": 1, "without an ending": 1, "hidden": 2, "dead links": 1,
        "no regular files": 1,
    }  # fmt: skip
    make(tmp_path / "splits", "train/0.png", "test/1.png", "old/2.png", "3.png", "old/list.csv")
    assert scan(tmp_path / "splits").ignored == {"images outside of the splits": 2, ".csv": 1}


def test_common_endings_are_images(tmp_path):
    endings = "png jpg JPEG jpe jfif webp avif jp2 bmp gif tif tiff ppm pgm".split()
    make(tmp_path, *[f"{i}.{ending}" for i, ending in enumerate(endings)])
    assert len(scan(tmp_path).items()) == len(endings)


def test_one_line_says_it_all(tmp_path):
    make(tmp_path, *[f"train/{name}/{i}.png" for name in "abcdef" for i in range(2)], "x.heic")
    make(tmp_path, "val/a/0.png", "val/notes.pdf", "val/a/Thumbs.db")
    assert scan(tmp_path).in_words() == (
        "images: train 12, validation 1; classes: 6 (a, b, c, d, e, ...); captions: none; "
        "ignored files: 1 .db, 1 .heic, 1 .pdf"
    )
    make(tmp_path / "flat", "0.png", "1.png", "2.png")
    (tmp_path / "flat/metadata.jsonl").write_text('{"file_name": "1.png", "text": "x"}')
    assert scan(tmp_path / "flat").in_words() == (
        "images: train 1; classes: none; captions: metadata.jsonl; ignored files: 2 .png"
    )


def test_text_files_are_captions_when_every_image_has_one(tmp_path):
    make(tmp_path, "cat/0.png", "dog/1.png")
    make(tmp_path, "cat/0.txt", "dog/1.txt", text="it sleeps")
    found = scan(tmp_path)
    assert [(item.label, item.captions) for item in found.items()] == [
        ("cat", ("it sleeps",)),
        ("dog", ("it sleeps",)),
    ]
    assert (found.captions, dict(found.ignored)) == ("text files", {})
    make(tmp_path, "dog/2.png")
    found = scan(tmp_path)
    assert (found.captions, dict(found.ignored)) == ("", {".txt": 2})
    assert {item.captions for item in found.items()} == {None}


def test_names_that_are_not_unicode(tmp_path):
    (tmp_path / os.fsdecode(b"caf\xe9.png")).write_text("")
    assert names(scan(tmp_path)) == {"train": ["caf\\xe9.png"]}


def test_links_that_lead_to_themselves_are_no_files(tmp_path):
    make(tmp_path, "cat/0.png", "dog/1.png")
    (tmp_path / "dog/loop").symlink_to(tmp_path / "dog/loop")
    (tmp_path / "cat/loop.png").symlink_to(tmp_path / "cat/loop.png")
    found = scan(tmp_path)
    assert (found.classes(), found.ignored) == (("cat", "dog"), {"dead links": 2})


def test_captions_may_end_in_caption(tmp_path):
    make(tmp_path, "0.png", "1.png")
    make(tmp_path, "0.caption", "1.caption", text="a fox")
    make(tmp_path, "1.txt", text="a cat")
    found = scan(tmp_path)
    assert [item.captions for item in found.items()] == [("a fox",), ("a cat",)]
    assert found.ignored == {".caption": 1}


@pytest.mark.parametrize("name", ["a\nb", "cat ", " cat", os.fsdecode(b"caf\xe9")])
def test_a_class_that_would_be_read_back_as_another_is_an_error(tmp_path, name):
    make(tmp_path, f"{name}/0.png", "c/1.png")
    with pytest.raises(ValueError, match="should be named by one line of valid Unicode"):
        scan(tmp_path)


def test_a_folder_that_cannot_be_listed_is_named(tmp_path, monkeypatch):
    def scandir(path):
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(OSError, match=r"the folder .* cannot be listed \(Permission denied\)"):
        scan(tmp_path)


def test_metadata_beside_the_splits_is_not_lost(tmp_path):
    make(tmp_path, "train/0.png", "test/1.png", "Metadata.csv")
    with pytest.raises(ValueError, match=r"Metadata\.csv lies beside the folders of the splits"):
        scan(tmp_path)
    assert scan(tmp_path, caption="none").ignored == {".csv": 1}


def test_masks_beside_images_are_their_masks(tmp_path):
    make(tmp_path, "a/0.png", "a/0-masklabel.png", "b/1.jpg", "b/1-masklabel.png")
    found = scan(tmp_path)
    assert names(found) == {"train": ["a/0.png", "b/1.jpg"]} and found.classes() == ("a", "b")
    masks = [dict(item.images)["mask_image"].name for item in found.items()]
    assert masks == ["0-masklabel.png", "1-masklabel.png"] and found.columns() == ("mask_image",)
    (tmp_path / "b/1-masklabel.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 mask is not there, such as .*1-masklabel\.p"):
        scan(tmp_path)


@pytest.mark.parametrize("name", ["metadata.jsonl", "captions.jsonl", "Captions.JSONL"])
def test_a_file_of_captions_has_one_of_two_names(tmp_path, name):
    make(tmp_path, "a.png", "b.png")
    make(tmp_path, name, text='{"file_name": "a.png", "text": "a fox"}\n')
    found = scan(tmp_path)
    assert names(found) == {"train": ["a.png"]} and found.captions == name


@pytest.mark.parametrize(
    ("file", "told"),
    [("0.tar", "'tar_folder' reads its .tar f"), ("0.parquet", "'parquet_folder'")],
)
def test_a_folder_of_shards_is_told_what_reads_it(tmp_path, file, told):
    with pytest.raises(ValueError, match=rf"holds no images.*; data\.source\.name = {told}"):
        scan(make(tmp_path, file, "notes.md"))
