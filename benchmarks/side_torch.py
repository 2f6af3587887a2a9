"""The other side of a comparison: the same UNet from diffusers' blocks, in PyTorch; see
paired.serve."""

import math
import time
from collections.abc import Callable
from typing import Any

import paired
import torch
from diffusers import DDIMScheduler, UNet2DModel
from diffusers.models.downsampling import Downsample2D
from diffusers.models.upsampling import Upsample2D
from torch.nn.functional import mse_loss, pixel_shuffle, pixel_unshuffle
from torch_device import peak_memory, repeated

PREDICTION = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}
# What UNet2DModel can express of a `model` section; anything else must keep its default.
KNOWN = {
    "name",
    "out_channels",
    "patch_size",
    "model_channels",
    "channel_mult",
    "num_res_blocks",
    "attention_resolutions",
    "num_heads",
    "num_head_channels",
    "conv_resample",
    "use_scale_shift_norm",
    "resblock_updown",
    "dropout",
    "num_classes",
    "num_groups",
    "disable_middle_transformer",
    "dtype",
}
DEFAULTS = {
    "patch_size": 1,
    "attention_resolutions": (),
    "num_heads": 1,
    "num_head_channels": -1,
    "conv_resample": True,
    "use_scale_shift_norm": False,
    "resblock_updown": False,
    "dropout": 0.0,
    "num_classes": None,
    "num_groups": 32,
    "disable_middle_transformer": False,
}


def network(model: dict[str, Any], image_channels: int) -> UNet2DModel:
    """diffusers' UNet2DModel of the widths of a `model` section, on space-to-depth images.

    Raises ValueError for an option that UNet2DModel lacks.
    """
    unknown = set(model) - KNOWN
    if unknown:
        raise ValueError(f"UNet2DModel has no counterpart of config.model.{unknown.pop()}")
    m = DEFAULTS | model
    levels = range(len(m["channel_mult"]))
    attends = [2**level in m["attention_resolutions"] for level in levels]
    plain = "Resnet{}sampleBlock2D" if m["resblock_updown"] else "{}Block2D"
    area = m["patch_size"] ** 2
    net = UNet2DModel(
        in_channels=image_channels * area,
        out_channels=image_channels * area,
        block_out_channels=[m["model_channels"] * mult for mult in m["channel_mult"]],
        layers_per_block=m["num_res_blocks"],
        down_block_types=["AttnDownBlock2D" if a else plain.format("Down") for a in attends],
        up_block_types=["AttnUpBlock2D" if a else plain.format("Up") for a in reversed(attends)],
        downsample_type="resnet" if m["resblock_updown"] else "conv",
        upsample_type="resnet" if m["resblock_updown"] else "conv",
        attention_head_dim=head_channels(m),
        add_attention=not m["disable_middle_transformer"],
        norm_num_groups=m["num_groups"],
        attn_norm_num_groups=m["num_groups"],
        resnet_time_scale_shift="scale_shift" if m["use_scale_shift_norm"] else "default",
        dropout=m["dropout"],
        num_class_embeds=m["num_classes"],
    )
    if not m["conv_resample"] and not m["resblock_updown"]:
        for block in net.down_blocks:
            if block.downsamplers is not None:
                block.downsamplers[0] = Downsample2D(block.resnets[-1].out_channels)
        for block in net.up_blocks:
            if block.upsamplers is not None:
                block.upsamplers[0] = Upsample2D(block.resnets[-1].out_channels)
    return net


def head_channels(m: dict[str, Any]) -> int:
    """UNet2DModel's one width of attention heads, for all levels."""
    if m["num_head_channels"] != -1:
        return m["num_head_channels"]
    attends = [2**level in m["attention_resolutions"] for level in range(len(m["channel_mult"]))]
    attends[-1] = True  # the middle block's width
    widths = {m["model_channels"] * c for c, a in zip(m["channel_mult"], attends, strict=True) if a}
    if len(widths) > 1:
        raise ValueError(f"num_heads = {m['num_heads']} at several widths: set num_head_channels")
    return widths.pop() // m["num_heads"]


