"""Our side of autoencoder.py, started by it: see paired.serve."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import as_program  # noqa: F401

# isort: split
import jax
import jax.numpy as jnp
import numpy as np
import paired

from diffusion_jax.convert.weights.diffusers_folder import vae_config
from diffusion_jax.convert.weights.exporting import export_params, save_weights
from diffusion_jax.convert.weights.first_stage import join_parts, save_first_stage
from diffusion_jax.experiment import Experiment, make_experiment
from diffusion_jax.experiment.config.files import load_config
from diffusion_jax.train.step import jit_train_step

WEIGHING = "diffusion_jax.train.first_stage.loss.adaptive_weight"


def build(specification: dict[str, Any]) -> tuple[dict[str, Any], Callable[[int], None]]:
    """Build the training step; returns the report and run(steps)."""
    size = specification["batch_size"]
    batch_size = f"--config.train.batch_size={size}"
    config = load_config(specification["config"], [*specification["overrides"], batch_size])
    with config.unlocked():
        config.model.dtype = config.discriminator.dtype = specification["dtype"]
    built = make_experiment(config, devices=jax.devices()[:1])
    memory_at_start = paired.peak_memory()
    start, apart = time.perf_counter(), 0.0
    state, frozen = jax.block_until_ready((built.init_state(), built.random_frozen()))
    image = np.random.default_rng(0).uniform(-1, 1, (size, *built.data.image_shape))
    batch = built.to_devices({"image": image.astype(np.float32)})
    values = {}
    if specification["folder"] is not None:
        begun = time.perf_counter()
        values = look(built, state, frozen, batch["image"])
        save(Path(specification["folder"]), state, frozen, batch["image"])
        apart = time.perf_counter() - begun
    flops, run = train(built, state, frozen, batch, adaptive=specification["adaptive"])
    run(1)
    stats = jax.devices()[0].memory_stats()
    trained = (state.params["autoencoder"], state.params["discriminator"])
    report = {
        "version": f"jax {jax.__version__}",
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(trained)),
        "ready": time.perf_counter() - start - apart,
        "flops": flops,
        "values": values,
        "memory_at_start": memory_at_start,
        "device_memory": stats["peak_bytes_in_use"] if stats else 0,
        "network": {name: config[name].to_dict() for name in ("loss", "optimizer", "discriminator")}
        | {
            "lpips": built.task.reconstructing.lpips_net,
            "vae": vae_config(built.task.reconstructing.module, scale_factor=1.0),
        },
    }
    return report, run


def train(
    built: Experiment, state: Any, frozen: Any, batch: Any, *, adaptive: bool
) -> tuple[float, Callable[[int], None]]:
    """Compile the step; unless adaptive, the adversary's weight is a constant."""
    constant = lambda *gradients: jnp.float32(1.0)
    with mock.patch(WEIGHING, constant) if not adaptive else mock.patch.dict({}):
        lowered = jit_train_step(built.train_step, state).lower(state, batch, frozen)
    step = lowered.compile()
    held = [jax.tree.map(jnp.copy, state)]

    def run(steps: int) -> None:
        for _ in range(steps):
            held[0], _ = step(held[0], batch, frozen)
        jax.block_until_ready(held[0])

    return lowered.cost_analysis()["flops"], run


def look(built: Experiment, state: Any, frozen: Any, image: Any) -> dict[str, float]:
    """Compute what both sides must agree on, from the mean of the latents (no random numbers),
    with the discriminator's BatchNorm on the statistics of the batch."""
    parts = built.task.reconstructing
    networks, module = parts.networks, parts.module

    @jax.jit
    def values(state: Any, frozen: Any, image: Any) -> dict[str, Any]:
        own, disc = state.params["autoencoder"], state.params["discriminator"]
        out = module.apply({"params": own}, image).astype(jnp.float32)
        logits, _ = networks.discriminate(disc, state.mutable["discriminator"], out, train=True)
        return {
            "L1": jnp.mean(jnp.abs(image - out)),
            "LPIPS": jnp.mean(networks.lpips(frozen["lpips"], image, out)),
            "the mean logit": jnp.mean(logits),
        }

    return {name: float(value) for name, value in values(state, frozen, image).items()}


def save(folder: Path, state: Any, frozen: Any, image: Any) -> None:
    """Write the weights in latent-diffusion's and in diffusers' names, and the images."""
    params, mutable = state.params, state.mutable
    tree = join_parts(params, mutable, lpips=frozen["lpips"])
    save_first_stage(folder / "training.safetensors", tree)
    own = export_params(params["autoencoder"], "vae_diffusers")
    save_weights(folder / "vae.safetensors", [own])
    np.save(folder / "images.npy", np.asarray(image))


if __name__ == "__main__":
    paired.serve(build)
