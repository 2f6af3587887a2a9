"""Clips of several views: the given view apart, the others in the order of the sampler."""

import itertools

import numpy as np
import pytest

from diffusion_jax.data.batches import eval_batches, make_batches
from diffusion_jax.data.clips import choose_views
from diffusion_jax.data.transforms import CorruptImageError
from diffusion_jax.data.views import GIVEN_VIEW, with_views


def record(views=4, times=5):
    """View v at time t has the value 10 * t + v, and the azimuth 90 * v + t."""
    values = (10 * np.arange(times)[:, None] + np.arange(views)).astype(np.uint8).ravel()
    frames = values[:, None, None, None] * np.ones((1, 4, 4, 3), np.uint8)
    turns = (np.arange(times)[:, None] + 90 * np.arange(views)).ravel()
    return {"video": frames, "num_views": views, "azimuths": turns, "fps": 8.0}


def take(source, count=1, **options):
    given = {"batch_size": 2, "image_size": 4, "num_frames": 4, "num_views": 2, **options}
    return list(itertools.islice(make_batches(source, **given).iterate(0), count))


def values(images):
    return np.rint((images[..., 0, 0, 0] + 1) * 127.5).astype(int)


def test_the_first_view_is_given_and_the_others_go_time_by_time():
    (batch,) = take([record(views=3)] * 2, frame_columns=("azimuths",), frame_stride=2)
    given, shown = values(batch[GIVEN_VIEW]), values(batch["image"])
    start = given[:, :1]
    np.testing.assert_array_equal(given, start + [0, 20])
    np.testing.assert_array_equal(shown, start + [1, 2, 21, 22])
    turns = batch["azimuths"].reshape(2, 2, 3) - start[..., None] / 10
    np.testing.assert_array_equal(turns, np.tile([[0, 90, 180], [2, 92, 182]], (2, 1, 1)))
    assert not {"image_only_indicator", "fps_id", "motion_bucket_id"} & set(batch)


def test_of_more_views_every_choice_comes_and_the_first_stays():
    batches = take([record()] * 2, 30)
    shown = np.concatenate([values(batch["image"]) for batch in batches])
    assert {tuple(row[:2] % 10) for row in shown} == {(1, 2), (1, 3), (2, 3)}
    assert (shown[:, 2:] - shown[:, :2] == 10).all()
    assert {int(row[0]) // 10 for row in shown} == {0, 1, 2, 3}
    given = np.concatenate([values(batch[GIVEN_VIEW]) for batch in batches])
    assert (given % 10 == 0).all() and (given // 10 == shown[:, ::2] // 10).all()


def test_every_choice_of_views_has_its_place():
    found = [choose_views(6, 3, (rank + 0.5) / 10) for rank in range(10)]
    assert found == [[0, *rest] for rest in itertools.combinations(range(1, 6), 3)]
    with pytest.raises(CorruptImageError, match="it has 3 views, and a clip takes 4"):
        choose_views(3, 3, 0.5)


def test_evaluation_pads_and_weighs_what_has_too_few_views():
    options = {"batch_size": 4, "image_size": 4, "num_frames": 4, "num_views": 2}
    source = [record(), record(views=2), record()]
    (batch,) = eval_batches(source, **options, frame_columns=("azimuths",)).iterate(0)
    assert batch["weight"].tolist() == [1, 0, 1, 0]
    assert batch["image"].shape == (4, 4, 4, 4, 3) and batch[GIVEN_VIEW].shape == (4, 2, 4, 4, 3)
    assert batch["azimuths"].shape == (4, 6, 1) and (values(batch["image"])[1] == 0).all()


def test_without_views_a_batch_stays_as_it_is():
    batch = {"image": np.zeros((1, 2, 4, 4, 3))}
    assert with_views(lambda step: batch, None, 0) is batch


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ([record(views=2)] * 2, {}, "have 2 views of each time, and the model takes 3"),
        ([{"video": record()["video"]}] * 2, {}, "have 1 view of each time, and the model takes"),
        ([record()] * 2, {"num_views": None}, "have 4 views of each time, and the model takes 1"),
        ([record()] * 2, {"num_frames": 5}, "num_frames = 5 should be a multiple of 2, the views"),
        ([record(times=1)] * 2, {}, "takes 2 frames, but the first records .* have at most 1"),
    ],
)
def test_records_that_do_not_fit_are_refused(source, options, message):
    with pytest.raises(ValueError, match=message):
        take(source, **options)
