"""What the data lack is said before anything long begins."""

import pytest
from support.experiments import built

from diffusion_jax.runs.beginning.first_row import check_inputs


@pytest.mark.parametrize("config", ["configs/mnist.py:tiny", "configs/sdxl.py:tiny"])
def test_data_that_have_all_inputs_are_taken(config):
    experiment = built(config)
    check_inputs(experiment, experiment.data.source("train"))


def test_a_missing_input_is_named_with_its_embedder():
    name = "--config.conditioning.embedders.label.input_key=kind"
    experiment = built("configs/mnist.py:tiny", name)
    said = r"'mnist_subset' lacks inputs of config.conditioning.embedders: label reads 'kind'; its "
    with pytest.raises(ValueError, match=said + "batches have crop_top_left, image, index, label"):
        check_inputs(experiment, experiment.data.source("train"))
