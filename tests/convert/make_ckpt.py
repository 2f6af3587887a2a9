"""Write data/: lightning.ckpt, old.pth and diffusers_names.xz, which needs torch and diffusers.

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


def diffusers_names() -> None:
    """Record what diffusers and transformers call the tensors of released networks, and shapes."""
    import lzma

    import diffusers
    import transformers

    sd1 = {"cross_attention_dim": 768, "sample_size": 64}
    sdxl = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "attention_head_dim": [5, 10, 20],
        "block_out_channels": [320, 640, 1280],
        "cross_attention_dim": 2048,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "projection_class_embeddings_input_dim": 2816,
        "transformer_layers_per_block": [1, 2, 10],
        "use_linear_projection": True,
    }
    vae = {
        "block_out_channels": (128, 256, 512, 512),
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "layers_per_block": 2,
    }
    with torch.device("meta"):
        networks = {
            "sd1_v1-inference": diffusers.UNet2DConditionModel(**sd1),
            "sdxl_base": diffusers.UNet2DConditionModel(**sdxl),
            "vae": diffusers.AutoencoderKL(**vae),
            "text": transformers.CLIPTextModelWithProjection(
                transformers.CLIPTextConfig(hidden_size=768, intermediate_size=3072,
                                            num_attention_heads=12, projection_dim=768)
            ),
        }  # fmt: skip
    lines = []
    for network, module in networks.items():
        lines.append(f"# {network}")
        for name, tensor in module.state_dict().items():
            lines.append(f"{name} {'x'.join(map(str, tensor.shape))}")
    packed = lzma.compress("\n".join(lines).encode())
    (Path(__file__).parent / "data/diffusers_names.xz").write_bytes(packed)


def main() -> None:
    diffusers_names()
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
