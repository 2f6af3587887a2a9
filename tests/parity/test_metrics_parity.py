"""FID, KID and Inception Score against torchmetrics, on the same features and probabilities."""

import numpy as np
import pytest

from diffusion_jax.metrics import distances
from diffusion_jax.metrics.statistics import entropies, moments

pytestmark = pytest.mark.parity
RANDOM = np.random.default_rng(0)
DATA = RANDOM.standard_normal((60, 12)) @ RANDOM.standard_normal((12, 12))
SAMPLES = RANDOM.standard_normal((60, 12)) @ RANDOM.standard_normal((12, 12)) + 0.3


def identity():
    """A network whose features are the images themselves."""
    import torch
    from torch import nn

    class Identity(nn.Module):
        num_features = 12

        def forward(self, images):
            return images.flatten(1).to(torch.float64)

    return Identity()


def torch_images(rows):
    import torch

    return torch.from_numpy(rows).reshape(-1, 3, 2, 2)


def fed(metric):
    metric.set_dtype(torch_images(DATA).dtype)
    metric.update(torch_images(DATA), real=True)
    metric.update(torch_images(SAMPLES), real=False)
    return metric.compute()


def test_fid():
    from torchmetrics.image.fid import FrechetInceptionDistance

    stream, found = moments(), []
    for rows in (SAMPLES, DATA):
        state = stream.update(stream.init(), rows, np.arange(60))
        found.append(stream.result(state))
    metric = FrechetInceptionDistance(feature=identity(), input_img_size=(3, 2, 2))
    assert distances.frechet(*found) == pytest.approx(float(fed(metric)), rel=1e-6)


def test_kid():
    from torchmetrics.image.kid import KernelInceptionDistance

    metric = KernelInceptionDistance(feature=identity(), subsets=1, subset_size=60)
    ours = distances.kernel(SAMPLES, DATA, block=60)
    assert ours.value == pytest.approx(float(fed(metric)[0]), rel=1e-6)


def test_inception_score():
    import torch
    from torchmetrics.image.inception import InceptionScore

    metric = InceptionScore(feature=identity(), splits=1)
    metric.set_dtype(torch.float64)
    metric.update(torch_images(SAMPLES))
    logits = SAMPLES - SAMPLES.max(1, keepdims=True)
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    stream = entropies(1)
    found = stream.result(stream.update(stream.init(), p, np.arange(60)))
    assert found[0] == pytest.approx(float(metric.compute()[0]), rel=1e-6)
