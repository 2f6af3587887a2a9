"""The `control` section -> ControlNets, which are trained beside a frozen network."""

import functools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from diffusion_jax.convert.weights.diffusers_folder import control_config, save_control
from diffusion_jax.convert.weights.exporting import export_params, save_weights
from diffusion_jax.convert.weights.importing import import_network
from diffusion_jax.convert.weights.reading import open_weights, read_json
from diffusion_jax.data.hints import HINTS
from diffusion_jax.experiment.config.binding import ConfigError, Section, bind_each
from diffusion_jax.experiment.config.options import ControlOptions
from diffusion_jax.experiment.files.export import channels_of
from diffusion_jax.experiment.network.layout import base_rules, control_rules
from diffusion_jax.experiment.network.network import Network
from diffusion_jax.experiment.network.parts import Parts, check_gradients, init_base, load_base
from diffusion_jax.experiment.network.shapes import conditioning_shapes
from diffusion_jax.experiment.task import Trained, Training
from diffusion_jax.models.conditioning.conditioner import Embedder, Identity
from diffusion_jax.models.conditioning.routing import HINT, HINT_SCALE, network_inputs
from diffusion_jax.models.unet.control_net import HINT_CHANNELS, ControlNet
from diffusion_jax.models.unet.unet import UNet
from diffusion_jax.types import PyTree

CONTROL = Section(
    "config.control.NAME",
    "A ControlNet, which is trained beside the weights of train.ckpt_path, and nothing else.",
    ((ControlOptions, ()),),
)
LAYOUT = "controlnet"
_PATH = "config.control"
_PREFIX = "control_model."


def bind_controls(section: Mapping[str, Any] | None) -> dict[str, ControlOptions]:
    """Bind the sections of all ControlNets; ConfigError for a wrong option."""
    if section is None:
        return {}
    bound = bind_each(CONTROL, section, "a ControlNet, such as edges")
    return {name: ControlOptions(**own) for name, own in bound.items()}


