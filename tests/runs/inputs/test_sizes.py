"""Sizes and numbers of steps of a call; tests of the Pipeline make more calls with wrong ones."""

import pytest
from support.experiments import built

from diffusion_jax.runs.inputs.sizes import (
    check_num_steps,
    check_size,
    check_sizes,
    size_in_multiples,
)

SD15 = "configs/sd15.py:tiny"


def test_sizes_are_rounded_up_to_what_the_network_can():
    network = built(SD15).network
    assert network.size_multiple() == 4 and size_in_multiples(network, (16, 17)) == (16, 20)


def test_a_size_is_the_configs_or_a_multiple_of_what_the_network_can():
    experiment = built(SD15)
    assert check_size(experiment, None, None) == (32, 32)
    assert check_size(experiment, 16, None) == (16, 32)
    with pytest.raises(ValueError, match="height = 17, width = 32 should be multiples of 4"):
        check_size(experiment, 17, None)
    assert check_sizes(experiment, 17, None, of_image=True) == ((17, 32), (20, 32))
    with pytest.raises(ValueError, match="height = 0"):
        check_size(experiment, 0, 4, of_image=True)


def test_steps_are_counted_as_the_sampler_takes_them(caplog):
    drawing = built(SD15, "--config.sampler.name=dpmpp_sde").drawing
    assert check_num_steps(drawing, None, None) == (4, 7)  # two calls a step but for the last
    assert check_num_steps(drawing, 3, 0.0) == (3, 5)
    assert "guidance_scale = 0 ignores the conditions" in caplog.text
    with pytest.raises(ValueError, match="num_steps = 0"):
        check_num_steps(drawing, 0, None)
