"""Shards of any format: which split they are of, and what the folder is taken for."""

from diffusion_jax.data.sources.shard_folder import Format, Sample, scan_shards


def read(path, images):
    """A format for this test: a line a sample, its label and its captions."""
    for number, line in enumerate(path.read_text().splitlines()):
        label, _, captions = line.partition(":")
        if label == "bad":
            yield Sample(f"{number}", problem="it is bad")
        else:
            texts = tuple(captions.split(",")) if captions else None
            yield Sample(f"{number}", b"x" if images else b"", label or None, texts)


def lines(tmp_path, **files):
    for name, text in files.items():
        path = tmp_path / name.replace("__", "/").replace("_", "-")
        path = path.with_name(f"{path.name}.lines")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return scan_shards(tmp_path, Format("lines", (".lines",), read))


def test_the_folder_or_the_name_says_the_split(tmp_path):
    found = lines(tmp_path, train_00="\n", Val__a="\n\n", testing1="\n", trainee="\n", b="\n")
    names = {split: [path.stem for path in paths] for split, paths in found.splits.items()}
    assert names == {
        "validation": ["a"], "train": ["b", "train-00", "trainee"], "test": ["testing1"]
    }  # fmt: skip
    assert found.counts == {"validation": 2, "train": 3, "test": 1}
    assert found.in_words() == (
        "images: validation 2, train 3, test 1 in 5 shards; classes: none; captions: none"
    )


def test_classes_and_captions_are_gathered_and_bad_samples_are_not_counted(tmp_path):
    found = lines(tmp_path, a="10:x\n9:x\nbad", b="9:x,y")
    assert found.classes == ("9", "10") and found.counts == {"train": 3}
    assert (found.has_captions, found.several_captions) == (True, True)
    assert "classes: 2 (9, 10); captions: inside" in found.in_words()
    # A file that changed is read again.
    found = lines(tmp_path, b="fox:x")
    assert found.classes == ("10", "9", "fox")
