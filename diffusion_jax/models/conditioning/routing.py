"""Where conditioning enters a network: LDM's conditioning keys as one routing function."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, Num

from diffusion_jax.models.layers.low_rank import heeding
from diffusion_jax.types import DURATION, GUIDANCE, Conditioning, PyTree

# conditioning key -> the entries of a Conditioning that it needs.
CONDITIONING_KEYS: dict[str, tuple[str, ...]] = {
    "none": (),
    "concat": ("concat",),
    "crossattn": ("crossattn",),
    "hybrid": ("concat", "crossattn"),
    "adm": ("vector",),
    "concat-adm": ("concat", "vector"),
    "hybrid-adm": ("concat", "crossattn", "vector"),
    "crossattn-adm": ("crossattn", "vector"),
}


# Entries of a Conditioning that networks of videos take by name, whatever the conditioning key: [b
# t], 1 where the frames of a clip are independent images; and for MultiviewUNet latents of views
# [b v h w c]. The originals have cond_motion, too, and give it to no layer.
IMAGE_ONLY, VIEWS, MOTION = "image_only_indicator", "cond_view", "cond_motion"
# Entries for each ControlNet: its hint [b h w 3] in [-1, 1], and [b 1], what its output is
# multiplied by.
HINT, HINT_SCALE = "hint/{}", "hint_scale/{}"
# Entries that a network takes by name.
NAMED = (IMAGE_ONLY, VIEWS, GUIDANCE, DURATION)


class NetworkInputs(NamedTuple):
    """What a UNet is called with: x [b h w c], context [b l d], y [b d] or int [b], or None.

    For videos x is [b t h w c], and the others may have the axis t after b.
    """

    x: Array
    context: Array | None
    y: Array | None


def required_entries(conditioning_key: str) -> tuple[str, ...]:
    """Name the Conditioning entries that a conditioning key needs.

    Raises ValueError for a key outside CONDITIONING_KEYS.
    Source: latent-diffusion, DiffusionWrapper.
    """
    if conditioning_key not in CONDITIONING_KEYS:
        raise ValueError(
            f"conditioning key {conditioning_key!r} is unknown; choose one of "
            f"{', '.join(CONDITIONING_KEYS)}"
        )
    return CONDITIONING_KEYS[conditioning_key]


def network_inputs(
    conditioning_key: str, x: Float[Array, "b *t h w c"], conditioning: Conditioning
) -> NetworkInputs:
    """Route conditioning into the inputs of a UNet.

    concat joins x [b h w c] on the channels, crossattn is the context, vector is y; the
    conditioning holds exactly the entries that the key needs. Where x is a video [b t h w c], a
    concat [b h w c'] joins each of its frames.
    Raises ValueError when an entry is missing or left over.
    Source: latent-diffusion, DiffusionWrapper; generative-models, OpenAIWrapper.
    """
    needed = required_entries(conditioning_key)
    given = {name for name in conditioning if name not in (*NAMED, MOTION) and "/" not in name}
    if given != set(needed):
        raise ValueError(
            f"conditioning key {conditioning_key!r} needs the entries {sorted(needed)}, "
            f"got {sorted(given)}"
        )
    if "concat" in needed:
        concat = conditioning["concat"].astype(x.dtype)
        if concat.ndim < x.ndim:
            concat = jnp.repeat(concat[:, None], x.shape[1], axis=1)
        x = jnp.concatenate([x, concat], axis=-1)
    return NetworkInputs(
        x,
        conditioning["crossattn"] if "crossattn" in needed else None,
        conditioning["vector"] if "vector" in needed else None,
    )


def named_inputs(conditioning: Conditioning) -> dict[str, Any]:
    """Find the entries that networks take by name."""
    return {name: conditioning[name] for name in NAMED if name in conditioning}


def apply_controls(
    modules: Mapping[str, nn.Module],
    conditioning_key: str,
    params: PyTree,
    x: Float[Array, "b *dims c"],
    t: Num[Array, "b"],
    conditioning: Conditioning,
    dropout_key: Key[Array, ""] | None = None,
) -> list[Array] | None:
    """Add up what the ControlNets of a network give, each times its scale; None without one.

    modules, params: by name. The rest is as in apply_network.
    """
    if not modules:
        return None
    inputs = network_inputs(conditioning_key, x, conditioning)
    rngs = {} if dropout_key is None else {"dropout": dropout_key}
    given = []
    for name, module in modules.items():
        hint = (conditioning[HINT.format(name)] + 1.0) / 2.0
        found: Any = module.apply(
            {"params": params[name]},
            inputs.x,
            t,
            hint,
            inputs.context,
            inputs.y,
            train=dropout_key is not None,
            rngs=rngs,
        )
        scale = conditioning[HINT_SCALE.format(name)][:, :, None, None]
        given.append([scale.astype(h.dtype) * h for h in found])
    return [functools.reduce(jnp.add, each) for each in zip(*given, strict=True)]


def apply_network(
    module: nn.Module,
    conditioning_key: str,
    params: PyTree,
    x: Float[Array, "b *t h w c"],
    t: Num[Array, "b"],
    conditioning: Conditioning,
    dropout_key: Key[Array, ""] | None = None,
    control: Sequence[Array] | None = None,
) -> Array:
    """Evaluate a network on x_t [b h w c] at t [b] under its conditioning -> float32 [b h w c'].

    t is a timestep, or any other number that the network knows a noise level by. A
    dropout_key means training; without one the network is deterministic. Videos are [b t h w c].
    control: see apply_controls.
    """
    inputs = network_inputs(conditioning_key, x, conditioning)
    rngs = {} if dropout_key is None else {"dropout": dropout_key}
    named: dict[str, Any] = named_inputs(conditioning)
    if control is not None:
        named["control"] = control
    with heeding(params):
        output = module.apply(
            {"params": params},
            inputs.x,
            t,
            context=inputs.context,
            y=inputs.y,
            train=dropout_key is not None,
            rngs=rngs,
            **named,
        )
    return jnp.asarray(output, jnp.float32)
