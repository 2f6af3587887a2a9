"""Windows over time and views go on from what is drawn, as the scripts of SV4D do."""

import types

import numpy as np
import pytest
from PIL import Image
from support.experiments import built, trained

from diffusion_jax.pipeline import Pipeline
from diffusion_jax.runs.drawing.views import (
    by_anchors,
    by_windows,
    draw_views,
    relative_angles,
    used_frames,
    views_of_orbit,
)

TINY = "configs/sv4d.py:tiny"  # two times of two views, and three frames a video
SECOND = "configs/sv4d.py:2_tiny"  # three times of two views


class Recorder:
    """Draw views that say which time they show, and remember what was asked for."""

    def __init__(self, views):
        self.views, self.asked = views, []

    def __call__(self, motion, views, *, known, number, from_end=None):
        times = motion[:, 0, 0, 0]
        ends = None if from_end is None else float(from_end[0, 0, 0, 0])
        self.asked.append((times.tolist(), float(views[0, 0, 0, 0]), known, number, ends))
        drawn = np.zeros((len(motion), self.views, 2, 2, 3))
        return drawn + times[:, None, None, None, None] + 0.5


def video(frames):
    """Frame t is t everywhere; views of it are drawn as t + 0.5."""
    return np.zeros((frames, 2, 2, 3)) + np.arange(frames)[:, None, None, None]


def test_windows_of_sv4d_2_go_on_from_views_that_are_drawn():
    draw = Recorder(4)
    found = by_windows(draw, video(21), 12, 4)
    np.testing.assert_array_equal(found[:, 3, 0, 0, 0], np.arange(21) + 0.5)
    (first, second) = draw.asked
    assert first == ([*range(12)], 0.0, False, 0, None)
    assert second == ([*range(9, 21)], 9.5, True, 1, None)  # moved to end with the video


def test_windows_that_overlap_share_a_frame():
    draw = Recorder(8)
    by_windows(draw, video(21), 5, 8)
    assert [asked[0][0] for asked in draw.asked] == [0, 4, 8, 12, 16]
    assert [asked[1] for asked in draw.asked] == [0.0, 4.5, 8.5, 12.5, 16.5]


def test_sv4d_draws_anchors_and_then_from_both_ends():
    draw = Recorder(8)
    first_views = np.full((8, 2, 2, 3), -1.0)
    found = by_anchors(draw, video(21), 5, first_views)
    assert found.shape == (21, 8, 2, 2, 3)
    assert draw.asked[0] == ([4, 8, 12, 16, 20], -1.0, True, 0, None)
    assert draw.asked[1] == ([0, 1, 2, 3, 4], -1.0, True, 1, 4.5)
    assert draw.asked[5] == ([16, 17, 18, 19, 20], 16.5, True, 5, 20.5)


def test_angles_count_from_the_given_view():
    found = relative_angles(0.0, (0, 60, 120, 180, 240))
    np.testing.assert_allclose(np.rad2deg(found.azimuths), [60, 120, 180, 240], rtol=1e-5)
    np.testing.assert_allclose(np.rad2deg(found.polars), 90.0, rtol=1e-6)
    found = relative_angles([10.0, 40.0], [350.0, 10.0])
    np.testing.assert_allclose(
        np.rad2deg([found.polars, found.azimuths]).ravel(), [60, 20], rtol=1e-4
    )


def test_the_views_of_an_orbit_begin_with_the_picture():
    orbit = np.arange(21)[:, None, None, None] * np.ones((1, 1, 1, 3))
    np.testing.assert_array_equal(views_of_orbit(orbit)[:, 0, 0, 0], [1, 4, 6, 8, 11, 13, 15, 18])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: by_windows(Recorder(4), video(5), 12, 4),
            "has 5 frames; it should have at least 12",
        ),
        (lambda: by_anchors(Recorder(8), video(5), 5, video(8)), "has 5 frames; it should have 21"),
        (lambda: views_of_orbit(video(3)), "has 3 frames; it should have 21"),
        (lambda: relative_angles([1.0, 2.0], [0, 1, 2]), "are 2 elevations and 3 azimuths"),
        (lambda: relative_angles(0.0, [0, float("nan")]), "nan. should be finite numbers"),
    ],
)
def test_what_does_not_fit_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def frames(count):
    """A dark square on white that moves to the right."""
    found = np.full((count, 32, 32, 3), 255, np.uint8)
    for time, frame in enumerate(found):
        frame[12:20, 8 + 2 * time : 16 + 2 * time] = 40
    return found


