"""Inception-v3 and DINOv2 against PyTorch, with random weights of the released names and shapes.

torchvision is not needed: the Inception of pytorch-fid is written out here in PyTorch's layers.
"""

import jax
import numpy as np
import pytest

from diffusion_jax.convert.weights.feature_networks import read_feature_network
from diffusion_jax.models.features import dinov2, inception

pytestmark = pytest.mark.parity


def torch_inception():
    """Inception-v3 as pytorch-fid changes it, from its description; names as in its file."""
    import torch
    from torch import nn
    from torch.nn import functional as F

    class Unit(nn.Module):
        def __init__(self, i, o, size, stride=1, padding=0):
            super().__init__()
            self.conv = nn.Conv2d(i, o, size, stride, padding, bias=False)
            self.bn = nn.BatchNorm2d(o, eps=0.001)

        def forward(self, x):
            return F.relu(self.bn(self.conv(x)))

    def mean(x):
        return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)

    class Block(nn.Module):
        """Branches as lists of unit names; a name of several in one branch is applied in turn."""

        def __init__(self, branches, units, pools):
            super().__init__()
            self.branches, self.pools = branches, pools
            for name, arguments in units.items():
                self.add_module(name, Unit(*arguments))

        def forward(self, x):
            outs = []
            for branch in self.branches:
                h = x
                for name in branch:
                    h = self.pools[name](h) if name in self.pools else getattr(self, name)(h)
                outs.append(h)
            return torch.cat(outs, 1)

    def a(i, pool):
        units = {
            "branch1x1": (i, 64, 1), "branch5x5_1": (i, 48, 1), "branch5x5_2": (48, 64, 5, 1, 2),
            "branch3x3dbl_1": (i, 64, 1), "branch3x3dbl_2": (64, 96, 3, 1, 1),
            "branch3x3dbl_3": (96, 96, 3, 1, 1), "branch_pool": (i, pool, 1),
        }  # fmt: skip
        double = [f"branch3x3dbl_{k}" for k in (1, 2, 3)]
        branches = [["branch1x1"], ["branch5x5_1", "branch5x5_2"], double, ["mean", "branch_pool"]]
        return Block(branches, units, {"mean": mean})

    def maximum(x):
        return F.max_pool2d(x, 3, 2)

    def b():
        units = {
            "branch3x3": (288, 384, 3, 2), "branch3x3dbl_1": (288, 64, 1),
            "branch3x3dbl_2": (64, 96, 3, 1, 1), "branch3x3dbl_3": (96, 96, 3, 2),
        }  # fmt: skip
        branches = [["branch3x3"], ["branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3"], ["max"]]
        return Block(branches, units, {"max": maximum})

    def c(n):
        wide, tall = ((1, 7), 1, (0, 3)), ((7, 1), 1, (3, 0))
        units = {
            "branch1x1": (768, 192, 1), "branch7x7_1": (768, n, 1), "branch7x7_2": (n, n, *wide),
            "branch7x7_3": (n, 192, *tall), "branch7x7dbl_1": (768, n, 1),
            "branch7x7dbl_2": (n, n, *tall), "branch7x7dbl_3": (n, n, *wide),
            "branch7x7dbl_4": (n, n, *tall), "branch7x7dbl_5": (n, 192, *wide),
            "branch_pool": (768, 192, 1),
        }  # fmt: skip
        single, double = (
            [f"branch7x7{kind}_{k}" for k in range(1, count)]
            for kind, count in (("", 4), ("dbl", 6))
        )
        branches = [["branch1x1"], single, double, ["mean", "branch_pool"]]
        return Block(branches, units, {"mean": mean})

    def d():
        units = {
            "branch3x3_1": (768, 192, 1), "branch3x3_2": (192, 320, 3, 2),
            "branch7x7x3_1": (768, 192, 1), "branch7x7x3_2": (192, 192, (1, 7), 1, (0, 3)),
            "branch7x7x3_3": (192, 192, (7, 1), 1, (3, 0)), "branch7x7x3_4": (192, 192, 3, 2),
        }  # fmt: skip
        branches = [["branch3x3_1", "branch3x3_2"], [f"branch7x7x3_{k}" for k in (1, 2, 3, 4)],
                    ["max"]]  # fmt: skip
        return Block(branches, units, {"max": maximum})

    def e(i, pool):
        wide, tall = ((1, 3), 1, (0, 1)), ((3, 1), 1, (1, 0))
        units = {
            "branch1x1": (i, 320, 1), "branch3x3_1": (i, 384, 1),
            "branch3x3_2a": (384, 384, *wide), "branch3x3_2b": (384, 384, *tall),
            "branch3x3dbl_1": (i, 448, 1), "branch3x3dbl_2": (448, 384, 3, 1, 1),
            "branch3x3dbl_3a": (384, 384, *wide), "branch3x3dbl_3b": (384, 384, *tall),
            "branch_pool": (i, 192, 1),
        }  # fmt: skip
        double = ["branch3x3dbl_1", "branch3x3dbl_2"]
        branches = [["branch1x1"], ["branch3x3_1", "branch3x3_2a"], ["branch3x3_1", "branch3x3_2b"],
                    [*double, "branch3x3dbl_3a"], [*double, "branch3x3dbl_3b"],
                    ["pool", "branch_pool"]]  # fmt: skip
        return Block(branches, units, {"pool": pool})

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.Conv2d_1a_3x3, self.Conv2d_2a_3x3 = Unit(3, 32, 3, 2), Unit(32, 32, 3)
            self.Conv2d_2b_3x3, self.Conv2d_3b_1x1 = Unit(32, 64, 3, 1, 1), Unit(64, 80, 1)
            self.Conv2d_4a_3x3 = Unit(80, 192, 3)
            blocks = {
                "Mixed_5b": a(192, 32), "Mixed_5c": a(256, 64), "Mixed_5d": a(288, 64),
                "Mixed_6a": b(), "Mixed_6b": c(128), "Mixed_6c": c(160), "Mixed_6d": c(160),
                "Mixed_6e": c(192), "Mixed_7a": d(), "Mixed_7b": e(1280, mean),
                "Mixed_7c": e(2048, lambda x: F.max_pool2d(x, 3, 1, 1)),
            }  # fmt: skip
            self.blocks = list(blocks)
            for name, block in blocks.items():
                self.add_module(name, block)
            self.fc = nn.Linear(2048, 1008)

        def forward(self, x):
            x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
            x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(maximum(x)))
            x = maximum(x)
            for name in self.blocks:
                x = getattr(self, name)(x)
            return x.mean((2, 3))

    torch.manual_seed(0)
    net = Net().eval()
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 1.5)
                module.weight.uniform_(0.8, 1.6)
                module.bias.normal_(0, 0.1)
            elif isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
    return net


