"""A released file that says something else of itself than the config is told with the way out."""

import json

import numpy as np
import pytest
from support.experiments import built

from diffusion_jax.convert.weights.claims import PREDICTIONS, read_claims
from diffusion_jax.convert.weights.exporting import save_weights
from diffusion_jax.diffusion.schedule import make_schedule
from diffusion_jax.experiment.files.claims import check_claims, overrides_of

EMPTY = np.zeros((0,), np.float32)
V = "--config.schedule.parameterization=v"
ZERO = "--config.schedule.rescale_zero_snr=True"
LDM = np.asarray(make_schedule("linear", 1000, 0.0015, 0.0195).alphas_cumprod)
ZERO_SNR = np.asarray(
    make_schedule(
        "linear", 1000, 0.00085, 0.012, parameterization="v", rescale_zero_snr=True
    ).alphas_cumprod
)


def write(path, tensors, metadata=None):
    weight = {"model.diffusion_model.out.2.bias": np.zeros(4, np.float32)}
    save_weights(path, [], weight | tensors, metadata)
    return path


def agreeing(config, path, *overrides):
    """The overrides that a contradiction names; with them there is none."""
    found = built(config, *overrides).task.contradictions(path)
    advice = overrides_of(found)
    if found:
        with pytest.raises(ValueError, match="contradicts the config: it says .*; add --config"):
            check_claims(found, path)
        check_claims(built(config, *overrides, *advice).task.contradictions(path), path)
    return advice


@pytest.mark.parametrize(
    ("config", "tensors", "metadata", "advice"),
    [
        ("sd15", {}, {}, []),
        ("sd15", {}, {"modelspec.prediction_type": "epsilon"}, []),
        ("sd15", {}, {"modelspec.prediction_type": "v"}, [V]),
        ("sdxl", {"v_pred": EMPTY, "ztsnr": EMPTY}, {}, [V, ZERO]),
        ("sd15", {"scale_factor": np.float32(0.5)}, {}, ["--config.first_stage.scale_factor=0.5"]),
        ("sd21", {}, {"modelspec.prediction_type": "epsilon"},
         ["--config.schedule.parameterization=eps"]),
        ("sd15", {"alphas_cumprod": LDM}, {}, [
            "--config.schedule.name=linear", "--config.schedule.num_timesteps=1000",
            "--config.schedule.linear_start=0.0015", "--config.schedule.linear_end=0.0195"]),
        ("sd21", {"alphas_cumprod": ZERO_SNR}, {}, [
            "--config.schedule.name=linear", "--config.schedule.num_timesteps=1000",
            "--config.schedule.linear_start=0.00085", "--config.schedule.linear_end=0.012", ZERO]),
    ],
)  # fmt: skip
def test_a_file_is_compared_with_the_config(tmp_path, config, tensors, metadata, advice):
    tensors = {name: np.asarray(tensor) for name, tensor in tensors.items()}
    path = write(tmp_path / "x.safetensors", tensors, metadata)
    assert agreeing(f"configs/{config}.py:tiny", path) == advice


@pytest.mark.parametrize("config", ["sd15", "sdxl"])
def test_a_file_of_edm_gets_a_continuous_denoiser(tmp_path, config):
    levels = {"edm_vpred.sigma_max": np.float32(120), "edm_vpred.sigma_min": np.float32(0.002)}
    path = write(tmp_path / "x.safetensors", {k: np.asarray(v) for k, v in levels.items()})
    advice = agreeing(f"configs/{config}.py:tiny", path)
    assert "--config.denoiser.scaling.name=v_edm" in advice
    assert "--config.discretization.sigma_max=120.0" in advice


def test_what_no_config_can_say_is_refused_without_advice(tmp_path):
    path = write(tmp_path / "x.safetensors", {"edm_mean": np.zeros(4, np.float32)})
    found = built("configs/sdxl.py:tiny").task.contradictions(path)
    with pytest.raises(ValueError, match="edm_mean, edm_std, the config says none of it; "):
        check_claims(found, path)