@pytest.fixture
def draw():
    """draw(config, conditions, **options) -> (views, what each call of sample_fn was given)."""

    def draw(config, conditions, **options):
        calls = []

        def sample_fn(params, frozen, inputs, keys, **given):
            calls.append((inputs, given))
            clip = (1, given["num_frames"], *given["size"], 3)
            return types.SimpleNamespace(x=np.full(clip, 0.1 * len(calls), np.float32))

        task = built(config).task
        assert task.drawing is not None
        drawing = task.drawing._replace(sample_fn=sample_fn)
        experiment = built(config)._replace(task=task._replace(drawing=drawing))
        return draw_views(experiment, {}, {}, conditions, size=(32, 32), **options), calls

    return draw


def test_a_video_becomes_views_and_the_first_window_knows_none(draw):
    views, calls = draw(SECOND, frames(5), num_steps=7)
    assert views.shape == (2, 5, 32, 32, 3) and len(calls) == 2
    (first, given), (second, _) = calls
    assert given["num_steps"] == 7 and given["num_frames"] == 6
    assert not first["image_only_indicator"].any() and second["image_only_indicator"].all()
    np.testing.assert_allclose(second["cond_view"], 0.1)  # drawn by the first
    np.testing.assert_array_equal(first["cond_motion"][0, 2], second["cond_motion"][0, 0])
    turns = np.rad2deg(first["azimuth_rad"][0, :, 0])
    np.testing.assert_allclose(turns, [120, 240] * 3, rtol=1e-5)  # t-major
    np.testing.assert_allclose(np.rad2deg(first["polar_rad"]), 90.0, rtol=1e-6)
    assert first["cond_frames_without_noise"].max() == 1.0  # the background is white


def test_sv4d_goes_on_from_an_orbit(draw):
    orbit = np.zeros((21, 16, 16, 3), np.uint8) + np.arange(21, dtype=np.uint8)[:, None, None, None]
    given = {"video": [Image.fromarray(f) for f in frames(9)], "orbit": orbit, "elevations": 30.0}
    views, calls = draw(TINY, given)
    assert views.shape == (2, 3, 32, 32, 3) and len(calls) == 3
    inputs, options = calls[0]
    shown = np.rint((inputs["cond_view"][0, :, 0, 0, 0] + 1) * 127.5)
    np.testing.assert_array_equal(shown, [6, 13])  # a third and two thirds of 21, from 0
    np.testing.assert_allclose(np.rad2deg(inputs["azimuth_rad"][0, :2, 0]), [120, 240], rtol=1e-5)
    np.testing.assert_allclose(np.rad2deg(inputs["polar_rad"]), 60.0, rtol=1e-5)
    assert options["backward"] is None and calls[1][1]["backward"] is not None


@pytest.mark.parametrize(
    ("config", "conditions", "message"),
    [
        (SECOND, {"video": frames(4), "orbit": 1}, r"'orbit'\] is no input; choose from video, el"),
        (TINY, frames(4), r"it needs conditions\['orbit'\]"),
        (SECOND, None, r"it needs conditions\['video'\]"),
        (SECOND, [], "the video has 0 frames; it should have at least 3"),
        (SECOND, frames(2), "has 2 frames; it should have at least 3"),
        (SECOND, np.full((4, 8, 8, 3), 255, np.uint8), "wholly white or transparent"),
        (SECOND, {"video": frames(4), "azimuths": [0, 1]}, "has 2 angles; it should have 3, the"),
    ],
)
def test_conditions_that_do_not_fit_are_refused(draw, config, conditions, message):
    with pytest.raises(ValueError, match=message):
        draw(config, conditions)


def test_the_scripts_use_21_frames():
    network = built(SECOND).network
    assert used_frames(network) == 21 and used_frames(network, 40) == 40
    with pytest.raises(ValueError, match="num_frames = 4 should be 3 for this model"):
        used_frames(built(TINY).network, 4)


@pytest.mark.slow
@pytest.mark.parametrize("config", [TINY, SECOND])
def test_a_network_draws_views_end_to_end(config):
    weights = trained(config)
    pipe = Pipeline(built(config), weights.params, weights.frozen)
    given = {"video": frames(3)}
    if config == TINY:
        given["orbit"] = np.repeat(frames(3), 7, axis=0)
    views = pipe(given, num_steps=2, seed=1)
    assert views.shape == (2, 3, 32, 32, 3) and views.dtype == np.uint8 and views.std() > 1
    assert np.abs(views.astype(int) - pipe(given, num_steps=2, seed=2)).max() > 1
    with pytest.raises(ValueError, match="n does not fit: this model draws views of a video"):
        pipe(given, n=3)
