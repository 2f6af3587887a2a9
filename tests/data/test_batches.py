"""Batches are a pure function of (seed, step), for any number of processes."""

import itertools
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from diffusion_jax.data.batches import eval_batches, make_batches

SIZE = 23
SIZES = ("original_size", "crop_top_left", "target_size")


def records(n=SIZE, size=6, text=True):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (n, size, size, 3), dtype=np.uint8)
    extra = [{"caption": f"picture {i}"} if text else {} for i in range(n)]
    return [{"image": images[i], "label": i % 5, **extra[i]} for i in range(n)]


def take(batches, n, start=0):
    return list(itertools.islice(batches.iterate(start), n))


def options(**changes):
    return {"batch_size": 4, "image_size": 6, "seed": 3, **changes}


def assert_equal(left, right):
    assert left.keys() == right.keys()
    for key in left:
        np.testing.assert_array_equal(left[key], right[key], err_msg=key)


def test_contents_and_types():
    source = records()
    batch = take(make_batches(source, **options()), 1)[0]
    assert {key: (value.shape, value.dtype.kind) for key, value in batch.items()} == {
        "image": ((4, 6, 6, 3), "f"),
        "label": ((4,), "i"),
        "caption": ((4,), "U"),
        "index": ((4,), "i"),
        **dict.fromkeys(SIZES, ((4, 2), "i")),
    }
    assert batch["image"].dtype == np.float32
    assert batch["label"].dtype == np.int32
    assert batch["index"].dtype == np.int64
    for row, index in enumerate(batch["index"]):
        assert batch["label"][row] == index % 5
        assert batch["caption"][row] == f"picture {index}"
        expected = source[index]["image"] / 127.5 - 1
        np.testing.assert_allclose(batch["image"][row], expected, atol=1e-6)


def test_no_labels_and_no_captions():
    source = [{"image": record["image"]} for record in records()]
    assert set(take(make_batches(source, **options()), 1)[0]) == {"image", "index", *SIZES}


@pytest.mark.parametrize("cache", [False, True])
@pytest.mark.parametrize("num_threads", [0, 2])
def test_resume_is_exact(cache, num_threads):
    augment = {"random_flip": True, "crop": "random", "image_size": 4}
    source = records()
    for record in source:
        record["image"] = record["image"][:, :5]  # not square: the random crop has a choice
    whole = take(make_batches(source, **options(**augment)), 15)
    again = make_batches(source, **options(cache=cache, num_threads=num_threads, **augment))
    for step in (0, 1, 7, 12):
        for expected, got in zip(whole[step:], take(again, 3, start=step), strict=False):
            assert_equal(expected, got)


@pytest.mark.parametrize("process_count", [1, 2, 4])
def test_processes_share_one_global_batch(process_count):
    augment = {"random_flip": True, "crop": "random", "image_size": 4}
    source = records()
    for record in source:
        record["image"] = record["image"][:5]
    expected = take(make_batches(source, **options(**augment)), 8)
    parts = [
        take(
            make_batches(
                source, process_index=p, process_count=process_count, **options(**augment)
            ),
            8,
        )
        for p in range(process_count)
    ]
    for step in range(8):
        joined = {
            key: np.concatenate([part[step][key] for part in parts]) for key in expected[step]
        }
        assert_equal(expected[step], joined)


def test_every_epoch_is_a_new_order_of_all_records():
    batches = make_batches(records(), **options(batch_size=1))
    stream = [int(batch["index"][0]) for batch in take(batches, 3 * SIZE)]
    epochs = [stream[i * SIZE : (i + 1) * SIZE] for i in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(SIZE))
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert epochs[0] != list(range(SIZE))


def test_seed_changes_order_and_flips():
    def stream(seed):
        return take(make_batches(records(), **options(seed=seed, random_flip=True)), 5)

    orders = {tuple(np.concatenate([b["index"] for b in stream(seed)])) for seed in range(4)}
    assert len(orders) == 4


