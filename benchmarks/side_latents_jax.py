"""Our side of sampling.py: sample_fn of a small SDXL, and what the other side needs; see
paired.serve."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import paired
from random_weights import random_frozen, random_weights

from diffusion_jax.convert.weights.diffusers_folder import save_diffusers, unet_config
from diffusion_jax.diffusion.samplers.driver import initial_noise
from diffusion_jax.experiment import Experiment, make_experiment
from diffusion_jax.experiment.config.files import load_config
from diffusion_jax.models.conditioning.routing import network_inputs
from diffusion_jax.types import PyTree

VOCABULARY = 49408  # tokens of CLIP


def build(specification: dict[str, Any]) -> tuple[dict[str, Any], Callable[[int], None]]:
    """Build the sampler of a specification; returns the report and run(batches).

    Writes into specification["folder"]: the network as a folder of diffusers, the noise, conditions
    and noise levels of a batch (.npy), and the latents that we make of them (latents.npy).
    """
    config = load_config(specification["config"], specification["overrides"])
    with config.unlocked():
        for name, value in specification["model"].items():
            config.model[name] = value
        config.model.dtype = specification["dtype"]
    built = make_experiment(config, devices=jax.devices()[:1])
    size, count = specification["latents"], specification["batch_size"]
    params = random_weights(built.abstract_state().params, seed=0)
    frozen = random_frozen(built)
    inputs = random_inputs(built, count, size)
    keys = jax.random.split(jax.random.key(1), count)

    def draw() -> np.ndarray:
        samples = built.sample_fn(
            params,
            frozen,
            inputs,
            keys,
            num_steps=specification["num_steps"],
            guidance_scale=specification["guidance_scale"],
            size=image_size(built, size),
            decode=False,
        )
        return np.asarray(samples.x)

    def run(batches: int) -> None:
        for _ in range(batches):
            draw()

    latents, compile_time = paired.first_call(draw)
    write_inputs(built, params, frozen, inputs, keys, specification)
    np.save(Path(specification["folder"]) / "latents.npy", latents)
    stats = jax.devices()[0].memory_stats()
    report = {
        "version": f"jax {jax.__version__}",
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(params["network"])),
        "compile": compile_time.wall,
        "compile_cpu": compile_time.cpu,
        "device_memory": stats["peak_bytes_in_use"] if stats else 0,
    }
    return report, run


def image_size(built: Experiment, size: int) -> tuple[int, int]:
    """The (height, width) of an image whose latents have this side."""
    assert built.network.first_stage is not None
    side = size * built.network.first_stage.factor
    return side, side


def random_inputs(built: Experiment, count: int, size: int) -> dict[str, np.ndarray]:
    """Draw tokens of a caption for each image; sizes and crops describe an uncut image."""
    numbers = np.random.default_rng(3)
    side, _ = image_size(built, size)
    sizes = {"original_size": side, "crop_top_left": 0, "target_size": side}
    inputs = {}
    for name, value in built.network.example_inputs(count).items():
        if name in sizes:
            inputs[name] = np.full(value.shape, sizes[name], np.float32)
        else:
            inputs[name] = numbers.integers(1, VOCABULARY, value.shape, dtype=np.int32)
    return inputs


def write_inputs(
    built: Experiment,
    params: PyTree,
    frozen: PyTree,
    inputs: dict[str, np.ndarray],
    keys: jax.Array,
    specification: dict[str, Any],
) -> None:
    """Write the network and the inputs of a batch as diffusers wants them."""
    network, folder = built.network, Path(specification["folder"])
    size = specification["latents"]
    shape = network.shape_of(image_size(built, size))
    noise = initial_noise(keys, shape)
    arrays = {"noise": noise, "sigmas": built.drawing.noise.grid(specification["num_steps"])}
    batch = {name: jnp.asarray(value) for name, value in inputs.items()}
    for half in ("conditional", "unconditional"):
        embedded = network.embed(params, frozen, batch, unconditional=half == "unconditional")
        seen = network_inputs(network.conditioning_key, noise, embedded)
        arrays |= {f"{half}_context": seen.context, f"{half}_y": seen.y}
    # y goes in as it is: diffusers is spared the embedding of sizes in every step.
    config = unet_config(network.module, shape[-1], sample_size=size, text_time=False)
    save_diffusers(folder / "exported", {"network": params["network"]}, {"network": config})
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", np.asarray(array))


if __name__ == "__main__":
    paired.serve(build)
