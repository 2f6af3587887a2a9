"""diffusers' side of the race, with the parts that its training scripts are made of.

python side_race_torch.py train|sample SPECIFICATION.json
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from diffusers.optimization import get_cosine_schedule_with_warmup
from diffusers.training_utils import EMAModel
from side_torch import PREDICTION, network
from torch.nn.functional import mse_loss, pixel_shuffle, pixel_unshuffle
from torch_device import shuffled_rows


def main() -> None:
    work, path = sys.argv[1:]
    spec = json.loads(Path(path).read_text())
    torch.set_num_threads(spec["threads"])
    torch.manual_seed(spec["seed"])
    {"train": train, "sample": sample}[work](spec, Path(spec["folder"]))


def build(spec: dict[str, Any]) -> tuple[torch.nn.Module, Any]:
    """The network, and predict(x, t, labels) on whole images [b c h w]."""
    net = network(spec["model"], spec["image_shape"][-1])
    channels_last = spec["layout"] == "channels_last"
    layout = torch.channels_last if channels_last else torch.contiguous_format
    net = net.to(memory_format=layout)
    patch = spec["model"]["patch_size"] if "patch_size" in spec["model"] else 1

    def predict(x: torch.Tensor, t: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        x = pixel_unshuffle(x, patch).contiguous(memory_format=layout)
        return pixel_shuffle(net(x, t, class_labels=labels, return_dict=False)[0], patch)

    return net, predict


def train(spec: dict[str, Any], folder: Path) -> None:
    """Train for spec["num_steps"] steps; write metrics.jsonl and the averaged weights."""
    net, predict = build(spec)
    with np.load(spec["data"]) as held:
        images = torch.from_numpy(held["images"]).permute(0, 3, 1, 2).float() / 127.5 - 1.0
        labels = torch.from_numpy(held["labels"]).long()
    options, size, null = spec["optimizer"], spec["batch_size"], spec["model"]["num_classes"] - 1
    scheduler = DDPMScheduler(**schedule_options(spec))
    optimizer = torch.optim.AdamW(
        net.parameters(),
        lr=options["learning_rate"],
        betas=(0.9, options["b2"]),
        weight_decay=options["weight_decay"],
        fused=True,
    )
    rate = get_cosine_schedule_with_warmup(optimizer, spec["warmup_steps"], spec["num_steps"])
    average = EMAModel(net.parameters(), decay=options["ema_decay"], foreach=True)
    net.train()
    rows = shuffled_rows(len(images), size)
    with (folder / "metrics.jsonl").open("w") as lines:
        for step in range(1, spec["num_steps"] + 1):
            chosen = next(rows)
            x = images[chosen]
            t = torch.randint(0, scheduler.config["num_train_timesteps"], (size,))
            noise = torch.randn_like(x)
            dropped = torch.rand(size) < spec["drop_rate"]
            output = predict(
                scheduler.add_noise(x, noise, t), t, torch.where(dropped, null, labels[chosen])
            )
            velocity = scheduler.get_velocity(x, noise, t)
            targets = {"epsilon": noise, "sample": x, "v_prediction": velocity}
            loss = mse_loss(output, targets[scheduler.config["prediction_type"]])
            loss.backward()
            torch.nn.utils.clip_grad_norm_(net.parameters(), options["gradient_clip_norm"])
            optimizer.step()
            rate.step()
            optimizer.zero_grad(set_to_none=True)
            average.step(net.parameters())
            if step % spec["log_every"] == 0 or step == spec["num_steps"]:
                row = {"step": step, "time": time.time(), "train/loss": loss.item()}
                print(json.dumps(row), file=lines, flush=True)
    average.copy_to(net.parameters())
    torch.save(net.state_dict(), folder / "weights.pt")
    (folder / "parameters.json").write_text(json.dumps(sum(p.numel() for p in net.parameters())))


@torch.inference_mode()
def sample(spec: dict[str, Any], folder: Path) -> None:
    """Draw from the noise in a file with DDIM; write uint8 samples [n h w c] as arr_0."""
    net, predict = build(spec)
    net.load_state_dict(torch.load(folder / "weights.pt", weights_only=True))
    net.eval()
    with np.load(spec["noise"]) as held:
        noise = torch.from_numpy(held["noise"]).permute(0, 3, 1, 2)
        labels = torch.from_numpy(held["labels"]).long()
    scheduler = DDIMScheduler(
        **schedule_options(spec), timestep_spacing="trailing", clip_sample=True
    )
    scheduler.set_timesteps(spec["sampling_steps"])
    scale, null, drawn = spec["guidance_scale"], spec["model"]["num_classes"] - 1, []
    for x, classes in zip(noise.split(64), labels.split(64), strict=True):
        for t in scheduler.timesteps:
            output = predict(x, t.expand(len(x)), classes)
            if scale != 1.0:
                without = predict(x, t.expand(len(x)), torch.full_like(classes, null))
                output = without + scale * (output - without)
            x = scheduler.step(output, t, x).prev_sample
        drawn.append(x)
    pixels = ((torch.cat(drawn).clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1)
    np.savez(folder / "samples.npz", arr_0=pixels.numpy())


def schedule_options(spec: dict[str, Any]) -> dict[str, Any]:
    schedule = spec["schedule"]
    return {
        "num_train_timesteps": schedule["num_timesteps"],
        "beta_schedule": schedule["name"],
        "prediction_type": PREDICTION[schedule["parameterization"]],
    }


if __name__ == "__main__":
    main()
