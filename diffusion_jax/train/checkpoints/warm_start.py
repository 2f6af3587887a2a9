"""Begin a new run from the parameters of another one, and say what was not taken."""

import os
import re
from collections.abc import Callable, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax

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
    """Parameters of a new run that were taken from another one.

    params: all of the new run's parameters. not_loaded: names that keep their initial values.
    unused: names of the other run that were not taken.
    """

    params: PyTree
    not_loaded: list[str]
    unused: list[str]


def warm_start(
    params: PyTree,
    ckpt_path: str | os.PathLike,
    *,
    given: PyTree = None,
    besides: PyTree = MappingProxyType({}),
    ignore_keys: Sequence[str] = (),
    load_only_unet: bool = False,
    ema: bool = False,
    fit: Callable[[PyTree], PyTree] = lambda params: params,
) -> WarmStart:
    """Take parameters of the same names from a checkpoint; shardings and dtypes stay.

    Args:
        params: initial parameters, {"network": ..., "conditioner": ...}.
        ckpt_path: what --resume takes.
        given: the parameters at ckpt_path, where it is no checkpoint and they are read already.
        besides: more parameters that are taken where the others lack them.
        ignore_keys: regular expressions matched from the start of a name such as
            "network/out_2/kernel", so a prefix will do; what matches is not taken.
        load_only_unet: take the network alone.
        ema: take the averaged parameters.
        fit: makes of the parameters at ckpt_path the ones that are taken.

    Raises:
        ValueError: a shape differs, or nothing at all was taken.

    Source: latent-diffusion, DDPM.init_from_ckpt.
    """
    where = str(ckpt_path)
    if given is None:
        workdir, step = resolve_checkpoint(ckpt_path)
        given = load_params(workdir / "checkpoints", step=step, ema=ema)
        where = f"checkpoint {step} in {workdir}"
    source = {**named_leaves(dict(besides)), **named_leaves(fit(given))}
    own, wanted = named_leaves(params), _wanted(source, ignore_keys)
    if load_only_unet:
        wanted = {name: value for name, value in wanted.items() if name.startswith(_UNET)}
    loaded = _take(params, wanted, where)
    taken = [name for name in own if name in wanted]
    if not taken:
        raise ValueError(
            f"nothing was loaded from {where}: it has {few(source)}, this run has {few(own)}"
        )
    not_loaded = [name for name in own if name not in wanted]
    return WarmStart(loaded, not_loaded, [name for name in source if name not in taken])


def warm_start_mutable(
    mutable: PyTree,
    ckpt_path: str | os.PathLike,
    *,
    given: PyTree = None,
    ignore_keys: Sequence[str] = (),
) -> PyTree:
    """Take mutable collections (running statistics, codebook averages) from a checkpoint.

    What it lacks, or ignore_keys match, keeps its initial values. given: see warm_start.
    Raises ValueError when a shape differs.
    """
    where = str(ckpt_path)
    if given is None:
        workdir, step = resolve_checkpoint(ckpt_path)
        given = load_mutable(workdir / "checkpoints", step=step)
        where = f"checkpoint {step} in {workdir}"
    return _take(mutable, _wanted(named_leaves(given), ignore_keys), where)


def _wanted(source: dict[str, Any], ignore_keys: Sequence[str]) -> dict[str, Any]:
    ignored = lambda name: any(re.match(pattern, name) for pattern in ignore_keys)
    return {name: value for name, value in source.items() if not ignored(name)}


def _take(tree: PyTree, wanted: dict[str, Any], where: str) -> PyTree:
    """Replace leaves of a tree by wanted values of their names, in their dtypes and places."""
    own = named_leaves(tree)
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

    def place(path: Any, like: Any) -> Any:
        name = path_name(path)
        if name not in wanted:
            return like
        value = wanted[name].astype(like.dtype)
        return jax.device_put(value, like.sharding) if isinstance(like, jax.Array) else value

    return jax.tree_util.tree_map_with_path(place, tree)
