"""Where the parameters of a network live on the mesh: rules made from its sizes."""

import functools
import re
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import Mesh

from diffusion_jax.devices.partition import (
    ATTENTION_BLOCK_SPLITS,
    MIN_SIZE,
    TRANSFORMER_SPLITS,
    Layout,
    Rule,
    parallel,
    tree_shardings,
)
from diffusion_jax.experiment.config.binding import ConfigError
from diffusion_jax.experiment.network.network import Network
from diffusion_jax.models.conditioning.conditioner import Embedder
from diffusion_jax.models.unet.unet import UNet
from diffusion_jax.models.unet.video_unet import as_image_unet

SHARDED = r"^(params|opt_state)/"
SHARDED_FROZEN = r"^(conditioner|first_stage)/"


def state_rules(network: Network, mesh: Mesh) -> tuple[Rule, ...]:
    """Make the rules for a TrainState: parameters, moments and average of a leaf lie alike.

    Raises ConfigError when config.mesh.tensor is above 1 and splits nothing that is trained.
    """
    if mesh.shape["fsdp"] == mesh.shape["tensor"] == 1:
        return ()
    # Moments and the average have the path of their parameter at the end of their own.
    rules = (
        *_embedder_rules(network, r"^(params|opt_state/.*)/", trainable=True),
        (SHARDED, _unet_layout(network.module)),
    )
    if mesh.shape["tensor"] > 1:
        _check_splits(network, mesh, rules)
    return rules


def adapter_rules(mesh: Mesh) -> tuple[Rule, ...]:
    """Make the rules for a TrainState of adapters: only large ones are split, over fsdp."""
    return () if mesh.shape["fsdp"] == 1 else ((SHARDED, parallel(())),)


def control_rules(network: Network, mesh: Mesh) -> tuple[Rule, ...]:
    """Make the rules for a TrainState of ControlNets, whose layers lie as the network's do."""
    alone = mesh.shape["fsdp"] == mesh.shape["tensor"] == 1
    return () if alone else ((SHARDED, _unet_layout(network.module)),)


def base_rules(network: Network, mesh: Mesh) -> tuple[Rule, ...]:
    """Make the rules for the weights that are frozen beside adapters and ControlNets."""
    if mesh.shape["fsdp"] == mesh.shape["tensor"] == 1:
        return ()
    held = jax.eval_shape(network.init, jax.random.key(0))["conditioner"]
    trained = ((SHARDED_FROZEN, parallel((), min_size=MIN_SIZE)),) if held else ()
    return (
        (r"^network/", _unet_layout(network.module)),
        *_embedder_rules(network, "^", trainable=True),
        *(frozen_rules(network, mesh) or trained),
    )


def first_stage_rules(mesh: Mesh) -> tuple[Rule, ...]:
    """Make the rules for the TrainState of a first stage: large leaves are split over fsdp."""
    if mesh.shape["tensor"] > 1:
        raise ConfigError(
            f"config.mesh.tensor = {mesh.shape['tensor']} splits no layer of a first stage; use "
            "config.mesh.fsdp to split parameters and optimizer state"
        )
    return () if mesh.shape["fsdp"] == 1 else ((SHARDED, parallel(())),)


def frozen_rules(network: Network, mesh: Mesh) -> tuple[Rule, ...]:
    """Make the rules for the weights of frozen networks; none when there are no such weights."""
    has_weights = network.first_stage is not None or any(
        not embedder.trainable for embedder in network.embedders.values()
    )
    if not has_weights or mesh.shape["fsdp"] == mesh.shape["tensor"] == 1:
        return ()
    return (
        *_embedder_rules(network, "^", trainable=False),
        (SHARDED_FROZEN, parallel((), min_size=MIN_SIZE)),
    )


def _embedder_rules(network: Network, prefix: str, *, trainable: bool) -> list[Rule]:
    rules: list[Rule] = []
    for name, embedder in network.embedders.items():
        heads = _text_heads(embedder)
        if embedder.trainable == trainable and heads is not None:
            layout = parallel(
                TRANSFORMER_SPLITS, lambda path, width, heads=heads: heads, min_size=MIN_SIZE
            )
            rules.append((f"{prefix}conditioner/{re.escape(name)}/", layout))
    return rules


def _text_heads(embedder: Embedder) -> int | None:
    """How many heads the attention of an embedder has, None when it has no attention."""
    module: Any = embedder.module
    tower = module.tower if hasattr(module, "tower") else module
    return tower.num_heads if hasattr(tower, "num_heads") else None


def _unet_layout(module: nn.Module) -> Layout:
    unet = as_image_unet(module)
    if unet is None:
        return parallel((), min_size=MIN_SIZE)
    heads = functools.partial(_unet_heads, unet)
    splits = TRANSFORMER_SPLITS if unet.use_spatial_transformer else ATTENTION_BLOCK_SPLITS
    if not unet.use_spatial_transformer and unet.use_new_attention_order:
        splits = ()  # the columns would part queries, keys and values, not heads
    return parallel(splits, heads, min_size=MIN_SIZE)


def _unet_heads(module: UNet, path: str, width: int) -> int:
    if module.num_head_channels != -1:
        return width // module.num_head_channels
    if "output_blocks" in path and module.num_heads_upsample != -1:
        return module.num_heads_upsample
    return module.num_heads


def _check_splits(network: Network, mesh: Mesh, rules: Sequence[Rule]) -> None:
    params = jax.eval_shape(network.init, jax.random.key(0))
    shardings = jax.tree.leaves(tree_shardings(mesh, {"params": params}, rules))
    if not any("tensor" in str(sharding.spec) for sharding in shardings):
        raise ConfigError(
            f"config.mesh.tensor = {mesh.shape['tensor']} splits no layer of this network: it "
            "splits attention whose heads it divides, and the feed-forward of transformers; use "
            "config.mesh.fsdp to split parameters and optimizer state"
        )
