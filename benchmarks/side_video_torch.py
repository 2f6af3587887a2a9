"""The other side of video_speed.py: diffusers' UNet and decoder of Stable Video Diffusion."""

import time
from collections.abc import Callable
from typing import Any

import paired
import torch
from diffusers import AutoencoderKLTemporalDecoder, UNetSpatioTemporalConditionModel
from torch_device import peak_memory, repeated


def build(specification: dict[str, Any]) -> tuple[dict[str, Any], Callable[[int], None]]:
    """Build a denoising step or the decoding of a clip; returns the report and run(times)."""
    torch.set_num_threads(specification["threads"])
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True  # as XLA does
    torch.backends.cudnn.benchmark = True
    device = torch.device("cuda" if specification["device"] == "gpu" else "cpu")
    memory_at_start, start = paired.peak_memory(), time.perf_counter()
    batch, frames, height, width, channels = specification["shape"]
    fields, network = specification["fields"], specification["network"]
    if specification["part"] == "step":
        net = UNetSpatioTemporalConditionModel(**{k: v for k, v in network.items() if k[0] != "_"})
        x = torch.randn(batch, frames, channels, height, width)
        time_ids = torch.zeros(batch, 3)
        context = torch.randn(batch, 1, fields["context_dim"])
        arguments = [x, torch.zeros(batch), context, time_ids]
    else:
        widths = [fields["ch"] * mult for mult in fields["ch_mult"]]
        net = AutoencoderKLTemporalDecoder(
            block_out_channels=widths,
            layers_per_block=fields["num_res_blocks"],
            down_block_types=["DownEncoderBlock2D"] * len(widths),
            latent_channels=channels,
        ).decoder
        z = torch.randn(batch * frames, channels, height, width)
        arguments = [z]
    net = net.to(device).requires_grad_(False).eval()
    arguments = [a.to(device) if isinstance(a, torch.Tensor) else a for a in arguments]
    parameters = sum(p.numel() for p in net.parameters())
    if specification["compile"]:
        net = torch.compile(net)
    half = specification["dtype"] == "bfloat16"

    def decode(z: torch.Tensor) -> torch.Tensor:
        """Decode the frames of one clip, as decode_latents of the pipeline does."""
        size = specification["chunk"] or frames
        parts = [z[i : i + size] for i in range(0, len(z), size)]
        still = torch.zeros(batch, size, device=device)
        return torch.cat([net(part, still[:, : len(part)], len(part)) for part in parts])

    work = net if specification["part"] == "step" else decode

    @torch.no_grad()
    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            work(*arguments)

    run = repeated(step, device)
    run(1)
    report = {
        "version": f"torch {torch.__version__}",
        "parameters": parameters,
        "ready": time.perf_counter() - start,
        "flops": None,
        "memory_at_start": memory_at_start,
        "device_memory": peak_memory(device),
    }
    return report, run


if __name__ == "__main__":
    paired.serve(build)
