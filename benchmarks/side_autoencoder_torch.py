"""The other side of autoencoder.py: diffusers' AutoencoderKL, a PatchGAN and LPIPS, in PyTorch."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import paired
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file
from torch import nn
from torch.nn.functional import relu
from torch_device import peak_memory, repeated

SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
# torchvision's features: channels of a convolution (its size, stride and padding), M for pooling.
VGG16 = (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512)
ALEXNET = ((64, 11, 4, 2), "M", (192, 5, 1, 2), "M", (384, 3, 1, 1), (256, 3, 1, 1), (256, 3, 1, 1))
# After which layers the five outputs are.
NETS = {
    "vgg16": (VGG16, (4, 9, 16, 23, 30), 2),
    "alexnet": (ALEXNET, (2, 5, 8, 10, 12), 3),
}


class Lpips(nn.Module):
    """LPIPS with the names of latent-diffusion's checkpoints."""

    def __init__(self, net: str) -> None:
        super().__init__()
        plan, ends, pool = NETS[net]
        layers, inputs = [], 3
        for entry in plan:
            if entry == "M":
                layers.append(nn.MaxPool2d(pool, 2))
                continue
            width, *shape = entry if isinstance(entry, tuple) else (entry, 3, 1, 1)
            layers += [nn.Conv2d(inputs, width, *shape), nn.ReLU()]
            inputs = width
        self.net = nn.Module()
        for number, (start, end) in enumerate(zip((0, *ends), ends, strict=False)):
            part = nn.Sequential()
            for index in range(start, end):
                part.add_module(str(index), layers[index])
            self.net.add_module(f"slice{number + 1}", part)
            width = next(x for x in reversed(layers[start:end]) if isinstance(x, nn.Conv2d))
            lin = nn.Module()
            lin.model = nn.Sequential(nn.Dropout(), nn.Conv2d(width.out_channels, 1, 1, bias=False))
            self.add_module(f"lin{number}", lin)
        self.scaling_layer = nn.Module()
        for name, values in (("shift", SHIFT), ("scale", SCALE)):
            self.scaling_layer.register_buffer(name, torch.tensor(values)[None, :, None, None])
        self.requires_grad_(False).eval()

    def features(self, x: torch.Tensor) -> list[torch.Tensor]:
        """The five activations, divided by their norm over the channels."""
        x = (x - self.scaling_layer.shift) / self.scaling_layer.scale
        found = []
        for number in range(1, 6):
            x = self.net.get_submodule(f"slice{number}")(x)
            found.append(x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10))
        return found

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Distances [b]."""
        pairs = zip(self.features(x), self.features(y), strict=True)
        return sum(
            self.get_submodule(f"lin{i}").model((a - b).square()).mean((1, 2, 3))
            for i, (a, b) in enumerate(pairs)
        )


def discriminator(ndf: int, n_layers: int) -> nn.Sequential:
    """A PatchGAN with BatchNorm, in the order of the published one."""
    layers = [nn.Conv2d(3, ndf, 4, 2, 1), nn.LeakyReLU(0.2)]
    for n in range(1, n_layers + 1):
        inputs, width = (ndf * min(2**k, 8) for k in (n - 1, n))
        stride = 2 if n < n_layers else 1
        layers += [nn.Conv2d(inputs, width, 4, stride, 1, bias=False), nn.BatchNorm2d(width)]
        layers.append(nn.LeakyReLU(0.2))
    return nn.Sequential(*layers, nn.Conv2d(width, 1, 4, 1, 1))


class Parts(NamedTuple):
    """The three networks and the images."""

    vae: AutoencoderKL
    disc: nn.Sequential
    lpips: Lpips
    images: torch.Tensor


def load(folder: Path, spec: dict[str, Any], device: torch.device, layout: Any) -> Parts:
    """Make the networks with the weights that our side wrote; strict in every name."""
    weights = load_file(folder / "training.safetensors")
    under = lambda start: {
        k.removeprefix(start): v for k, v in weights.items() if k.startswith(start)
    }
    vae = AutoencoderKL.from_config(spec["vae"])
    vae.load_state_dict(load_file(folder / "vae.safetensors"))
    options = {"ndf": 64, "n_layers": 3} | {
        k: spec["discriminator"][k] for k in ("ndf", "n_layers")
    }
    disc, lpips = discriminator(**options), Lpips(spec["lpips"])
    disc.load_state_dict(under("loss.discriminator.main."))
    lpips.load_state_dict(under("loss.perceptual_loss."))
    images = torch.from_numpy(np.load(folder / "images.npy")).permute(0, 3, 1, 2)
    return Parts(*(part.to(device, memory_format=layout) for part in (vae, disc, lpips, images)))


@torch.no_grad()
def look(parts: Parts) -> dict[str, float]:
    """Compute what both sides must agree on; see side_autoencoder_jax.look."""
    out = parts.vae.decode(parts.vae.encode(parts.images).latent_dist.mode()).sample
    return {
        "L1": (parts.images - out).abs().mean().item(),
        "LPIPS": parts.lpips(parts.images, out).mean().item(),
        "the mean logit": parts.disc(out).mean().item(),
    }


def make_step(parts: Parts, spec: dict[str, Any], autocast: Callable[[], Any]) -> Callable:
    """Make one step: the autoencoder against the adversary, then the discriminator."""
    vae, disc, lpips, images = parts
    loss, rates = spec["loss"], spec["optimizer"]
    betas = (rates["b1"], rates["b2"])
    optimizers = [
        torch.optim.Adam(net.parameters(), lr=1e-6, betas=betas, fused=True) for net in (vae, disc)
    ]
    average = [p.detach().clone() for p in vae.parameters()]
    last, size = vae.decoder.conv_out.weight, len(images)
    kl_weight = loss["regularization_weights"]["kl_loss"]

    def step() -> None:
        disc.requires_grad_(False)
        with autocast():
            posterior = vae.encode(images).latent_dist
            out = vae.decode(posterior.sample()).sample.float()
            distance = lpips(images, out)[:, None, None, None]
            g = -disc(out).float().mean()
        rec = (images - out).abs() + loss["perceptual_weight"] * distance
        nll = rec.sum() / size
        gradients = [torch.autograd.grad(x, last, retain_graph=True)[0] for x in (nll, g)]
        ratio = gradients[0].norm() / (gradients[1].norm() + 1e-4)
        weight = loss["disc_weight"] * ratio.clamp(0.0, 1e4).detach()
        total = nll + weight * g + kl_weight * posterior.kl().mean()
        optimizers[0].zero_grad(set_to_none=True)
        total.backward()
        optimizers[0].step()
        with torch.no_grad():
            torch._foreach_lerp_(average, list(vae.parameters()), 1 - rates["ema_decay"])
        disc.requires_grad_(True)
        with autocast():
            real, fake = disc(images).float(), disc(out.detach()).float()
        judged = 0.5 * (relu(1.0 - real).mean() + relu(1.0 + fake).mean())
        optimizers[1].zero_grad(set_to_none=True)
        judged.backward()
        optimizers[1].step()

    return step


def build(specification: dict[str, Any]) -> tuple[dict[str, Any], Callable[[int], None]]:
    """Build the training step; returns the report and run(steps)."""
    torch.set_num_threads(specification["threads"])
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True  # as XLA does
    torch.backends.cudnn.benchmark = True
    device = torch.device("cuda" if specification["device"] == "gpu" else "cpu")
    layouts = {"channels_last": torch.channels_last, "channels_first": torch.contiguous_format}
    memory_at_start = paired.peak_memory()
    start = time.perf_counter()
    layout = layouts[specification["layout"]]
    parts = load(Path(specification["folder"]), specification["network"], device, layout)
    begun = time.perf_counter()
    values = look(parts)
    apart = time.perf_counter() - begun
    trained = [p for net in (parts.vae, parts.disc) for p in net.parameters()]
    parameters = sum(p.numel() for p in trained)
    if specification["compile"]:
        parts = parts._replace(disc=torch.compile(parts.disc), lpips=torch.compile(parts.lpips))
        parts.vae.encoder, parts.vae.decoder = map(
            torch.compile, (parts.vae.encoder, parts.vae.decoder)
        )
    half = specification["dtype"] == "bfloat16"
    autocast = lambda: torch.autocast(device.type, torch.bfloat16, enabled=half)
    step = make_step(parts, specification["network"], autocast)

    run = repeated(step, device)
    run(1)
    report = {
        "version": f"torch {torch.__version__}",
        "parameters": parameters,
        "ready": time.perf_counter() - start - apart,
        "flops": None,
        "values": values,
        "memory_at_start": memory_at_start,
        "device_memory": peak_memory(device),
    }
    return report, run


if __name__ == "__main__":
    paired.serve(build)
