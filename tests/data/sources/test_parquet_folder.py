"""Parquet files as Hugging Face's datasets write them, and with columns of other names."""

import json
from typing import Any

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from diffusion_jax.data.batches import make_batches
from diffusion_jax.data.sources.open_source import class_names, open_source

from .test_tar_folder import picture, records


def write(path, columns, words=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pyarrow.table(columns)
    if words is not None:
        table = table.replace_schema_metadata({"huggingface": json.dumps(words)})
    parquet.write_table(table, path)


def open_parquet(tmp_path, split="train", **options) -> Any:
    return open_source(
        "parquet_folder", split, data_dir=tmp_path / "tfds", folder=tmp_path / "shards", **options
    )


def structs(*values):
    return [{"bytes": picture(value), "path": None} for value in values]


def test_a_data_set_of_hugging_face_keeps_the_order_of_its_classes(tmp_path):
    names = {"info": {"features": {"label": {"names": ["zebra", "ant"], "_type": "ClassLabel"}}}}
    write(
        tmp_path / "shards/data/train-00000-of-00001.parquet",
        {"image": structs(1, 2), "label": [1, 0], "text": [["a", "b"], ["c"]]},
        names,
    )
    write(
        tmp_path / "shards/data/test-00000-of-00001.parquet",
        {"image": structs(3), "label": [0], "text": [["d"]]},
        names,
    )
    source = open_parquet(tmp_path)
    assert class_names(source) == ("zebra", "ant")
    found = records(source)
    assert {red: int(record["label"]) for red, record in found.items()} == {1: 1, 2: 0}
    assert [bytes(text).decode() for text in found[1]["caption"]] == ["a", "b"]
    assert len(open_parquet(tmp_path, "test")) == 1
    batch = next(make_batches(source, batch_size=2, image_size=4).iterate(0))
    assert batch["image"].shape == (2, 4, 4, 3) and {"label", "caption"} <= set(batch)


def test_columns_may_have_any_name_and_bytes_may_be_bare(tmp_path):
    columns = {"picture": [picture(1), picture(2), b"bad"], "words": ["x", "y", "z"]}
    write(tmp_path / "shards/a.parquet", columns | {"label": [7, 7, 7]})
    with pytest.raises(ValueError, match="has no usual column of images; set image to one of"):
        open_parquet(tmp_path)
    with pytest.raises(ValueError, match="caption = 'wrds' is no column of .*picture, words"):
        open_parquet(tmp_path, image="picture", caption="wrds")
    source = open_parquet(tmp_path, image="picture", caption="words", label="words")
    assert class_names(source) == ("x", "y", "z") and len(source) == 2
    assert [*source.dataset_info.metadata["skipped"]] == ["a.parquet/2"]
    assert {bytes(r["caption"]).decode() for r in records(source).values()} == {"x", "y"}


def test_images_alone_and_rows_without_one(tmp_path):
    write(tmp_path / "shards/a.parquet", {"image": [picture(1), None, picture(3)]})
    source = open_parquet(tmp_path)
    assert class_names(source) == () and sorted(records(source)) == [1, 3]
    np.testing.assert_array_equal(len(source.dataset_info.metadata["skipped"]), 1)


def test_a_damaged_file_is_told(tmp_path):
    path = tmp_path / "shards/a.parquet"
    path.parent.mkdir()
    path.write_bytes(b"PAR1 and nothing else")
    with pytest.raises(ValueError, match="a.parquet is cut off or no Parquet file"):
        open_parquet(tmp_path)


def test_columns_of_numbers_count(tmp_path):
    columns = {"image": structs(1, 2, 3), "repeats": [1, 2, None], "weight": [0.5, None, 2.0]}
    write(tmp_path / "shards/a.parquet", columns)
    found = records(open_parquet(tmp_path))
    numbers = {red: (int(r["repeats"]), float(r["weight"])) for red, r in found.items()}
    assert numbers == {1: (1, 0.5), 2: (2, 1.0), 3: (1, 2.0)}
