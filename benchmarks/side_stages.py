"""One layout of the transformers, traced, lowered, compiled and run for compile_time.py: see
paired.serve."""

import re
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import paired
from random_weights import random_frozen, random_weights

from diffusion_jax.experiment import Experiment, make_experiment
from diffusion_jax.experiment.config.files import load_config
from diffusion_jax.train.step import jit_train_step
from diffusion_jax.types import PyTree

Program = tuple[Any, tuple[PyTree, ...], Callable[[], tuple[PyTree, ...]]]


def build(specification: dict[str, Any]) -> tuple[dict[str, Any], Callable[[int], None]]:
    """Build the program of a specification; returns how long each stage took and how large its
    result is, and run(units), which is of use when the specification says "run"."""
    config = load_config(specification["config"], specification["overrides"])
    with config.unlocked():
        for name, value in specification["model"].items():
            config.model[name] = value
        for embedder in specification["embedders"]:
            for name, value in specification["embedders"][embedder].items():
                config.conditioning.embedders[embedder][name] = value
    clock = Clock()
    built = make_experiment(config, devices=jax.devices()[:1])
    state = built.abstract_state()
    built.abstract_frozen()
    clock.lap("build")
    program, abstract, concrete = PROGRAMS[specification["program"]](built, specification)
    traced = program.trace(*abstract)
    clock.lap("trace")
    lowered = traced.lower()
    clock.lap("lower")
    report = {
        "parameters": sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(state.params)),
        "equations": count_equations(traced.jaxpr.jaxpr),
        **size_of(lowered.as_text(), "stablehlo"),
        "seconds": clock.seconds,
    }
    report["memory"] = paired.peak_memory()
    if not specification["compile"]:
        return report, nothing_to_run
    clock.start()
    compiled = lowered.compile()
    clock.lap("compile")
    report |= size_of(compiled.as_text(), "optimised")
    report["memory"] = paired.peak_memory()
    if not specification["run"]:
        return report, nothing_to_run
    return report, runner(specification["program"], compiled, concrete())


class Clock:
    """Seconds of one stage after another, by name: on the clock (name) and of processors."""

    def __init__(self) -> None:
        self.seconds: dict[str, dict[str, float]] = {}
        self.start()

    def start(self) -> None:
        """Begin a stage here."""
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def lap(self, name: str) -> None:
        """End the stage `name` and begin the next."""
        wall, cpu = time.perf_counter(), time.process_time()
        self.seconds[name] = {"wall": wall - self._wall, "cpu": cpu - self._cpu}
        self.start()


def train(built: Experiment, specification: dict[str, Any]) -> Program:
    """The whole training step: first stage, text encoders, loss, gradients, AdamW, EMA."""
    state, frozen = built.abstract_state(), built.abstract_frozen()

    def concrete() -> tuple[PyTree, ...]:
        numbers = np.random.default_rng(0)
        image = numbers.uniform(-1, 1, built.abstract_batch()["image"].shape).astype(np.float32)
        inputs = built.network.example_inputs(len(image))
        host = {"image": image, **{name: np.asarray(value) for name, value in inputs.items()}}
        # Moments and averages of 0: as much work as any others, and nothing to compile.
        whole = jax.tree.map(lambda leaf: jax.device_put(zeros(leaf), leaf.sharding), state)
        whole = whole._replace(params=random_weights(state.params, seed=0))
        return whole, built.to_devices(host), random_frozen(built)

    return (
        jit_train_step(built.train_step, state),
        (state, built.abstract_batch(), frozen),
        concrete,
    )


def zeros(leaf: jax.ShapeDtypeStruct) -> np.ndarray:
    return np.zeros(leaf.shape, leaf.dtype)


def forward(built: Experiment, specification: dict[str, Any]) -> Program:
    """One evaluation of the network: latents, timesteps, context of 77 tokens, and y."""
    module, size = built.network.module, specification["latents"]
    count = specification["batch_size"]
    shapes = [(count, size, size, module.out_channels), (count,)]
    shapes += [(count, 77, module.context_dim), (count, module.adm_in_channels)]
    arrays = [jax.ShapeDtypeStruct(shape, np.float32) for shape in shapes]

    def evaluate(params: PyTree, x: Any, t: Any, context: Any, y: Any) -> Any:
        return module.apply({"params": params}, x, t, context, y)

    def concrete() -> tuple[PyTree, ...]:
        numbers = np.random.default_rng(0)
        values = [jax.device_put(numbers.random(shape, np.float32)) for shape in shapes]
        return random_weights(params, seed=0), *values

    params = built.abstract_state().params["network"]
    return jax.jit(evaluate), (params, *arrays), concrete


PROGRAMS = {"train": train, "forward": forward}


def runner(program: str, compiled: Any, arguments: tuple[PyTree, ...]) -> Callable[[int], None]:
    """Make run(units): so many training steps, each from the state that the last one left, or so
    many evaluations of the network."""
    held = list(arguments)

    def run(units: int) -> None:
        result = None
        for _ in range(units):
            result = compiled(*held)
            if program == "train":
                held[0] = result[0]
        jax.block_until_ready(result)

    return run


def nothing_to_run(units: int) -> None:
    """Stand for a program that was not compiled."""


def count_equations(jaxpr: Any) -> int:
    """Count the equations of a jaxpr and of those inside its equations."""
    total = 0
    for equation in jaxpr.eqns:
        total += 1
        for value in equation.params.values():
            for inner in value if isinstance(value, (tuple, list)) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                total += count_equations(inner) if hasattr(inner, "eqns") else 0
    return total


def size_of(text: str, name: str) -> dict[str, int]:
    """Count the operations and bytes of a program's text."""
    operations = len(re.findall(r"^\s*(?:ROOT )?%[^\n=]* = ", text, re.MULTILINE))
    return {f"{name}_operations": operations, f"{name}_bytes": len(text)}


if __name__ == "__main__":
    paired.serve(build)
