"""Begin a new run from the parameters of another one, and say what was not taken."""

import os
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from diffusion_jax.train.checkpoints.checksums import named_leaves, path_name
from diffusion_jax.train.checkpoints.reading import (
    few,
    load_mutable,
    load_params,
    resolve_checkpoint,
)
from diffusion_jax.types import PyTree

_UNET = "network/"


class WarmStart(NamedTuple):
    """params: the new run's, with all that was taken. not_loaded: names that keep their initial
    values. unused: names that only the other run has, or that were not wanted."""

    params: PyTree
    not_loaded: list[str]
    unused: list[str]


def warm_start(
    params: PyTree,
    ckpt_path: str | os.PathLike,
    *,
    ignore_keys: Sequence[str] = (),
    load_only_unet: bool = False,
    ema: bool = False,
) -> WarmStart:
    """Replace parameters by those of the same name in a checkpoint; shardings and dtypes stay.

    params: initial parameters, {"network": ..., "conditioner": ...}. ckpt_path: as --resume takes
    it. ignore_keys: regular expressions matched from the start of a name such as
    "network/out_2/kernel", so a prefix will do; what matches is not taken. load_only_unet takes the
    network alone; ema takes the averages. The optimizer and the step start anew.
    Raises ValueError when a shape differs, or when nothing at all was taken.
    Source: latent-diffusion, DDPM.init_from_ckpt.
    """
    workdir, step = resolve_checkpoint(ckpt_path)
    source = named_leaves(load_params(workdir / "checkpoints", step=step, ema=ema))
    wanted = {
        name: value
        for name, value in source.items()
        if not any(re.match(pattern, name) for pattern in ignore_keys)
        and (name.startswith(_UNET) or not load_only_unet)
    }
    own = named_leaves(params)
    _check_shapes(own, wanted, f"checkpoint {step} in {workdir}")
    taken = [name for name in own if name in wanted]
    if not taken:
        raise ValueError(
            f"nothing was loaded from checkpoint {step} in {workdir}: it has {few(source)}, "
            f"this run has {few(own)}"
        )
    loaded = jax.tree_util.tree_map_with_path(
        lambda path, leaf: _place(wanted.get(path_name(path)), leaf), params
    )
    not_loaded = [name for name in own if name not in wanted]
    return WarmStart(loaded, not_loaded, [name for name in source if name not in taken])


def warm_start_mutable(
    mutable: PyTree, ckpt_path: str | os.PathLike, *, ignore_keys: Sequence[str] = ()
) -> PyTree:
    """Replace mutable collections (running statistics, codebook averages) by those of the same name
    in a checkpoint, minus ignore_keys; others keep their initial values.

    Raises ValueError when a shape differs.
    """
    workdir, step = resolve_checkpoint(ckpt_path)
    source = {
        name: value
        for name, value in named_leaves(load_mutable(workdir / "checkpoints", step=step)).items()
        if not any(re.match(pattern, name) for pattern in ignore_keys)
    }
    _check_shapes(named_leaves(mutable), source, f"checkpoint {step} in {workdir}")
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: _place(source.get(path_name(path)), leaf), mutable
    )


def _place(value: np.ndarray | None, like: Any) -> Any:
    if value is None:
        return like
    value = value.astype(like.dtype)
    return jax.device_put(value, like.sharding) if isinstance(like, jax.Array) else value


def _check_shapes(own: dict[str, Any], wanted: dict[str, Any], where: str) -> None:
    different = [
        f"{name} {wanted[name].shape} (here {own[name].shape})"
        for name in own
        if name in wanted and wanted[name].shape != own[name].shape
    ]
    if different:
        raise ValueError(
            f"{where} has other shapes: {few(different)}; "
            "list what should keep its initial values in ignore_keys"
        )
