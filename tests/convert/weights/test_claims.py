"""What files and folders say of their own models."""

import json

import numpy as np
import pytest

from diffusion_jax.convert.weights.claims import Claims, find_schedule, read_claims, same_levels
from diffusion_jax.convert.weights.exporting import save_weights
from diffusion_jax.diffusion.schedule import make_schedule

WEIGHT = {"model.diffusion_model.out.2.bias": np.zeros(4, np.float32)}
EMPTY = np.zeros((0,), np.float32)


def claims(tmp_path, tensors, metadata=None):
    path = tmp_path / "x.safetensors"
    save_weights(path, [], WEIGHT | tensors, metadata)
    return read_claims(path)


@pytest.mark.parametrize(
    ("tensors", "metadata", "expected"),
    [
        ({}, {}, {}),
        ({"v_pred": EMPTY}, {}, {"prediction": "v"}),
        ({"v_pred": EMPTY, "ztsnr": EMPTY}, {}, {"prediction": "v", "zero_snr": True}),
        ({}, {"modelspec.prediction_type": "v"}, {"prediction": "v"}),
        ({}, {"modelspec.prediction_type": "epsilon"}, {"prediction": "eps"}),
        ({"v_pred": EMPTY}, {"modelspec.prediction_type": "epsilon"}, {"prediction": "v"}),
        (
            {"edm_vpred.sigma_max": np.float32(120.0), "edm_vpred.sigma_min": np.float32(0.002)},
            {},
            {"prediction": "v_edm", "sigma_max": 120.0, "sigma_min": 0.002, "sigma_data": 1.0},
        ),
        ({"scale_factor": np.array(0.5, np.float16)}, {}, {"scale_factor": 0.5}),
        (
            {"edm_mean": np.zeros(4, np.float32)},
            {},
            {"prediction": "edm", "unreadable": ("latents normalised by edm_mean, edm_std",)},
        ),
    ],
)
def test_marks_and_words_of_a_file_are_read(tmp_path, tensors, metadata, expected):
    found = claims(tmp_path, {k: np.asarray(v) for k, v in tensors.items()}, metadata)
    wanted = Claims(**expected)
    for name in wanted._fields:
        value = getattr(wanted, name)
        value = pytest.approx(value) if isinstance(value, float) else value
        assert getattr(found, name) == value, name


def test_buffers_give_the_noise_levels(tmp_path):
    schedule = make_schedule("linear", 1000, 0.00085, 0.012)
    for name, table in (
        ("alphas_cumprod", schedule.alphas_cumprod),
        ("denoiser.sigmas", schedule.sqrt_recipm1_alphas_cumprod),
    ):
        (tmp_path / name).mkdir()
        found = claims(tmp_path / name, {name: np.asarray(table)})
        np.testing.assert_allclose(found.alphas_cumprod, schedule.alphas_cumprod, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "shape"),
    [("alphas_cumprod", (0,)), ("denoiser.sigmas", (2, 2)), ("scale_factor", (2,))],
)
def test_a_buffer_of_another_shape_is_told(tmp_path, name, shape):
    with pytest.raises(ValueError, match=f"x.safetensors: {name} has the shape .* should be a"):
        claims(tmp_path, {name: np.zeros(shape, np.float32)})


def test_a_mark_of_zero_terminal_snr_says_more_than_an_older_buffer(tmp_path):
    schedules = [
        make_schedule("linear", 1000, 0.00085, 0.012, parameterization="v", rescale_zero_snr=zero)
        for zero in (False, True)
    ]
    for number, schedule in enumerate(schedules):
        (tmp_path / str(number)).mkdir()
        table = {"denoiser.sigmas": np.asarray(schedule.sqrt_recipm1_alphas_cumprod)}
        found = claims(tmp_path / str(number), {"ztsnr": EMPTY} | table)
        stretched = np.asarray(schedules[1].alphas_cumprod)
        np.testing.assert_allclose(found.alphas_cumprod, stretched, atol=1e-4)


def folder(tmp_path, scheduler=None, unet=None, vae=None):
    parts = {"scheduler/scheduler_config": scheduler, "unet/config": unet, "vae/config": vae}
    for name, content in parts.items():
        path = tmp_path / f"{name}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content or {}))
    return read_claims(tmp_path)


def test_a_folder_says_it_in_its_configs(tmp_path):
    scheduler = {
        "_class_name": "DDIMScheduler", "prediction_type": "v_prediction",
        "rescale_betas_zero_snr": True, "timestep_spacing": "trailing",
        "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
    }  # fmt: skip
    unet = {"attention_head_dim": [5, 10, 20, 20], "norm_num_groups": 16}
    vae = {"_class_name": "AutoencoderKL", "scaling_factor": 0.13025}
    found = folder(tmp_path, scheduler, unet, vae)
    assert (found.prediction, found.zero_snr, found.spacing) == ("v", True, "trailing")
    assert (found.heads, found.num_groups) == ((5, 10, 20, 20), 16)
    assert found.scale_factor == 0.13025 and found.alphas_cumprod is not None
    assert found.alphas_cumprod[-1] == 0.0 and len(found.alphas_cumprod) == 1000
    assert found.schedule == {
        "name": "linear", "num_timesteps": 1000, "linear_start": 0.00085, "linear_end": 0.012,
    }  # fmt: skip