@pytest.mark.parametrize(
    ("name", "changed", "advice"),
    [
        ("scheduler/scheduler_config", {"timestep_spacing": "trailing"},
         ["--config.sampler.discretize=trailing"]),
        ("scheduler/scheduler_config", {"beta_schedule": "linear"}, [
            "--config.schedule.name=sqrt_linear", "--config.schedule.num_timesteps=1000",
            "--config.schedule.linear_start=0.00085", "--config.schedule.linear_end=0.012"]),
        ("unet/config", {"attention_head_dim": 4},
         ["--config.model.num_head_channels=-1", "--config.model.num_heads=4"]),
        ("unet/config", {"attention_head_dim": [1, 4]},
         ["--config.model.num_head_channels=-1", "--config.model.num_heads=4"]),
        ("unet/config", {"norm_num_groups": 16}, ["--config.model.num_groups=16"]),
        ("vae/config", {"scaling_factor": 0.13025}, ["--config.first_stage.scale_factor=0.13025"]),
        ("vae/config", {"norm_num_groups": 8}, ["--config.first_stage.num_groups=8"]),
        ("text_encoder/config", {"num_attention_heads": 4},
         ["--config.conditioning.embedders.text.num_heads=4"]),
        ("unet/config", {}, []),
    ],
)  # fmt: skip
def test_a_folder_is_compared_with_the_config(tmp_path, name, changed, advice):
    """sd15:tiny has 32 and 64 channels and attends at the second level."""
    configs = {
        "scheduler/scheduler_config": {
            "prediction_type": "epsilon", "beta_start": 0.00085, "beta_end": 0.012,
            "beta_schedule": "scaled_linear", "timestep_spacing": "leading",
        },
        "unet/config": {"attention_head_dim": 2},
        "text_encoder/config": {"hidden_act": "quick_gelu", "num_attention_heads": 2},
        "vae/config": {"_class_name": "AutoencoderKL", "scaling_factor": 0.18215},
    }  # fmt: skip
    configs[name] = configs[name] | changed
    for path, config in configs.items():
        (tmp_path / path).parent.mkdir()
        (tmp_path / f"{path}.json").write_text(json.dumps(config))
    assert agreeing("configs/sd15.py:tiny", tmp_path) == advice


@pytest.mark.parametrize("named", ["vae", "vae/diffusion_pytorch_model.safetensors"])
def test_the_weights_of_a_first_stage_are_compared_too(tmp_path, named):
    """Named by their folder or their file, before long work and when they are loaded."""
    vae = tmp_path / "vae"
    vae.mkdir()
    write(vae / "diffusion_pytorch_model.safetensors", {})
    words = {"_class_name": "AutoencoderKL", "scaling_factor": 0.13025, "norm_num_groups": 8}
    (vae / "config.json").write_text(json.dumps(words))
    weights = f"--config.first_stage.weights={tmp_path / named}"
    advice = [
        "--config.first_stage.num_groups=8",
        "--config.first_stage.scale_factor=0.13025",
    ]
    experiment = built("configs/sd15.py:tiny", weights)
    abstract = experiment.abstract_frozen
    for act in (
        experiment.task.check_sources,
        lambda: experiment.task.load_frozen(abstract(), abstract, None),
    ):
        with pytest.raises(ValueError, match=f"{named} contra.*; add {' '.join(advice)}, or set"):
            act()
    for agrees in (advice, ["--config.train.ckpt_check=False"]):
        built("configs/sd15.py:tiny", weights, *agrees).task.check_sources()
    task = built("configs/vae_kl_f8.py:tiny").task
    assert overrides_of(task.contradictions(tmp_path / named)) == ["--config.model.num_groups=8"]


def test_a_file_is_read_again_when_it_changed(tmp_path):
    for word in ("v", "epsilon", "sample"):
        (tmp_path / "x.safetensors").unlink(missing_ok=True)
        path = write(tmp_path / "x.safetensors", {}, {"modelspec.prediction_type": word})
        assert read_claims(path) is read_claims(path)
        assert read_claims(path).prediction == PREDICTIONS[word]
