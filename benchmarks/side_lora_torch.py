"""diffusers' side of the LoRA benchmark, with the parts that its training script is made of.

python side_lora_torch.py SPECIFICATION.json
"""

import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from torch.nn.functional import mse_loss
from torch_device import shuffled_rows

TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


def main() -> None:
    """Train a LoRA; write metrics.jsonl and the file of the LoRA as diffusers' scripts do."""
    spec = json.loads(Path(sys.argv[1]).read_text())
    folder = Path(spec["folder"])
    torch.set_num_threads(spec["threads"])
    torch.manual_seed(spec["seed"])
    net = UNet2DConditionModel.from_pretrained(spec["unet"])
    net.requires_grad_(False)
    config = LoraConfig(
        r=spec["rank"],
        lora_alpha=spec["rank"],
        init_lora_weights="gaussian" if spec["gaussian"] else True,
        target_modules=TARGETS,
    )
    net.add_adapter(config)
    net.train()
    trained = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        trained, lr=spec["learning_rate"], weight_decay=spec["weight_decay"]
    )
    scheduler = DDPMScheduler(
        beta_schedule="scaled_linear",
        beta_start=spec["beta_start"],
        beta_end=spec["beta_end"],
        prediction_type={"eps": "epsilon", "v": "v_prediction"}[spec["predict"]],
        rescale_betas_zero_snr=spec["predict"] == "v",
    )
    with np.load(spec["data"]) as held:
        images = torch.from_numpy(held["images"]).permute(0, 3, 1, 2).float() / 127.5 - 1.0
        contexts = torch.from_numpy(held["contexts"])
    size = spec["batch_size"]
    rows = shuffled_rows(len(images), size)
    with (folder / "metrics.jsonl").open("w") as lines:
        for step in range(1, spec["num_steps"] + 1):
            chosen = next(rows)
            x = images[chosen]
            t = torch.randint(0, scheduler.config["num_train_timesteps"], (size,))
            noise = torch.randn_like(x)
            noised = scheduler.add_noise(x, noise, t)
            found = net(noised, t, encoder_hidden_states=contexts[chosen], return_dict=False)[0]
            target = noise if spec["predict"] == "eps" else scheduler.get_velocity(x, noise, t)
            loss = mse_loss(found, target)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, spec["gradient_clip_norm"])
            optimizer.step()
            optimizer.zero_grad()
            if step % spec["log_every"] == 0 or step == spec["num_steps"]:
                row = {"step": step, "time": time.time(), "train/loss": loss.item()}
                lines.write(json.dumps(row) + "\n")
                lines.flush()
    count = sum(p.numel() for p in trained)
    (folder / "parameters.json").write_text(json.dumps(count))
    StableDiffusionPipeline.save_lora_weights(
        folder / "lora", unet_lora_layers=get_peft_model_state_dict(net)
    )


if __name__ == "__main__":
    main()
