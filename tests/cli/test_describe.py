"""`describe` on the command line."""

import numpy as np

from diffusion_jax.cli import main
from diffusion_jax.convert.weights.exporting import save_weights


def test_a_file_is_described(tmp_path, capsys):
    path = tmp_path / "x.safetensors"
    save_weights(path, [], {"lora_unet.lora_down.weight": np.zeros((2, 2))})
    assert main(["describe", str(path)]) == 0
    assert capsys.readouterr().out == "a LoRA\n"


def test_what_cannot_be_described_is_one_sentence(tmp_path, capsys):
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + bytes(100))
    for argument, message in (
        (f"{tmp_path}/x.gguf", "is a GGUF file, which is not read"),
        (f"{tmp_path}/none", "there are no weights at"),
    ):
        assert main(["describe", argument]) == 2
        assert message in capsys.readouterr().err
    assert main(["describe"]) == 2
    assert "give a file or folder: describe FILE" in capsys.readouterr().err
    assert main(["describe", "x", "--config.seed=3"]) == 2
    assert "a file has no config to change" in capsys.readouterr().err