def build(specification: dict[str, Any]) -> tuple[dict[str, Any], Callable[[int], None]]:
    """Build the work of a specification; returns the report and run(units)."""
    torch.set_num_threads(specification["threads"])
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True  # as XLA does
    torch.backends.cudnn.benchmark = True
    device = torch.device("cuda" if specification["device"] == "gpu" else "cpu")
    net_spec = specification["network"]
    memory_at_start = paired.peak_memory()
    start = time.perf_counter()
    channels_last = specification["layout"] == "channels_last"
    layout = torch.channels_last if channels_last else torch.contiguous_format
    net = network(net_spec["model"], net_spec["image_shape"][-1])
    net = net.to(device, memory_format=layout)
    parameters = sum(p.numel() for p in net.parameters())
    forward = torch.compile(net) if specification["compile"] else net
    patch = net_spec["model"]["patch_size"] if "patch_size" in net_spec["model"] else 1

    def predict(x: torch.Tensor, t: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        # Reduced precision as in our network: parameters stay float32.
        with torch.autocast(
            device.type, torch.bfloat16, enabled=specification["dtype"] == "bfloat16"
        ):
            x = pixel_unshuffle(x, patch).contiguous(memory_format=layout)
            out = forward(x, t, class_labels=labels, return_dict=False)[0]
        return pixel_shuffle(out.float(), patch)

    make = train if specification["work"] == "train" else sample
    run_once = make(net, predict, net_spec, specification["batch_size"], device)

    run = repeated(run_once, device)
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


def train(
    net: torch.nn.Module,
    predict: Callable,
    spec: dict[str, Any],
    size: int,
    device: torch.device,
) -> Callable[[], None]:
    """Make one training step: noise, forward, backward, clipping, AdamW, EMA."""
    height, width, channels = spec["image_shape"]
    options = spec["optimizer"]
    images = torch.rand(size, channels, height, width, device=device) * 2 - 1
    labels = torch.zeros(size, dtype=torch.long, device=device)
    abar = _scheduler(spec).alphas_cumprod.to(device)
    null = spec["model"]["num_classes"] - 1
    optimizer = torch.optim.AdamW(
        net.parameters(), lr=1e-6, weight_decay=options["weight_decay"], fused=True
    )
    average = [p.detach().clone() for p in net.parameters()]
    net.train()

    def step() -> None:
        t = torch.randint(0, len(abar), (size,), device=device)
        noise = torch.randn_like(images)
        signal, sigma = (f[t][:, None, None, None] for f in (abar.sqrt(), (1 - abar).sqrt()))
        kept = torch.where(torch.rand(size, device=device) < 0.1, null, labels)
        target = {"eps": noise, "x0": images, "v": signal * noise - sigma * images}
        output = predict(signal * images + sigma * noise, t, kept)
        loss = mse_loss(output, target[spec["parameterization"]])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), options["gradient_clip_norm"])
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(average, list(net.parameters()), 1 - options["ema_decay"])

    return step


def sample(
    net: torch.nn.Module,
    predict: Callable,
    spec: dict[str, Any],
    size: int,
    device: torch.device,
) -> Callable[[], None]:
    """Make one batch of samples: DDIM with classifier-free guidance, as diffusers' pipelines do."""
    height, width, channels = spec["image_shape"]
    scheduler = _scheduler(spec)
    scheduler.set_timesteps(spec["num_steps"], device=device)
    classes = torch.zeros(size, dtype=torch.long, device=device)
    labels = torch.cat([torch.full_like(classes, spec["model"]["num_classes"] - 1), classes])
    net.eval()

    @torch.inference_mode()
    def draw() -> None:
        x = torch.randn(size, channels, height, width, device=device)
        for t in scheduler.timesteps:
            output = predict(torch.cat([x, x]), t.expand(2 * size), labels)
            unconditional, conditional = output.chunk(2)
            guided = unconditional + spec["guidance_scale"] * (conditional - unconditional)
            x = scheduler.step(guided, t, x).prev_sample
        assert math.isfinite(x.sum().item())

    return draw


def _scheduler(spec: dict[str, Any]) -> DDIMScheduler:
    schedule = spec["schedule"]
    return DDIMScheduler(
        num_train_timesteps=schedule["num_timesteps"] if "num_timesteps" in schedule else 1000,
        beta_schedule=schedule["name"],
        prediction_type=PREDICTION[spec["parameterization"]],
        timestep_spacing="trailing",
        clip_sample=True,
    )


if __name__ == "__main__":
    paired.serve(build)