def test_order_is_pinned():
    """A checkpoint of today must find the same batches with later versions of numpy and grain."""
    first = take(make_batches(records(), **options()), 2)
    assert np.concatenate([batch["index"] for batch in first]).tolist() == PINNED_ORDER


PINNED_ORDER = [6, 13, 1, 18, 11, 19, 8, 5]


def test_flips_half_of_the_images_and_only_mirrors():
    """Of 4,000 images 2,000 +- 32 are mirrored; six standard deviations are allowed."""
    source = records(text=False)
    flipped = 0
    for batch in take(make_batches(source, **options(random_flip=True, batch_size=20)), 200):
        shown = np.rint((batch["image"] + 1) * 127.5).astype(np.uint8)
        original = np.stack([source[i]["image"] for i in batch["index"]])
        is_flipped = (shown != original).any(axis=(1, 2, 3))
        np.testing.assert_array_equal(shown[is_flipped], original[is_flipped, :, ::-1])
        flipped += is_flipped.sum()
    assert abs(flipped - 2000) < 190


def test_flips_of_a_record_differ_between_epochs_with_cache():
    batches = make_batches(records(2), **options(batch_size=2, random_flip=True, cache=True))
    seen = {
        (int(i), image.tobytes())
        for batch in take(batches, 20)
        for i, image in zip(batch["index"], batch["image"], strict=True)
    }
    assert len(seen) == 4


def test_without_shuffle_and_repeat():
    batches = make_batches(records(), **options(shuffle=False, repeat=False))
    found = list(batches.iterate(1))
    assert batches.steps_per_epoch == 5
    assert batches.num_examples == SIZE
    np.testing.assert_array_equal(np.concatenate([b["index"] for b in found]), np.arange(4, 20))


@pytest.mark.parametrize("make", [make_batches, eval_batches])
@pytest.mark.parametrize("num_threads", [0, 1, 3])
def test_finish_runs_in_the_prefetching_threads(make, num_threads):
    """The consumer's thread finishes a batch only where there is no other thread."""
    changes = {"batch_size": 4, "image_size": 6, "num_threads": num_threads}
    threads = []

    def finish(batch):
        threads.append(threading.get_ident())
        return {**batch, "length": np.array([len(text) for text in batch["caption"]])}

    plain = make(records(), **changes).iterate(1)
    finished = make(records(), finish=finish, **changes).iterate(1)
    for _, expected, got in zip(range(5), plain, finished, strict=False):
        assert_equal(expected | {"length": np.char.str_len(expected["caption"])}, got)
    assert (threading.get_ident() in threads) == (num_threads == 0)
    assert len(set(threads)) <= max(num_threads, 1)


WORKER_SCRIPT = """
import itertools
import threading
import numpy as np
from diffusion_jax.data.batches import make_batches

source = [
    {"image": np.full((4, 4 + 4 * (i % 2), 3), i, np.uint8), "caption": f"picture {i}"}
    for i in range(23)
]
lock, threads = threading.Lock(), set()

def finish(batch):
    with lock:  # which cannot be pickled
        threads.add(threading.get_ident())
    return {**batch, "longest": max(map(len, batch["caption"]))}

for num_workers in (0, 1):
    batches = make_batches(
        source, batch_size=4, image_size=4, buckets=True, bucket_divisor=2, seed=3,
        num_workers=num_workers, finish=finish,
    )
    for batch in itertools.islice(batches.iterate(2), 3):
        print(num_workers, batch["index"].tolist(), batch["caption"].tolist(),
              batch["image"].sum(), batch["longest"])
assert threading.get_ident() not in threads
"""


