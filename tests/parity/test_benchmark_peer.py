"""The network that the benchmarks time in PyTorch has the size of ours."""

import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from diffusion_jax.build import experiment
from diffusion_jax.cli.arguments import load_config

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.parity
@pytest.mark.parametrize("name", ["demo", "wide28", "cifar10", "tiny"])
def test_the_peer_has_our_parameters_and_output(monkeypatch, name):
    torch = pytest.importorskip("torch")
    pytest.importorskip("diffusers")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import paired
    import side_torch

    net = paired.NETS[name]
    config = load_config(net.config, [*net.overrides, "--config.train.batch_size=8"])
    built = experiment(config, devices=jax.devices()[:1])
    parameters = jax.eval_shape(built.init, jax.random.key(0)).params
    height, width, channels = built.network.image_shape
    patch = built.network.module.patch_size
    with torch.device("meta"):
        peer = side_torch.network(config.model.to_dict(), channels)
        shape = (2, channels * patch**2, height // patch, width // patch)
        labels = torch.zeros(2, dtype=torch.long)
        out = peer(torch.zeros(shape), torch.zeros(2), class_labels=labels).sample
    ours = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(parameters))
    assert sum(p.numel() for p in peer.parameters()) == ours
    assert out.shape == shape
    for name in ("paired", "side_torch"):
        sys.modules.pop(name, None)