def test_inception_reads_the_file_and_computes_its_features(tmp_path):
    import torch

    net = torch_inception()
    path = tmp_path / "pt_inception.pth"
    torch.save(net.state_dict(), path)
    params = read_feature_network("inception", path)
    images = np.random.default_rng(0).uniform(0, 255, (2, 299, 299, 3)).astype(np.float32)
    with torch.no_grad():
        x = torch.from_numpy((images - 128) / 128).permute(0, 3, 1, 2)
        theirs = net(x).numpy()
        classes = theirs @ net.fc.weight.numpy().T
    ours = np.asarray(jax.jit(inception.features)(params, images))
    scale = np.abs(theirs).max()
    np.testing.assert_allclose(ours, theirs, atol=1e-5 * scale)
    np.testing.assert_allclose(
        jax.jit(inception.logits)(params, ours), classes, atol=1e-5 * np.abs(classes).max()
    )


@pytest.mark.parametrize("gated", [False, True])
def test_dinov2_is_that_of_transformers(tmp_path, gated):
    import torch
    from transformers import Dinov2Config, Dinov2Model

    config = Dinov2Config(
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        use_swiglu_ffn=gated,
        image_size=518,
    )
    torch.manual_seed(0)
    net = Dinov2Model(config).eval()
    with torch.no_grad():
        for name, p in net.named_parameters():
            p.normal_(1.0 if "lambda1" in name else 0.0, 0.05)
    net.save_pretrained(tmp_path)  # by the names of the released files
    params = read_feature_network("dinov2", tmp_path / "model.safetensors")
    images = np.random.default_rng(0).uniform(0, 255, (2, 224, 224, 3)).astype(np.float32)
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    pixels = torch.from_numpy(((images / 255 - mean) / std).astype(np.float32))
    with torch.no_grad():
        theirs = net(pixels.permute(0, 3, 1, 2)).last_hidden_state[:, 0].numpy()
    ours = jax.jit(dinov2.features)(params, images)
    np.testing.assert_allclose(ours, theirs, atol=1e-4 * np.abs(theirs).max())
