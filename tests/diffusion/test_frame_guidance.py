"""Scales of the frames of a video, and which row gets which."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.diffusion import frame_guidance as fg

# u = 0 and c = 1: the output is the scale.
COND = {"vector": jnp.ones((2, 1))}
NULL = {"vector": jnp.zeros((2, 1))}
GUIDERS = {
    "linear": fg.linear,
    "triangle": fg.triangle,
    "trapezoid": fg.trapezoid,
    "spatiotemporal": fg.spatiotemporal,
}


def scales_of(name, scale=3.0, num_frames=6, **options):
    """Guide two clips whose prediction is constant; every pixel of a frame has its scale."""

    def apply(x, t, conditioning):
        return jnp.broadcast_to(conditioning["vector"][:, :, None, None, None], x.shape)

    @jax.jit
    def run(scale):
        guide = GUIDERS[name](apply, COND, NULL, scale, **options)
        return guide(jnp.ones((2, num_frames, 2, 2, 1)), jnp.ones(2))

    out = np.asarray(run(jnp.float32(scale)))
    assert np.ptp(out, axis=(0, 2, 3, 4)).max() == 0.0
    return out[0, :, 0, 0, 0]


def test_linear_grows_over_the_frames_of_each_clip():
    want = [1.0, 1.4, 1.8, 2.2, 2.6, 3.0]
    np.testing.assert_allclose(scales_of("linear", num_frames=6), want, rtol=1e-6)
    want = [0.5, 1.0, 1.5, 2.0, 2.5, 3.0]
    got = scales_of("linear", num_frames=6, min_scale=0.5)
    np.testing.assert_allclose(got, want, rtol=1e-6)


def test_triangle_rises_and_falls():
    got = scales_of("triangle", scale=5.0, num_frames=3)
    np.testing.assert_allclose(got, [1.0, 5.0, 1.0], rtol=1e-6)
    got = fg.triangle_scales(5, 1.0, 3.0, 0.5)
    np.testing.assert_allclose(got, [1.0, 3.0, 1.0, 3.0, 1.0], rtol=1e-6)


def test_periods_are_fused():
    one, half = [0.0, 0.5, 1.0, 0.5, 0.0], [0.0, 1.0, 0.0, 1.0, 0.0]
    for name, fuse in {"max": np.maximum, "multiply": np.multiply, "mean": np.add}.items():
        want = fuse(one, half) / (2 if name == "mean" else 1)
        got = fg.triangle_scales(5, 0.0, 1.0, (1.0, 0.5), name)
        np.testing.assert_allclose(got, want, rtol=1e-6)


def test_trapezoid_has_upstreams_plateau_of_ones():
    got = scales_of("trapezoid", num_frames=12, edge_perc=0.26)
    np.testing.assert_allclose(got, [1, 2, 3, 1, 1, 1, 1, 1, 1, 3, 2, 1], rtol=1e-6)
    got = scales_of("trapezoid", num_frames=12, edge_perc=0.26, plateau="scale")
    np.testing.assert_allclose(got, [1, 2, 3, 3, 3, 3, 3, 3, 3, 3, 2, 1], rtol=1e-6)
    np.testing.assert_array_equal(fg.trapezoid_scales(9, 1.0, 3.0), np.ones(9))


def test_spatiotemporal_has_the_views_of_a_time_together():
    """Three times of four views: half a ramp in time, half a triangle in view."""
    got = scales_of("spatiotemporal", scale=7.0, num_frames=12, num_views=4)
    view = np.array([0.0, 2 / 3, 2 / 3, 0.0])
    want = np.concatenate([1 + 6 * (0.5 * time + 0.5 * view) for time in (0.0, 0.5, 1.0)])
    np.testing.assert_allclose(got, want, rtol=1e-5)
    # A single view is at the foot of the triangle.
    got = fg.spatiotemporal_scales(3, 1.0, 3.0)
    np.testing.assert_allclose(got, [1.0, 1.5, 2.0], rtol=1e-6)


def test_single_frames_have_the_smallest_scale():
    for name in GUIDERS:
        np.testing.assert_allclose(scales_of(name, num_frames=1), 1.0)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("linear", {"num_frames": 0}, "num_frames = 0 should be at least 1"),
        ("triangle", {"num_frames": 6, "period": 0.0}, "period = 0.0 should be one or more posi"),
        ("triangle", {"num_frames": 6, "period": ()}, r"period = \(\) should be one or more posi"),
        ("trapezoid", {"num_frames": 6, "edge_perc": 0.6}, r"edge_perc = 0.6 should lie in \[0"),
        ("spatiotemporal", {"num_frames": 6, "num_views": 4}, "num_views = 4 should divide num_fr"),
    ],
)
def test_wrong_options_are_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        scales_of(name, **options)


def test_images_have_no_frames():
    with pytest.raises(
        ValueError, match=r"shape \(2, 4, 4, 1\); it should be a video, \[b t h w c"
    ):
        fg.linear(lambda x, t, c: x, COND, NULL, 2.0)(jnp.ones((2, 4, 4, 1)), jnp.ones(2))


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="period_fusing = 'sum' is unknown; choose from mean, mul"):
        fg.triangle_scales(5, 1.0, 2.0, 1.0, "sum")
    with pytest.raises(ValueError, match="plateau = 'two' is unknown; choose from one, scale"):
        fg.trapezoid_scales(5, 1.0, 2.0, 0.1, "two")
