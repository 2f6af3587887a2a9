"""Records of several frames become clips, a function of (seed, step, row) and of nothing else."""

import itertools

import numpy as np
import pytest

from diffusion_jax.data.batches import eval_batches, make_batches
from diffusion_jax.data.clips import ClipRule, window
from diffusion_jax.data.images import ImageOptions, open_images
from diffusion_jax.data.transforms import CorruptImageError


def video(number, frames=10, size=(6, 5)):
    """A video whose frame t has the value 10 * number + t."""
    values = np.arange(frames, dtype=np.uint8) + 10 * number
    return {"video": np.tile(values[:, None, None, None], (1, *size, 3)), "fps": 12.0}


def take(source, count=1, start=0, **options):
    given = {"batch_size": 4, "image_size": 4, "seed": 3, "num_frames": 3, **options}
    return list(itertools.islice(make_batches(source, **given).iterate(start), count))


def values(batch):
    """The value of each frame, which is the same in all its pixels: int [b t]."""
    pixels = np.rint((batch["image"] + 1) * 127.5).astype(int)
    assert (pixels == pixels[:, :, :1, :1, :1]).all()
    return pixels[:, :, 0, 0, 0]


SOURCE = [video(n) for n in range(6)]


def test_a_batch_of_clips():
    (batch,) = take(SOURCE, frame_stride=2)
    assert batch["image"].shape == (4, 3, 4, 4, 3) and batch["image"].dtype == np.float32
    shown = values(batch)
    assert (np.diff(shown, axis=1) == 2).all()
    assert (shown // 10 == batch["index"][:, None]).all()
    for name in ("fps_id", "motion_bucket_id"):
        assert batch[name].shape == (4, 1) and batch[name].dtype == np.float32
    assert (batch["fps_id"] == 12 / 2 - 1).all()
    assert (batch["image_only_indicator"] == np.zeros((4, 3), np.float32)).all()


def test_every_beginning_comes_and_each_step_is_the_same_again():
    batches = take(SOURCE, 40)
    starts = np.concatenate([values(batch)[:, 0] % 10 for batch in batches])
    assert set(starts) == set(range(8))  # 10 frames hold 8 clips of 3
    assert np.bincount(starts).min() > 8
    for cache, threads in itertools.product((False, True), (0, 2)):
        for old, new in zip(
            batches[7:], take(SOURCE, 3, 7, cache=cache, num_threads=threads), strict=False
        ):
            for key in old:
                np.testing.assert_array_equal(old[key], new[key], err_msg=key)


def test_rows_of_processes_are_rows_of_the_whole_batch():
    (whole,) = take(SOURCE)
    parts = [take(SOURCE, process_index=i, process_count=2)[0] for i in range(2)]
    np.testing.assert_array_equal(np.concatenate([p["image"] for p in parts]), whole["image"])


def test_all_frames_of_a_clip_are_cut_and_mirrored_alike():
    rng = np.random.default_rng(0)
    still = rng.integers(0, 256, (8, 12, 3), dtype=np.uint8)
    source = [{"video": np.stack([still] * 5), "fps": 5.0}] * 4
    batches = take(source, 8, crop="random", random_flip=True)
    images = np.concatenate([batch["image"] for batch in batches])
    np.testing.assert_array_equal(images, np.repeat(images[:, :1], 3, axis=1))
    assert len({image.tobytes() for image in images}) > 4
    mirrored = np.concatenate(
        [take(source, random_flip=flip)[0]["image"] for flip in (False, True)]
    )
    plain = mirrored[0, 0]
    assert {bool((image[0] == plain).all()) for image in mirrored[4:]} == {True, False}
    assert all(
        (image[0] == plain).all() or (image[0] == plain[:, ::-1]).all() for image in mirrored
    )


def test_a_still_is_repeated_and_said_to_be_one():
    image = np.full((6, 5, 3), 77, np.uint8)
    alone = [{"image": image}] * 4
    (batch,) = take(alone)
    assert (values(batch) == 77).all() and (batch["image_only_indicator"] == 1).all()
    assert (batch["fps_id"] == 0).all() and (batch["motion_bucket_id"] == 0).all()
    mixed = [video(1), {"video": image[None], "fps": 12.0}, video(2), {"video": [image], "fps": 0}]
    (batch,) = take(mixed)
    still = batch["index"] % 2 == 1
    assert (batch["image_only_indicator"] == still[:, None]).all()
    assert (values(batch)[still] == 77).all()


def test_without_a_rate_nothing_is_said_of_it():
    (batch,) = take([{"video": video(n)["video"]} for n in range(4)])
    assert not {"fps_id", "motion_bucket_id"} & set(batch)


def test_evaluation_shows_the_middle_and_weighs_what_it_cannot_read():
    source = [video(0), video(1, frames=2), video(2)]
    (batch,) = eval_batches(source, batch_size=4, image_size=4, num_frames=4).iterate(0)
    assert list(batch["weight"]) == [1, 0, 1, 0]
    assert list(values(batch)[0]) == [3, 4, 5, 6] and list(values(batch)[2]) == [23, 24, 25, 26]
    assert batch["image"].shape == (4, 4, 4, 4, 3) and batch["fps_id"].shape == (4, 1)


def test_bad_clips_are_passed_over_and_counted(caplog):
    frames = list(video(2)["video"])
    mixed = {"video": [frames[0], frames[1][:3], *frames[2:]], "fps": 12.0}
    torn = {"video": [b"no image"] * 10, "fps": 12.0}
    source = [video(0), video(1, frames=2), mixed, torn, video(4)]
    for batch in take(source, 4, batch_size=5, num_frames=9):
        assert set(batch["index"]) == {0, 4}
    for words in (
        r"record 1: too short: it has 2 frames, and num_frames = 9 with frame_stride = 1 takes 9",
        "record 2: not a clip: frame ",
        "record 3: not a readable image",
    ):
        assert words in caplog.text
    with pytest.raises(ValueError, match="makes 2 unreadable images, max_corrupt = 1 allows no"):
        take(source, 4, batch_size=5, num_frames=9, max_corrupt=1, num_threads=0)


def test_buckets_sort_clips_by_their_frames():
    source = [video(n, size=(8, 16) if n % 2 else (16, 8)) for n in range(8)]
    options = {"image_size": 32, "num_frames": 3, "buckets": True, "bucket_divisor": 8}
    images = open_images(source, ImageOptions(**options))
    assert images.shapes == ((24, 40), (40, 24))
    assert [list(numbers) for numbers in images.members] == [[1, 3, 5, 7], [0, 2, 4, 6]]
    for batch in take(source, 4, batch_size=2, **options):
        wide = batch["index"][0] % 2 == 1
        assert batch["image"].shape == (2, 3, *((24, 40) if wide else (40, 24)), 3)


@pytest.mark.parametrize("name", ["num_frames", "frame_stride"])
def test_numbers_below_one_are_refused(name):
    with pytest.raises(ValueError, match=f"{name} = 0 should be at least 1"):
        take(SOURCE, **{name: 0})


def test_windows():
    rule = ClipRule(3, 2)
    assert rule.span == 5
    assert window(5, rule, 0.99) == [0, 2, 4]
    assert window(7, rule, 0.0) == [0, 2, 4] and window(7, rule, 0.999) == [2, 4, 6]
    assert window(1, rule, 0.7) == [0, 0, 0]
    with pytest.raises(CorruptImageError, match="has 4 frames"):
        window(4, rule, 0.0)
