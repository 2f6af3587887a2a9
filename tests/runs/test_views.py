"""Windows over time and views go on from what is drawn, as the scripts of SV4D do."""

import numpy as np
import pytest

from diffusion_jax.runs.views import by_anchors, by_windows, relative_angles, views_of_orbit


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
    by_windows(draw, video(21), 5, 8, overlap=1)
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
    ],
)
def test_what_does_not_fit_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
