"""The list of options, beside the tables that a config is checked against."""

import pytest

from diffusion_jax.experiment.config.binding import ConfigError
from diffusion_jax.experiment.config.catalogue import listing, sections
from diffusion_jax.experiment.sampling import SAMPLERS
from diffusion_jax.models.conditioning.embedders import EMBEDDERS


def keys(path):
    return {line.split()[0].rstrip(":") for line in listing(path) if line.startswith("  ")}


def test_every_row_of_a_table_is_offered():
    (names,) = (line for line in listing("sampler") if line.startswith("  name "))
    offered = names.partition("one of ")[2].removesuffix(" = 'ddim'").split(", ")
    assert offered == [*SAMPLERS, "package.module:YourOwn"]
    assert sections()["conditioning.embedders.NAME"].table == EMBEDDERS


def test_nothing_shows_rows_and_a_path_shows_what_they_take():
    assert "eta" not in keys("") and {"eta", "ddim", "order"} <= keys("sampler")
    assert {"eta", "num_steps"} <= keys("sampler.ddim") and "order" not in keys("sampler.ddim")
    assert keys("config.sampler.ddim") == keys("sampler.ddim")


def test_losses_of_both_kinds_of_model_stand_in_one_section():
    assert {"min_snr_gamma", "disc_start"} <= keys("loss")


@pytest.mark.parametrize("path", ["smapler", "sampler.dimm", "sampler.ddim.eta", "name"])
def test_another_path_is_refused(path):
    with pytest.raises(ConfigError, match="is not a section|is unknown"):
        list(listing(path))