def with_controls(network: Network, section: Mapping[str, Any] | None) -> Network:
    """Give a network the ControlNets of a config, and embedders for what they see.

    Raises ConfigError for a wrong option, and for a network that none can steer.
    """
    controls = bind_controls(section)
    if not controls:
        return network
    unet = network.module
    if not isinstance(unet, UNet):
        raise ConfigError(f"{_PATH} is for config.model.name = 'unet'")
    factor = unet.patch_size * (1 if network.first_stage is None else network.first_stage.factor)
    halvings = factor.bit_length() - 1
    if factor != 2**halvings:
        raise ConfigError(f"{_PATH} needs a network on 1 / 2 ** n of the pixels, not 1 / {factor}")
    channels = (*HINT_CHANNELS, *HINT_CHANNELS[-1:] * halvings)[: halvings + 1]
    embedders = dict(network.embedders)
    for name, options in controls.items():
        embedders[HINT.format(name)] = Embedder(
            Identity(),
            options.column,
            channels=3,
            scale=float(factor // unet.patch_size),
            entry=HINT.format(name),
            made_of_image=None if options.hint is None else HINTS[options.hint],
        )
        embedders[HINT_SCALE.format(name)] = Embedder(
            Identity(),
            scale_key(name),
            shape=(1,),
            dtype="float32",
            default=(1.0,),
            entry=HINT_SCALE.format(name),
        )
    modules = dict.fromkeys(controls, ControlNet(unet, channels))
    return network._replace(embedders=embedders, controls=modules)


def columns_of(embedders: Mapping[str, Embedder]) -> tuple[str, ...]:
    """Name the columns of hints that the data have to hold, because none are made of images."""
    first = HINT.format("")
    read = (e for e in embedders.values() if e.entry is not None and e.entry.startswith(first))
    return tuple(dict.fromkeys(e.input_key for e in read if e.made_of_image is None))


def scale_key(name: str) -> str:
    """Name the input that multiplies what a ControlNet gives."""
    return f"conditioning_scale/{name}"


def check_control(sections: Mapping[str, Any]) -> None:
    """Raise ConfigError for sections that cannot stand beside `control`."""
    if sections["adapters"] is not None:
        raise ConfigError(f"config.adapters cannot be trained together with {_PATH}: drop one")
    if sections["latent_cache"] is not None:
        raise ConfigError(f"config.latent_cache keeps no hints, which {_PATH} reads: drop one")


def controlled(
    network: Network, mesh: Mesh, training: Training, section: Mapping[str, Any]
) -> Parts:
    """Train ControlNets, and nothing else; ConfigError for a network that has none."""
    if not network.controls:
        raise ConfigError(f"{_PATH} is for networks of images")
    check_gradients(training, _PATH)
    options = bind_controls(section)

    def whole(params: PyTree, frozen: PyTree) -> tuple[PyTree, PyTree]:
        base = {name: frozen[name] for name in ("network", "conditioner")}
        return {**params, **base}, frozen

    return Parts(
        init=lambda key: {"control": _init(network, key)},
        init_frozen=functools.partial(init_base, network),
        whole=whole,
        merged=lambda trained, dtype: trained,
        rules=control_rules(network, mesh),
        frozen_rules=base_rules(network, mesh),
        load_frozen=functools.partial(load_base, network, training),
        load_released=lambda params, mutable, path, training: (params, mutable, []),
        needs_base=_PATH,
        first_params=functools.partial(_first_params, options, training),
        check_files=functools.partial(_check_files, options),
        export_file=_export_file,
        export_folder=functools.partial(_export_folder, network),
        layout=LAYOUT,
    )


def _init(network: Network, key: jax.Array) -> PyTree:
    shapes = conditioning_shapes(network.embedders, network.image_shape)
    conditioning = {name: jnp.zeros(leaf.shape, leaf.dtype) for name, leaf in shapes.items()}
    x = jnp.zeros((1, *network.image_shape))
    x, context, y = network_inputs(network.conditioning_key, x, conditioning)
    t = jnp.zeros((1,), jnp.int32)
    return {
        name: module.init(
            jax.random.fold_in(key, number), x, t, conditioning[HINT.format(name)], context, y
        )["params"]
        for number, (name, module) in enumerate(network.controls.items())
    }


def _first_params(
    options: Mapping[str, ControlOptions], training: Training, params: PyTree, frozen: PyTree
) -> PyTree:
    """Read each ControlNet from its file, or copy what the network has of the same name."""
    control = {}
    for name, own in params["control"].items():
        weights = options[name].weights
        if weights is not None:
            path = Path(os.path.expanduser(weights))
            _check_config(path)
            control[name] = import_network(own, path, LAYOUT, nonfinite=not training.ckpt_check)
            continue
        base = {part: frozen["network"][part] for part in own if part in frozen["network"]}
        copied = jax.tree.map(
            lambda like, leaf: jax.device_put(leaf.astype(like.dtype), like.sharding),
            {part: own[part] for part in base},
            base,
        )
        control[name] = {**own, **copied}
    return {**params, "control": control}


def _check_files(options: Mapping[str, ControlOptions]) -> None:
    """Open the files that ControlNets begin with; FileNotFoundError or ValueError for others."""
    for own in options.values():
        if own.weights is not None:
            path = Path(os.path.expanduser(own.weights))
            _check_config(path)
            open_weights(path)


def _check_config(path: Path) -> None:
    """Raise ValueError for a ControlNet of diffusers that means something else by its hint."""
    config = read_json(path / "config.json") if path.is_dir() else {}
    expected = {"controlnet_conditioning_channel_order": "rgb", "global_pool_conditions": False}
    for name, value in expected.items():
        if name in config and config[name] != value:
            raise ValueError(
                f"{path / 'config.json'}: {name} = {config[name]!r} should be {value!r}"
            )


def _only(trained: Trained) -> PyTree:
    """Return the parameters of the one ControlNet that a file can hold."""
    control = trained.params["control"]
    if len(control) > 1:
        raise ConfigError(
            f"{_PATH} has {', '.join(control)}, and a file holds one ControlNet: leave one of them "
            "in the config; --format=native writes all of a model"
        )
    if trained.ema is not None:
        raise ConfigError("a file of a ControlNet has no place for averages: leave --with_ema out")
    return next(iter(control.values()))


def _export_file(
    trained: Trained, path: str | os.PathLike, *, dtype: Any = None, nonfinite: bool = False
) -> str:
    params, written = _only(trained), {"dtype": dtype, "nonfinite": nonfinite}
    save_weights(path, [export_params(params, "control_ldm", _PREFIX, **written)])
    return LAYOUT


def _export_folder(
    network: Network,
    trained: Trained,
    folder: str | os.PathLike,
    *,
    dtype: Any = None,
    nonfinite: bool = False,
) -> None:
    module = next(iter(network.controls.values()))
    inputs, numbers = channels_of(network)
    config = control_config(module.unet, inputs, module.hint_channels, **numbers)
    save_control(folder, _only(trained), config, dtype=dtype, nonfinite=nonfinite)
