"""The other side of sampling.py: diffusers' loop over the network that our side wrote; see
paired.serve."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import diffusers
import numpy as np
import paired
import torch
from torch_device import peak_memory

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Latents of both sides may differ by this share of the largest, in float32.
TOLERANCE = 1e-3


def build(specification: dict[str, Any]) -> tuple[dict[str, Any], Callable[[int], None]]:
    """Build the loop of a specification; returns the report and run(batches).

    Raises ValueError when the latents differ from our side's (in float32; the difference is in
    the report).
    """
    torch.set_num_threads(specification["threads"])
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True  # as XLA does
    torch.backends.cudnn.benchmark = True
    device = torch.device("cuda" if specification["device"] == "gpu" else "cpu")
    dtype = DTYPES[specification["dtype"]]
    folder = Path(specification["folder"])
    net = diffusers.UNet2DConditionModel.from_pretrained(
        folder / "exported/unet", torch_dtype=dtype, low_cpu_mem_usage=False
    )
    net = net.to(device).eval()
    if specification["layout"] == "channels_last":
        net = net.to(memory_format=torch.channels_last)
    parameters = sum(p.numel() for p in net.parameters())
    if specification["compile"]:
        net = torch.compile(net)
    arrays = {path.stem: np.load(path) for path in folder.glob("*.npy")}
    draw = sampler(net, arrays, specification["guidance_scale"], device, dtype)

    def run(batches: int) -> None:
        for _ in range(batches):
            draw()

    latents, compile_time = paired.first_call(draw)
    difference = relative_difference(latents, arrays["latents"])
    if specification["dtype"] == "float32" and device.type == "cpu" and difference > TOLERANCE:
        raise ValueError(f"the latents of both sides differ by {difference:.1e} of the largest")
    report = {
        "version": f"diffusers {diffusers.__version__}, torch {torch.__version__}"
        + (" compiled" if specification["compile"] else ""),
        "parameters": parameters,
        "compile": compile_time.wall,
        "compile_cpu": compile_time.cpu,
        "difference": difference,
        "device_memory": peak_memory(device),
    }
    return report, run


def sampler(
    net: torch.nn.Module,
    arrays: dict[str, np.ndarray],
    guidance_scale: float,
    device: torch.device,
    dtype: torch.dtype,
) -> Callable[[], np.ndarray]:
    """Make draw(), which returns the latents [b h w c] of one batch, as the pipeline of SDXL draws
    them: Euler's method, both halves of guidance in one batch."""
    scheduler = diffusers.EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        timestep_spacing="leading",
        steps_offset=1,
    )
    on_device = {name: torch.from_numpy(array).to(device) for name, array in arrays.items()}
    noise = on_device["noise"].permute(0, 3, 1, 2).contiguous()
    halves = ("unconditional", "conditional")
    context, y = (
        torch.cat([on_device[f"{half}_{name}"] for half in halves]).to(dtype)
        for name in ("context", "y")
    )

    @torch.inference_mode()
    def draw() -> np.ndarray:
        scheduler.set_timesteps(sigmas=arrays["sigmas"].tolist(), device=device)
        x = (noise * scheduler.init_noise_sigma).to(dtype)
        for t in scheduler.timesteps:
            seen = scheduler.scale_model_input(torch.cat([x] * 2), t)
            output = net(
                seen,
                t,
                encoder_hidden_states=context,
                class_labels=y,
                return_dict=False,
            )[0]
            unconditional, conditional = output.chunk(2)
            guided = unconditional + guidance_scale * (conditional - unconditional)
            x = scheduler.step(guided, t, x, return_dict=False)[0]
        return x.float().cpu().permute(0, 2, 3, 1).numpy()

    return draw


def relative_difference(theirs: np.ndarray, ours: np.ndarray) -> float:
    """The largest difference as a share of the largest number."""
    if theirs.shape != ours.shape:
        raise ValueError(f"the latents have the shapes {theirs.shape} and {ours.shape}")
    return float(np.abs(theirs - ours).max() / np.abs(ours).max())


if __name__ == "__main__":
    paired.serve(build)
