"""Batches of two sources: the order of rows for any number of processes, weights, resume."""

import numpy as np
from PIL import Image

from diffusion_jax.data.batches import make_batches
from diffusion_jax.data.mixing import CaptionedFiles, joined, mixed


def source(first, count=6):
    return [
        {"image": np.full((8, 8, 3), first + i, np.uint8), "caption": f"own {i}"}
        for i in range(count)
    ]


def batches(first, rows, **more):
    options = dict(image_size=8, num_threads=0, seed=1)
    return make_batches(source(first), batch_size=rows, **options | more)


def test_equal_shares_alternate_and_others_repeat_the_shortest_pattern():
    side = lambda start, count: {"index": np.arange(start, start + count)}
    assert joined(side(0, 3), side(10, 3), 0.5)["index"].tolist() == [0, 10, 1, 11, 2, 12]
    found = joined(side(0, 6), side(10, 2), 0.25)
    assert found["index"].tolist() == [0, 1, 2, 10, 3, 4, 5, 11]
    assert found["weight"].tolist() == [1, 1, 1, 0.25, 1, 1, 1, 0.25]
    assert found["weight"].dtype == np.float32


def test_weights_of_the_sources_are_multiplied_and_columns_of_one_are_left_out():
    first = {"index": np.arange(2), "weight": np.array([1.0, 3.0], "f4"), "label": np.zeros(2)}
    found = joined(first, {"index": np.arange(2)}, 2.0)
    assert found["weight"].tolist() == [1, 2, 3, 2] and "label" not in found
    first["loss_weight"] = np.array([5.0, 6.0], "f4")
    found = joined(first, {"index": np.arange(2)}, 2.0)
    assert found["loss_weight"].tolist() == [5, 1, 6, 1]


def test_rows_do_not_depend_on_the_number_of_processes_and_steps_begin_anywhere():
    whole = mixed(batches(0, 4), batches(100, 4), 0.5)
    halves = [
        mixed(*(batches(first, 4, process_index=p, process_count=2) for first in (0, 100)), 0.5)
        for p in range(2)
    ]
    steps = whole.iterate(0)
    next(steps), next(steps)
    third = next(steps)
    for name, column in next(whole.iterate(2)).items():
        np.testing.assert_array_equal(column, third[name])
        parts = [next(half.iterate(2))[name] for half in halves]
        np.testing.assert_array_equal(np.concatenate(parts), column)
    assert np.all((third["image"][:, 0, 0, 0] > -0.5) == (third["weight"] == 0.5))


def test_files_are_records_with_one_caption(tmp_path):
    Image.fromarray(np.full((4, 6), 7, np.uint8)).save(tmp_path / "a.png")
    records = CaptionedFiles([tmp_path / "a.png"], "a fox")
    assert len(records) == 1 and records[0]["caption"] == "a fox"
    assert records[0]["image"].shape == (4, 6, 3) and np.all(records[0]["image"] == 7)
    batch = next(make_batches(records, batch_size=1, image_size=4, num_threads=0).iterate(0))
    assert batch["caption"].tolist() == ["a fox"]


def test_weights_of_samples_stay_beside_a_source_without():
    first = {"index": np.arange(2), "loss_weight": np.array([0.5, 2.0], np.float32)}
    found = joined(first, {"index": np.arange(2)}, 0.25)
    np.testing.assert_array_equal(found["loss_weight"], [0.5, 1.0, 2.0, 1.0])
    np.testing.assert_array_equal(found["weight"], [1.0, 0.25, 1.0, 0.25])
