"""`cache` finds its config, and what it lacks, before it loads any weights."""

import pytest

from diffusion_jax.cli import main


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "nothing to encode: give --config=CONFIG with --config.latent_cache.folder=FOLDER"),
        (["--workdir=/nowhere"], "nothing to encode: give --config=CONFIG"),
        (["--config=configs/emoji_ldm.py:tiny"], "config.latent_cache is not set; give its folder"),
        (
            ["--config=configs/mnist.py:tiny", "--config.latent_cache.folder=x"],
            "config.latent_cache needs config.first_stage",
        ),
    ],
)
def test_what_is_missing_is_one_sentence(capsys, flags, message):
    assert main(["cache", *flags]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1
