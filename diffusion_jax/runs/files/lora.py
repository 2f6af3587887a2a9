"""LoRA files out of runs, out of the difference of two checkpoints, and in other names."""

import os
import pathlib
from collections.abc import Sequence
from typing import Any

import ml_collections

from diffusion_jax.convert.weights.lora import Lora, extract_lora, read_lora, write_lora
from diffusion_jax.convert.weights.lora_names import LoraLayout
from diffusion_jax.experiment import Experiment, make_experiment
from diffusion_jax.experiment.files.lora import lora_trees
from diffusion_jax.runs.weights import load_checkpoint_file, load_trained
from diffusion_jax.types import PyTree
from diffusion_jax.wording import counted


def parse_loras(texts: Sequence[str]) -> dict[str | os.PathLike, float]:
    """Read the values of --lora: "style.safetensors:0.8", or a file alone, which counts once.

    Raises ValueError for a weight that is no number, and for a file that is given twice.
    """
    loras: dict[str | os.PathLike, float] = {}
    for text in texts:
        path, colon, weight = text.rpartition(":")
        if not colon or "/" in weight:
            path, weight = text, "1"
        try:
            number = float(weight)
        except ValueError as error:
            raise ValueError(f"--lora={text} should be FILE:WEIGHT, such as {path}:0.8") from error
        if path in loras:
            raise ValueError(f"--lora={path} should be given once, with one weight")
        loras[path] = number
    return loras


def convert_lora(
    source: str | os.PathLike,
    target: str | os.PathLike,
    layout: LoraLayout,
    config: ml_collections.ConfigDict,
    *,
    is_run: bool,
    base: str | os.PathLike | None = None,
    dtype: Any = None,
    step: int | None = None,
    raw: bool = False,
    ema: bool = False,
) -> list[str]:
    """Write the LoRA of a run, of a LoRA file, or of what a checkpoint changed of a base.

    base: the checkpoint from which source was trained; config.adapters then says which layers
      are compared, and the rank. The other options: see runs.export.convert_weights.
    Raises ValueError for a run that trained no adapters, and for files that do not fit.
    """
    if base is None:
        experiment = make_experiment(config)
        trees, lora = _read(experiment, source, is_run=is_run, step=step, raw=raw)
    else:
        trees, lora = _extracted(source, base, config, ema=ema)
    write_lora(lora, target, trees, layout, dtype=dtype)
    ranks = sorted({factors.down.shape[-1] for factors in lora.values()})
    return [
        f"{counted(len(lora), 'layer', 'layers')} of rank {', '.join(map(str, ranks))}",
        f"wrote {target}",
    ]


def _read(
    experiment: Experiment, source: str | os.PathLike, *, is_run: bool, step: int | None, raw: bool
) -> tuple[dict[str, PyTree], Lora]:
    network = experiment.network
    if not is_run:
        params, frozen = experiment.abstract_state().params, experiment.abstract_frozen()
        trees = lora_trees(network, params, frozen)
        return trees, read_lora(source, trees)
    if experiment.task.adapters is None:
        raise ValueError(
            f"--from={source} is a run without config.adapters; --base=CHECKPOINT makes a LoRA of "
            f"what it changed, once it is converted to a file"
        )
    trained = load_trained(experiment, pathlib.Path(source), step=step, ema=not raw)
    trees = lora_trees(network, trained.params, trained.frozen)
    return trees, experiment.task.adapters.lora(trained)


def _extracted(
    source: str | os.PathLike,
    base: str | os.PathLike,
    config: ml_collections.ConfigDict,
    *,
    ema: bool,
) -> tuple[dict[str, PyTree], Lora]:
    plain = config.copy_and_resolve_references()
    with plain.unlocked():
        if "adapters" not in plain or plain.adapters is None:
            plain.adapters = ml_collections.ConfigDict()
        adapters = make_experiment(plain).task.adapters
        assert adapters is not None  # config.adapters is a section now
        del plain.adapters
    experiment = make_experiment(plain)
    network = experiment.network
    before, after = (load_checkpoint_file(experiment, path, ema=ema)[0] for path in (base, source))
    trees, tuned = (lora_trees(network, t.params, t.frozen) for t in (before, after))
    whole = {
        "network": trees["network"],
        "conditioner": {**before.frozen["conditioner"], **before.params["conditioner"]},
    }
    return trees, extract_lora(trees, tuned, adapters.ranks(whole))