def test_what_a_folder_leaves_out_is_what_diffusers_takes_then(tmp_path):
    found = folder(tmp_path, {"_class_name": "PNDMScheduler"}, {}, {"_class_name": "AutoencoderKL"})
    assert (found.prediction, found.zero_snr, found.scale_factor) == ("eps", False, 0.18215)
    assert found.schedule is not None and found.schedule["name"] == "sqrt_linear"


@pytest.mark.parametrize(
    ("scheduler", "expected"),
    [
        ({"_class_name": "EDMEulerScheduler"}, ("edm", 0.002, 80.0, 0.5)),
        (
            {"_class_name": "EDMEulerScheduler", "prediction_type": "v_prediction",
             "sigma_max": 120.0, "sigma_data": 1.0},
            ("v_edm", 0.002, 120.0, 1.0),
        ),
        (  # stabilityai/stable-video-diffusion-img2vid, as far as it is read
            {"_class_name": "EulerDiscreteScheduler", "prediction_type": "v_prediction",
             "sigma_min": 0.002, "sigma_max": 700.0, "timestep_type": "continuous",
             "use_karras_sigmas": True, "beta_schedule": "scaled_linear"},
            ("v_edm", 0.002, 700.0, 1.0),
        ),
    ],
)  # fmt: skip
def test_schedulers_of_edm_are_known(tmp_path, scheduler, expected):
    found = folder(tmp_path, scheduler)
    assert (found.prediction, found.sigma_min, found.sigma_max, found.sigma_data) == expected


def test_trained_betas_and_what_has_no_place_here(tmp_path):
    found = folder(tmp_path, {"trained_betas": [0.1, 0.2]}, vae={
        "_class_name": "AutoencoderKL", "shift_factor": 0.1, "latents_mean": [0.0]
    })  # fmt: skip
    np.testing.assert_allclose(found.alphas_cumprod, [0.9, 0.72])
    assert found.unreadable == (
        "shift_factor in vae/config.json",
        "latents_mean in vae/config.json",
    )
    other = folder(tmp_path, {"beta_schedule": "laplace"})
    assert other.unreadable == ("beta_schedule 'laplace' in scheduler_config.json",)


@pytest.mark.parametrize("content", ["{", "[1]", "[" * 100_000])
def test_a_damaged_config_of_a_folder_is_told(tmp_path, content):
    with pytest.raises(ValueError, match="scheduler_config.json is damaged"):
        folder(tmp_path, content)


@pytest.mark.parametrize(
    "options",
    [
        {"name": "linear", "num_timesteps": 1000, "linear_start": 0.00085, "linear_end": 0.012},
        {"name": "linear", "num_timesteps": 1000, "linear_start": 0.0015, "linear_end": 0.0195},
        {"name": "sqrt_linear", "num_timesteps": 500, "linear_start": 1e-4, "linear_end": 0.02},
        {"name": "linear", "num_timesteps": 200, "linear_start": 0.003, "linear_end": 0.05},
        {"name": "cosine", "num_timesteps": 1000},
        {"name": "linear", "num_timesteps": 1000, "linear_start": 0.00085, "linear_end": 0.012,
         "rescale_zero_snr": True},
    ],
)  # fmt: skip
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_a_schedule_is_found_by_its_levels(options, dtype):
    schedule = make_schedule(**options, parameterization="v")
    table = np.asarray(schedule.alphas_cumprod).astype(dtype).astype(np.float64)
    found = find_schedule(table)
    if found is None:  # of a table of its own, float16 says too little
        assert dtype == np.float16 and options["linear_start"] == 0.003
    else:
        again = make_schedule(**found, parameterization="v")
        assert same_levels(np.asarray(again.alphas_cumprod, np.float64), table)
    assert find_schedule(np.linspace(0.9, 0.3, 10)) is None


@pytest.mark.parametrize(
    ("scheduler", "unet", "message"),
    [
        ({"beta_start": "a"}, {}, "beta_start = 'a' should be of another kind"),
        ({"prediction_type": 3}, {}, "prediction_type = 3 should be of another kind"),
        ({"rescale_betas_zero_snr": "yes"}, {}, "rescale_betas_zero_snr = 'yes' should be"),
        ({"trained_betas": ["a"]}, {}, "scheduler_config.json has no schedule of betas"),
        ({"beta_end": 7.0}, {}, "has no schedule of betas: linear_end = 7.0 should lie in"),
        ({}, {"attention_head_dim": [0, 8]}, r"attention_head_dim = \[0, 8\] should be numbers of"),
        ({}, {"attention_head_dim": {}}, "attention_head_dim = {} should be of another kind"),
        ({}, {"norm_num_groups": 1.5}, "norm_num_groups = 1.5 should be of another kind"),
    ],
)
def test_values_of_another_kind_are_told(tmp_path, scheduler, unet, message):
    with pytest.raises(ValueError, match=message):
        folder(tmp_path, scheduler, unet)
