"""Batches have the angles and views that the samplers of SV3D and SV4D hand in."""

import numpy as np
import pytest
from support.experiments import built

from diffusion_jax.data.views import GIVEN_VIEW
from diffusion_jax.experiment.config.binding import ConfigError
from diffusion_jax.experiment.network.cameras import (
    degrees_read,
    orbit_angles,
    view_angles,
    with_cameras,
)
from diffusion_jax.runs.drawing.views import relative_angles
from diffusion_jax.runs.inputs.orbits import orbit

SIDES = (350.0, 20.0, 110.0)


def clip(elevations, azimuths, **more):
    """A batch of two clips whose frames have these degrees; the second stands 100 further round."""
    turns = np.array([azimuths, np.add(azimuths, 100.0)], np.float32)[..., None]
    above = np.broadcast_to(np.array(elevations, np.float32)[..., None], turns.shape)
    return {"elevations": above, "azimuths": turns, **more}


def test_an_orbit_has_the_angles_of_the_sampler():
    """Evenly around, ending at the picture, wherever the first camera stands."""
    turns = 30.0 + 360.0 / 8 * np.arange(8)
    found = with_cameras(clip(10.0, turns % 360), None, absolute=False)
    wanted = orbit(8, 10.0)
    degrees = [45, 90, 135, 180, 225, 270, 315, 0]
    np.testing.assert_allclose(np.rad2deg(wanted.azimuths), degrees, rtol=1e-5)
    for row in range(2):
        np.testing.assert_allclose(found["azimuths_rad"][row, :, 0], wanted.azimuths, atol=1e-5)
        np.testing.assert_allclose(found["polars_rad"][row, :, 0], wanted.polars, atol=1e-6)
    assert found["azimuths_rad"].dtype == np.float32 and "cond_view" not in found


@pytest.mark.parametrize("absolute", [True, False])
def test_views_have_the_angles_and_inputs_of_the_sampler(absolute):
    """Two times of three cameras: SV4D has polars from the axis, SV4D 2 from the given view."""
    images = np.arange(8.0).reshape(2, 4, 1, 1, 1) + np.zeros((1, 1, 2, 2, 3))
    given = -images[:, :2]
    batch = clip([10.0, 30.0, 0.0] * 2, SIDES * 2, image=images, **{GIVEN_VIEW: given})
    found = with_cameras(batch, 2, absolute=absolute)
    wanted = relative_angles([10.0, 30.0, 0.0], SIDES)
    np.testing.assert_allclose(np.rad2deg(wanted.azimuths), [30, 120], rtol=1e-5)
    polars = np.deg2rad([60.0, 90.0]) if absolute else wanted.polars
    for row in range(2):
        np.testing.assert_allclose(
            found["azimuth_rad"][row, :, 0], np.tile(wanted.azimuths, 2), atol=1e-5
        )
        np.testing.assert_allclose(found["polar_rad"][row, :, 0], np.tile(polars, 2), atol=1e-5)
    np.testing.assert_array_equal(found["cond_frames_without_noise"], given)
    np.testing.assert_array_equal(found["cond_motion"], given)
    np.testing.assert_array_equal(found["cond_view"], images[:, :2])  # of the first time
    assert (found["image_only_indicator"] == np.ones((2, 4))).all()


def test_moving_cameras_count_from_the_given_one_at_the_same_time():
    found = view_angles([[0.0] * 2] * 2, [[0.0, 90.0], [10.0, 130.0]], absolute=True)
    np.testing.assert_allclose(np.rad2deg(found.azimuths), [[90], [120]], rtol=1e-6)
    np.testing.assert_allclose(np.rad2deg(orbit_angles([-90, 90], [0, 0]).polars), [180, 0])


def test_what_a_batch_has_stays_and_what_it_lacks_makes_nothing():
    assert with_cameras({"image": 1, "azimuths": 2}, None, absolute=False) == {
        "image": 1,
        "azimuths": 2,
    }
    mine = np.ones((2, 3, 1))
    batch = clip(0.0, SIDES, polars_rad=mine)
    assert with_cameras(batch, None, absolute=False)["polars_rad"] is mine
    assert degrees_read(["fps_id"]) == () and degrees_read(["polar_rad"])


@pytest.mark.slow
def test_a_model_with_angles_asks_for_them_and_refuses_mirrors():
    options = built("configs/sv3d.py:p_tiny").data.image_options
    assert set(options.frame_columns) == {"polars_rad", "azimuths_rad", "elevations", "azimuths"}
    assert options.num_views is None and options.number_columns == ("cond_aug",)
    with pytest.raises(ConfigError, match="random_flip = True should be False: of a mirrored clip"):
        built("configs/sv3d.py:p_tiny", "--config.data.batches.random_flip=True")
    assert built("configs/sv4d.py:2_tiny").data.image_options.num_views == 2


@pytest.mark.slow
@pytest.mark.parametrize("config", ["configs/sv3d.py:p_tiny", "configs/sv4d.py:2_tiny"])
def test_batches_have_all_that_a_step_reads(config, tmp_path):
    """Shapes and dtypes; of SV3D the picture is the last frame, as when it draws."""
    experiment = built(config)
    data = experiment.data
    source = data._replace(source_options={**data.source_options, "data_dir": tmp_path})
    batch = next(experiment._replace(setting=experiment.setting._replace(data=source))
                 .train_batches(source.source("train")).iterate(0))  # fmt: skip
    placed = experiment.to_devices(batch)
    wanted = experiment.abstract_batch()
    if "sv3d" in config:
        assert experiment.network.frame_place == -1
        assert (placed["azimuths_rad"][:, -1] == 0).all()
        wanted.pop("cond_aug", None)
    assert {k: (v.shape, v.dtype) for k, v in placed.items()} == {
        k: (v.shape, v.dtype) for k, v in wanted.items()
    }
