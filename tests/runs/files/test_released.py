"""What a released file is said to be, and the config that is found for it."""

import numpy as np
import pytest
from support.experiments import built, trained

from diffusion_jax.convert.weights.exporting import save_weights
from diffusion_jax.experiment.config.files import load_config
from diffusion_jax.runs.files.released import CONFIGS, config_for, describe_file
from diffusion_jax.runs.folder import save_config

UNET = "model.diffusion_model."
EMPTY = np.zeros((0,), np.float32)


def write(path, context, channels=4, **marks):
    """A file whose few tensors say which UNet it would be."""
    save_weights(path, [], {
        f"{UNET}input_blocks.0.0.weight": np.zeros((8, channels, 3, 3), np.float16),
        f"{UNET}out.2.bias": np.zeros(4, np.float16),
        f"{UNET}input_blocks.1.1.a.attn2.to_k.weight": np.zeros((8, context), np.float16),
        **marks,
    })  # fmt: skip
    return path


@pytest.mark.parametrize(
    ("context", "marks", "config"),
    [
        (768, {}, "sd15"),
        (1024, {"v_pred": EMPTY}, "sd21:768v"),
        (2048, {}, "sdxl"),
        (2048, {"v_pred": EMPTY, "ztsnr": EMPTY}, "sdxl"),
    ],
)
def test_a_known_file_finds_its_config(tmp_path, context, marks, config):
    path = write(tmp_path / "x.safetensors", context, **marks)
    found = config_for(path)
    assert found.schedule.parameterization == ("v" if marks else "eps")
    assert ("ztsnr" in marks) == ("rescale_zero_snr" in found.schedule)
    text = "\n".join(describe_file(path))
    assert f"--config={config}" in text and "(float16)" in text
    assert ("prediction = v" in text) == bool(marks)
    assert config_for(path, overrides=["--config.seed=7"]).seed == 7


def test_a_file_that_fits_two_configs_or_none_is_told(tmp_path):
    path = write(tmp_path / "x.safetensors", 1024)
    with pytest.raises(ValueError, match="needs --config=, because sd21 and sd21:768v fit it"):
        config_for(path)
    assert describe_file(path)[-1] == "config: sd21 or sd21:768v"
    inpainting = write(tmp_path / "z.safetensors", 768, channels=9)
    assert describe_file(inpainting)[-1].startswith("config: --config=sd15:inpaint")
    other = write(tmp_path / "y.safetensors", 1024, channels=5)
    with pytest.raises(ValueError, match="no shipped config describes it: it holds a Stable Diff"):
        config_for(other)
    assert config_for(other, "configs/sd15.py:tiny").model.model_channels == 32


def test_the_configs_are_shipped():
    networks = {"svd": "video_unet", "sv3d": "video_unet", "sv4d": "multiview_unet"}
    for configs in CONFIGS.values():
        for path in {name for names in configs.values() for name in names}:
            family = path.partition(":")[0]
            network = networks[family] if family in networks else "unet"
            assert config_for("none", path).model.name == network


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("lora_unet_down_blocks_0.lora_down.weight", "a LoRA"),
        ("control_model.input_hint_block.0.weight", "a ControlNet"),
        ("linear.weight", "no network that is known here"),
    ],
)
def test_other_files_are_called_by_their_names(tmp_path, name, words):
    path = tmp_path / "x.safetensors"
    beside = "control_model.input_blocks.0.0.weight"
    save_weights(path, [], {name: np.zeros((2, 2)), beside: np.zeros((2, 2, 1, 1))})
    said = describe_file(path)
    if words == "a ControlNet":
        assert said == [words]
    else:
        assert len(said) > 1 or said == [words]


def test_a_run_is_not_described_as_a_file(tmp_path):
    save_config(tmp_path, load_config("configs/mnist.py:tiny"))
    with pytest.raises(ValueError, match="is a run of this program; `report` says what it did"):
        describe_file(tmp_path)


def test_an_exported_model_is_described_whole(tmp_path):
    path = tmp_path / "x.safetensors"
    weights = trained("configs/sd21.py:tiny")
    built("configs/sd21.py:tiny").task.export_file(weights, path)
    lines = describe_file(path)
    assert [line.split(" under")[0] for line in lines[:3]] == [
        "a UNet for 4 channels and text of width 32", "vae", "clip text"
    ]  # fmt: skip
    assert "numbers (float32)" in lines[0] and "averages (EMA)" in lines[3]
    assert "prediction = v" in lines[4] and lines[5] == "config: none of the shipped ones"
