"""Our side of a comparison, started by train_step.py and sample.py: see paired.serve."""

import time
from collections.abc import Callable
from typing import Any

import as_program  # noqa: F401

# isort: split
import jax
import numpy as np
import paired

from diffusion_jax.experiment import Experiment, make_experiment
from diffusion_jax.experiment.config.files import load_config
from diffusion_jax.train.step import jit_train_step

NUM_STEPS = 50
GUIDANCE_SCALE = 2.0


def build(specification: dict[str, Any]) -> tuple[dict[str, Any], Callable[[int], None]]:
    """Build the work of a specification; returns the report and run(units)."""
    size = specification["batch_size"]
    batch_size = f"--config.train.batch_size={size}"
    config = load_config(specification["config"], [*specification["overrides"], batch_size])
    with config.unlocked():
        config.model.dtype = specification["dtype"]
    built = make_experiment(config, devices=jax.devices()[:1])
    memory_at_start = paired.peak_memory()
    start = time.perf_counter()
    state = jax.block_until_ready(built.init_state())
    make = train if specification["work"] == "train" else sample
    flops, run = make(built, state, size)
    run(1)
    stats = jax.devices()[0].memory_stats()
    report = {
        "version": f"jax {jax.__version__}",
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(state.params)),
        "ready": time.perf_counter() - start,
        "flops": flops,
        "memory_at_start": memory_at_start,
        "device_memory": stats["peak_bytes_in_use"] if stats else 0,
        "network": {
            "model": config.model.to_dict() | {"num_classes": built.network.module.num_classes},
            "image_shape": built.network.image_shape,
            "schedule": config.schedule.to_dict(),
            "parameterization": built.drawing.noise.parameterization,
            "optimizer": config.optimizer.to_dict(),
            "guidance_scale": GUIDANCE_SCALE,
            "num_steps": NUM_STEPS,
        },
    }
    return report, run


def train(built: Experiment, state: Any, size: int) -> tuple[float, Callable[[int], None]]:
    """Compile the train step; returns its FLOPs and run(steps)."""
    numbers = np.random.default_rng(0)
    host = {
        "image": numbers.uniform(-1, 1, (size, *built.network.image_shape)).astype(np.float32),
        **{name: np.asarray(v) for name, v in built.network.example_inputs(size).items()},
    }
    batch = built.to_devices(host)
    frozen = built.random_frozen()
    lowered = jit_train_step(built.train_step, state).lower(state, batch, frozen)
    step = lowered.compile()
    held = [state]

    def run(steps: int) -> None:
        for _ in range(steps):
            held[0], _ = step(held[0], batch, frozen)
        jax.block_until_ready(held[0])

    return lowered.cost_analysis()["flops"], run


def sample(built: Experiment, state: Any, size: int) -> tuple[float, Callable[[int], None]]:
    """Make run(batches), which draws `size` images `batches` times."""
    inputs = {name: np.asarray(v) for name, v in built.network.example_inputs(size).items()}
    frozen = built.random_frozen()

    def run(batches: int) -> None:
        for number in range(batches):
            keys = jax.random.split(jax.random.key(number), size)
            samples = built.sample_fn(
                state.params,
                frozen,
                inputs,
                keys,
                num_steps=NUM_STEPS,
                guidance_scale=GUIDANCE_SCALE,
            )
            jax.block_until_ready(samples.x)

    return 0.0, run


if __name__ == "__main__":
    paired.serve(build)
