"""Write data/lightning.ckpt and data/old.pth, which needs torch: a few kB.

    .venv-parity/bin/python tests/convert/make_ckpt.py

One is what a run of Lightning leaves: beside the weights it holds objects of Lightning, argparse
and NumPy. The other has the same weights in the format of PyTorch before 1.6.
"""

import argparse
import sys
import types
from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch


def lightning_class() -> type:
    """Make a class that pickles as Lightning's, which need not be installed."""
    name = "pytorch_lightning.callbacks.model_checkpoint"
    for depth in range(1, 4):
        part = ".".join(name.split(".")[:depth])
        sys.modules[part] = types.ModuleType(part)
    made = type("ModelCheckpoint", (), {"__module__": name})
    sys.modules[name].ModelCheckpoint = made
    return made


def main() -> None:
    base = torch.arange(24, dtype=torch.float32).reshape(4, 6) / 8
    weights = OrderedDict(
        {
            "model.full": base,
            "model.transposed": base.T,
            "model.part": base[1:3, ::2],
            "model.parameter": torch.nn.Parameter(torch.tensor([1.5, -2.0])),
            "model.half": torch.tensor([0.5, 65504.0], dtype=torch.float16),
            "model.bfloat16": torch.tensor([[1.0], [-3.0]], dtype=torch.bfloat16),
            "model.count": torch.tensor(7),
            "model.mask": torch.tensor([True, False]),
            "model.empty": torch.zeros(0, 3),
        }
    )
    callback = lightning_class()
    content = {
        "epoch": 3,
        "global_step": 7,
        "pytorch-lightning_version": "1.4.2",
        "state_dict": weights,
        "callbacks": {callback: {"best_model_score": torch.tensor(0.5), "monitor": "val"}},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(2)}}, "param_groups": []}],
        "lr_schedulers": [{"last": np.float64(0.25), "seen": {1, 2}}],
        "hyper_parameters": argparse.Namespace(rate=1e-4),
    }
    folder = Path(__file__).parent / "data"
    torch.save(content, folder / "lightning.ckpt")
    torch.save(weights, folder / "old.pth", _use_new_zipfile_serialization=False)


if __name__ == "__main__":
    main()