@pytest.mark.slow
def test_worker_processes_give_the_same_batches():
    """In a program of its own, as grain has to pickle functions that the shape checks wrap."""
    ran = subprocess.run(
        [sys.executable, "-c", WORKER_SCRIPT],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ran.returncode == 0, ran.stderr
    lines = [line.split(" ", 1) for line in ran.stdout.splitlines()]
    assert len(lines) == 6
    assert [text for worker, text in lines if worker == "0"] == [
        text for worker, text in lines if worker == "1"
    ]
    assert all(text.endswith((" 9", " 10")) for _, text in lines)


def broken(*indices):
    source = records()
    for i in indices:
        source[i] = {**source[i], "image": b"\x89PNG but not really"}
    return source


def test_corrupt_record_is_replaced_by_its_successor():
    batches = make_batches(broken(2, 3), **options(shuffle=False, max_corrupt=2))
    for batch in (take(batches, 1)[0], take(batches, 1)[0]):
        assert batch["index"].tolist() == [0, 1, 4, 4]
        assert batch["label"].tolist() == [0, 1, 4, 4]


def test_too_many_corrupt_records_stop_with_the_record():
    batches = make_batches(broken(2, 5), **options(shuffle=False, max_corrupt=1, num_threads=0))
    with pytest.raises(ValueError, match=r"record 5 .*max_corrupt = 1"):
        take(batches, 2)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"batch_size": 24}, "batch_size = 24 should be at most 23, the records"),
        ({"batch_size": 0}, "batch_size = 0 should be a positive multiple"),
        (
            {"process_count": 3, "batch_size": 4},
            "batch_size = 4 should be a positive multiple of the 3",
        ),
        ({"process_index": 2, "process_count": 2}, "process_index = 2 should be between 0 and 1"),
        ({"image_size": 0}, "image_size = 0 should be a positive"),
        ({"channels": 2}, "channels = 2 should be 1 .* or 3"),
        ({"crop": "middle"}, "crop = 'middle' is unknown; choose from center"),
        ({"resize": "cubic"}, "resize = 'cubic' is unknown; choose from bicubic"),
        ({"pad": -1}, "pad = -1 should be at least 0"),
        ({"seed": -1}, "seed = -1 should be at least 0"),
        ({"image_key": "picture"}, "image_key = 'picture' is no feature; choose from image"),
        ({"cache": True, "num_workers": 2}, "num_workers = 2 should be 0 with cache = True"),
    ],
)
def test_bad_arguments(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        make_batches(records(), **options(**changes))


def test_empty_source():
    with pytest.raises(ValueError, match="the data set is empty"):
        make_batches([], **options())
    with pytest.raises(ValueError, match="the data set is empty"):
        eval_batches([], batch_size=2, image_size=4)


@pytest.mark.parametrize("process_count", [1, 2])
def test_evaluation_sees_every_record_once(process_count):
    seen = []
    for p in range(process_count):
        batches = eval_batches(
            records(), batch_size=8, image_size=6, process_index=p, process_count=process_count
        )
        found = list(batches.iterate(0))
        assert len(found) == batches.steps_per_epoch == 3
        for batch in found:
            assert batch["image"].shape == (8 // process_count, 6, 6, 3)
            assert batch["weight"].dtype == np.float32
            np.testing.assert_array_equal(batch["weight"] == 0, batch["index"] == -1)
            seen += batch["index"][batch["weight"] == 1].tolist()
    assert sorted(seen) == list(range(SIZE))


def test_evaluation_batch_may_exceed_the_data():
    (batch,) = eval_batches(records(3), batch_size=8, image_size=6).iterate(0)
    assert batch["weight"].tolist() == [1, 1, 1, 0, 0, 0, 0, 0]


def test_evaluation_gives_corrupt_records_no_weight():
    batch = next(eval_batches(broken(1), batch_size=4, image_size=6).iterate(0))
    assert batch["weight"].tolist() == [1, 0, 1, 1]
    assert batch["index"].tolist() == [0, 1, 2, 3]


def coordinates(*sizes):
    """Images whose red is the row and whose green is the column of each pixel."""
    return [
        {"image": np.stack([*np.indices(size), np.full(size, i)], -1).astype(np.uint8)}
        for i, size in enumerate(sizes)
    ]


def first_pixels(batch):
    return np.rint((batch["image"][:, 0, 0] + 1) * 127.5).astype(int)


@pytest.mark.parametrize("cache", [False, True])
def test_size_conditioning_tells_the_window_that_is_seen(cache):
    """6 pixels are the shorter side, so nothing is resized and the first pixel is (top, left); a
    mirrored picture is cut at the left of its own, width - 1 - (old column of its first pixel)."""
    sizes = [(6, 11), (9, 6), (6, 6), (6, 30)]
    changes = {"crop": "random", "random_flip": True, "cache": cache}
    mirrored = 0
    for batch in take(make_batches(coordinates(*sizes), **options(**changes)), 40):
        original = np.array([sizes[i] for i in batch["index"]])
        np.testing.assert_array_equal(batch["original_size"], original)
        np.testing.assert_array_equal(batch["target_size"], [[6, 6]] * 4)
        tops, columns, _ = first_pixels(batch).T
        is_mirrored = batch["image"][:, 0, 0, 1] > batch["image"][:, 0, 1, 1]
        lefts = np.where(is_mirrored, original[:, 1] - 1 - columns, columns)
        np.testing.assert_array_equal(batch["crop_top_left"], np.stack([tops, lefts], 1))
        mirrored += is_mirrored.sum()
        assert {batch[key].dtype for key in SIZES} == {np.dtype(np.int32)}
    assert 40 < mirrored < 120


def test_size_conditioning_of_resized_images():
    """Enlarged twice by repetition of pixels, so the first pixel is half of (top, left)."""
    source = coordinates((3, 8), (13, 3), (3, 3))
    batches = eval_batches(source, batch_size=4, image_size=6, resize="nearest")
    batch = next(batches.iterate(0))
    assert batch["original_size"].tolist()[:3] == [[3, 8], [13, 3], [3, 3]]
    assert batch["crop_top_left"].tolist()[:3] == [[0, 5], [10, 0], [0, 0]]
    np.testing.assert_array_equal(first_pixels(batch)[:3, :2] * 2, [[0, 4], [10, 0], [0, 0]])
    stretched = eval_batches(source, batch_size=3, image_size=6, crop="stretch", pad=1)
    assert stretched.shapes == ((6, 6),)
    batch = next(stretched.iterate(0))
    assert batch["original_size"].tolist() == [[3, 8], [13, 3], [3, 3]]
    assert not batch["crop_top_left"].any()


# (height, width) of 40 images, mostly of three aspect ratios; one is wider than any shape.
PHOTOS = [(8, 8)] * 11 + [(6, 9)] * 9 + [(18, 12)] * 10 + [(7, 8)] * 5 + [(1, 1)] * 4 + [(2, 20)]
BUCKETED = {"image_size": 8, "buckets": True, "bucket_divisor": 2, "max_aspect": 3.0}


def test_a_batch_of_a_bucket_has_its_shape():
    batches = make_batches(coordinates(*PHOTOS), **options(**BUCKETED))
    assert batches.shapes == ((6, 10), (8, 8), (10, 6))
    assert batches.num_examples == 40
    assert batches.steps_per_epoch == 10 // 4 + 20 // 4 + 10 // 4
    times = np.zeros(40, int)
    for batch in take(batches, 90):  # 9 epochs of 40 / 4 batches
        shape = batch["image"].shape[1:3]
        assert shape in batches.shapes
        np.testing.assert_array_equal(batch["target_size"], [shape] * 4)
        original = [PHOTOS[i] for i in batch["index"]]
        assert batch["original_size"].tolist() == [list(size) for size in original]
        wide = {"(6, 10)": {(6, 9), (2, 20)}, "(10, 6)": {(18, 12)}}
        assert set(original) <= wide.get(str(shape), {(8, 8), (7, 8), (1, 1)})
        times += np.bincount(batch["index"], minlength=40)
    assert set(times) <= {8, 9, 10}
    assert times.sum() == 360


@pytest.mark.parametrize("process_count", [1, 2])
def test_buckets_resume_and_share(process_count):
    changes = {"crop": "random", "random_flip": True, **BUCKETED}
    expected = take(make_batches(coordinates(*PHOTOS), **options(**changes)), 25)
    assert len({batch["image"].shape for batch in expected}) == 3
    for start in (0, 11, 24):
        parts = [
            take(
                make_batches(
                    coordinates(*PHOTOS),
                    cache=True,
                    process_index=p,
                    process_count=process_count,
                    **options(**changes),
                ),
                25 - start,
                start=start,
            )
            for p in range(process_count)
        ]
        for whole, *shares in zip(expected[start:], *parts, strict=True):
            joined = {key: np.concatenate([share[key] for share in shares]) for key in whole}
            assert_equal(whole, joined)


def test_corrupt_record_in_a_bucket_is_replaced_in_its_shape():
    source = coordinates(*PHOTOS)
    source[10] = {"image": b"no image"}  # counts as one of image_size
    batches = make_batches(source, **options(cache=True, **BUCKETED))
    found = take(batches, 30)
    assert {batch["image"].shape[1:3] for batch in found} == set(batches.shapes)
    in_square = [10 + 1 in b["index"] for b in found if b["image"].shape[1:3] == (8, 8)]
    assert any(in_square)  # record 11 is wide, and stands in for record 10
    assert not any(10 in batch["index"] for batch in found)


@pytest.mark.parametrize("process_count", [1, 2])
def test_evaluation_in_buckets_sees_every_record_once(process_count):
    seen, shapes = [], []
    for p in range(process_count):
        batches = eval_batches(
            coordinates(*PHOTOS),
            batch_size=8,
            process_index=p,
            process_count=process_count,
            **BUCKETED,
        )
        found = list(batches.iterate(0))
        assert len(found) == batches.steps_per_epoch == 2 + 3 + 2
        for batch in found:
            np.testing.assert_array_equal(batch["weight"] == 0, batch["index"] == -1)
            seen += batch["index"][batch["weight"] == 1].tolist()
        shapes.append([batch["image"].shape[1:3] for batch in found])
    assert sorted(seen) == list(range(40))
    assert shapes[0] == shapes[-1]
    assert set(shapes[0]) == set(batches.shapes)


def test_bad_bucket_options():
    for changes, sentence in [
        (
            {"bucket_divisor": 3},
            r"image_size = \(8, 8\) should be a multiple of bucket_divisor = 3",
        ),
        ({"max_aspect": 0.9}, "max_aspect = 0.9 should be at least 1"),
    ]:
        with pytest.raises(ValueError, match=sentence):
            make_batches(coordinates(*PHOTOS), **options(**{**BUCKETED, **changes}))


def test_one_of_several_captions_is_drawn():
    source = [
        {"image": np.zeros((6, 6, 3), np.uint8), "caption": [f"{i}{c}" for c in "abc"][: 1 + i % 3]}
        for i in range(6)
    ]
    batches = make_batches(source, **options(batch_size=6))
    found = take(batches, 100)
    drawn = {text for batch in found for text in batch["caption"]}
    assert drawn == {text for record in source for text in record["caption"]}
    count = sum("2b" in batch["caption"] for batch in found)
    assert 15 < count < 55  # a third of 100
    for batch, again in zip(found[50:], take(batches, 50, start=50), strict=True):
        assert_equal(batch, again)
    halves = [
        take(make_batches(source, process_index=p, process_count=2, **options(batch_size=6)), 9)
        for p in (0, 1)
    ]
    for batch, *parts in zip(found, *halves, strict=False):
        joined = np.concatenate([part["caption"] for part in parts])
        np.testing.assert_array_equal(joined, batch["caption"])
    # One draw per record and step, no matter how the images are augmented.
    flipped = take(make_batches(source, **options(batch_size=6, random_flip=True)), 1)[0]
    np.testing.assert_array_equal(flipped["caption"], found[0]["caption"])
    evaluated = next(eval_batches(source, batch_size=6, image_size=6).iterate(0))
    assert evaluated["caption"].tolist() == [f"{i}a" for i in range(6)]
