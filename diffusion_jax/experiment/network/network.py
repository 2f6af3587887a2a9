"""The `model` and `conditioning` sections -> a network with its embedders."""

import functools
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array

from diffusion_jax.data.tokenizer import ClipTokenizer
from diffusion_jax.diffusion.ddpm import expand
from diffusion_jax.experiment.config.binding import (
    ConfigError,
    Section,
    bind_section,
    check_range,
    check_type,
    parameters_of,
    pick,
    row,
)
from diffusion_jax.experiment.config.options import ConditioningOptions
from diffusion_jax.experiment.first_stage.frozen import FirstStage, build_first_stage
from diffusion_jax.experiment.network.cameras import with_cameras
from diffusion_jax.experiment.network.frames import FRAME, FRAME_INPUTS, add_frame, with_frames
from diffusion_jax.experiment.network.host_inputs import add_inputs
from diffusion_jax.experiment.network.staged import example_pixels, in_cells, with_channels
from diffusion_jax.experiment.network.text import tokenizers_of, with_null_tokens
from diffusion_jax.models.conditioning.conditioner import (
    Embedder,
    embed,
    init_embedders,
    name_outputs,
)
from diffusion_jax.models.conditioning.embedders import EMBEDDERS
from diffusion_jax.models.conditioning.routing import (
    CONDITIONING_KEYS,
    IMAGE_ONLY,
    VIEWS,
    apply_controls,
    apply_network,
    named_inputs,
    network_inputs,
)
from diffusion_jax.models.conditioning.windows import encode_windows
from diffusion_jax.models.dit import DiT
from diffusion_jax.models.unet.control_net import ControlNet
from diffusion_jax.models.unet.multiview_unet import MultiviewUNet
from diffusion_jax.models.unet.unet import UNet
from diffusion_jax.models.unet.video_unet import VideoUNet, as_image_unet
from diffusion_jax.types import Batch, Conditioning, Keys, PyTree

MODEL = Section(
    "config.model",
    "The network that is trained.",
    table={
        "unet": UNet,
        "video_unet": VideoUNet,
        "multiview_unet": MultiviewUNet,
        "dit": DiT,
    },
    own=(),
)
CONDITIONING = Section(
    "config.conditioning",
    "What the network is conditioned on; by default on nothing.",
    ((ConditioningOptions, ()),),
)
EMBEDDER = Section(
    "config.conditioning.embedders.NAME",
    "One source of conditioning, under any name.",
    table=EMBEDDERS,
    own=(),
)


class Network(NamedTuple):
    """A network with its embedders, and the first stage in whose latents it works, if any.

    image_shape: (h, w, c) of what is denoised, latents or pixels. tokenize: name of tokens in a
    batch -> (name of the strings that they come from, strings -> int32 [n l]). force_uc_zero:
    embedders whose outputs are zero in the unconditional half of guidance. num_frames: of the clips
    that a network of videos denoises, arrays [b t h w c] wherever [b h w c] is said below; None for
    images. frame_noise, frame_fit, object_share, first_views: see ConditioningOptions. controls:
    the ControlNets, by name; their parameters are {"control": {name: ...}}.
    """

    module: nn.Module
    embedders: Mapping[str, Embedder]
    conditioning_key: str
    image_shape: tuple[int, int, int]
    first_stage: FirstStage | None = None
    tokenize: Mapping[str, tuple[str, ClipTokenizer]] = {}
    force_uc_zero: tuple[str, ...] = ()
    num_frames: int | None = None
    frame_noise: tuple[float, float] = ConditioningOptions().frame_noise
    frame_fit: str = ConditioningOptions().frame_fit
    object_share: float | None = ConditioningOptions().object_share
    first_views: str = ConditioningOptions().first_views
    controls: Mapping[str, ControlNet] = {}

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """The shape of a sample that is denoised: (h, w, c), or (t, h, w, c) for videos."""
        return with_frames(self.num_frames, self.image_shape)

    @property
    def num_views(self) -> int | None:
        """How many views of each time a clip has; None where it is not of several views."""
        views = [e.frames for e in self.embedders.values() if e.input_key == VIEWS]
        return views[0] if views else None

    def init(self, key: Array) -> PyTree:
        """Initialise what is trained: {"network": ..., "conditioner": {embedder: ...}}, float32."""
        batch = self._embedder_inputs(1)
        embedder_key, network_key = jax.random.split(key)
        conditioner = init_embedders(self.embedders, batch, embedder_key, trainable=True)
        shapes = conditioning_shapes(self.embedders, self.image_shape)
        conditioning = {name: jnp.zeros(leaf.shape, leaf.dtype) for name, leaf in shapes.items()}
        x = jnp.zeros((1, *self.sample_shape))
        inputs = network_inputs(self.conditioning_key, x, conditioning)
        t = jnp.zeros((1,), jnp.int32)
        named = named_inputs(conditioning)
        variables = self.module.init(
            network_key, inputs.x, t, context=inputs.context, y=inputs.y, **named
        )
        return {"network": variables["params"], "conditioner": conditioner}

    def init_frozen(self, key: Array) -> PyTree:
        """Initialise what is not trained: {"conditioner": {embedder: ...}, "first_stage": ...}."""
        embedder_key, first_stage_key = jax.random.split(key)
        batch = self._embedder_inputs(1)
        conditioner = init_embedders(self.embedders, batch, embedder_key, trainable=False)
        stage = self.first_stage
        if stage is None:
            return {"conditioner": conditioner, "first_stage": {}}
        frozen = {"conditioner": conditioner, "first_stage": stage.init(first_stage_key)}
        return frozen | ({"scale_factor": jnp.float32(1.0)} if stage.options.scale_by_std else {})

    def constants(self) -> dict[str, Array]:
        """Return the arrays that the config alone determines: the scale factor of the latents."""
        stage = self.first_stage
        if stage is None or stage.options.scale_by_std:
            return {}
        return {"scale_factor": jnp.float32(stage.options.scale_factor)}

    def apply(
        self,
        params: PyTree,
        x: Array,
        t: Array,
        conditioning: Conditioning,
        dropout_key: Array | None = None,
    ) -> Array:
        """Evaluate the network on x_t [b h w c] at t [b] -> model output, float32 [b h w c]."""
        seen = (x, t, conditioning, dropout_key)
        own = params["control"] if self.controls else {}
        control = apply_controls(self.controls, self.conditioning_key, own, *seen)
        return apply_network(
            self.module, self.conditioning_key, params["network"], *seen, control=control
        )

    def embed(
        self,
        params: PyTree,
        frozen: PyTree,
        batch: Batch,
        keys: Keys | None = None,
        *,
        unconditional: bool = False,
        kept: Collection[str] = (),
    ) -> Conditioning:
        """Compute the conditioning of a batch, see conditioner.embed for the arguments.

        keys [b] switch on the dropout of conditions in training.
        """
        conditioning = embed(
            self.embedders,
            {**frozen["conditioner"], **params["conditioner"]},
            in_cells(self.embedders, self.first_stage, frozen, batch),
            keys,
            unconditional=unconditional,
            kept=kept,
            force_zero=self.force_uc_zero if unconditional else (),
            null_outputs=frozen["null_outputs"] if "null_outputs" in frozen else {},
        )
        if self.num_frames is None or IMAGE_ONLY not in batch:
            return conditioning
        if isinstance(self.module, MultiviewUNet):  # views that are not known yet are 0
            known = expand(batch[IMAGE_ONLY][:, 0], conditioning[VIEWS])
            return {**conditioning, VIEWS: known * conditioning[VIEWS]}
        return {**conditioning, IMAGE_ONLY: batch[IMAGE_ONLY]}

    @property
    def frame_place(self) -> int:
        """Which frame of a clip is the picture that conditions it: the last of an orbit, else 0."""
        return -1 if self.frame_fit == "object" else 0

    @property
    def reads_frame(self) -> bool:
        """Whether embedders read one frame of a clip, see frames.add_frame."""
        read = {e.input_key for e in self.embedders.values() if e.frames is None}
        return self.num_frames is not None and bool(read.intersection(FRAME_INPUTS))

    def with_conditioning_frame(self, batch: Batch, keys: Keys) -> Batch:
        """Add to a batch what embedders read of the conditioning frame, see frames.add_frame."""
        read = {embedder.input_key for embedder in self.embedders.values()}
        if self.num_frames is None or not read.intersection(FRAME_INPUTS):
            return batch
        return add_frame(batch, keys, self.frame_noise, self.frame_place)

    def encode(self, frozen: PyTree, batch: Batch, keys: Keys) -> Array:
        """Give what the network learns to denoise: images, or latents times the scale factor.

        Latents are drawn from their posteriors, whose moments may be in the batch. float32.
        Source: latent-diffusion, get_first_stage_encoding.
        """
        if self.first_stage is None:
            return batch["image"]
        if "moments" in batch:
            latents = self.first_stage.draw(batch["moments"], keys)
        else:
            latents = self.first_stage.encode(frozen["first_stage"], batch["image"], keys)
        return frozen["scale_factor"] * latents

    def encode_mode(self, frozen: PyTree, image: Array) -> Array:
        """Give what the network denoises without drawing: the image, or the mode of its latents."""
        if self.first_stage is None:
            return image
        latents = self.first_stage.encode(frozen["first_stage"], image, None)
        return frozen["scale_factor"] * latents

    def size_multiple(self) -> int:
        """Return the number that both sides of an image must be multiples of, in pixels."""
        first_stage = 1 if self.first_stage is None else self.first_stage.factor
        unet = as_image_unet(self.module)
        if unet is not None:
            return first_stage * unet.patch_size * 2 ** max(len(unet.channel_mult) - 1, 0)
        return first_stage * getattr(self.module, "size_multiple", 1)

    def shape_of(
        self, size: tuple[int, int] | None, num_frames: int | None = None
    ) -> tuple[int, ...]:
        """Return the shape that is denoised for images of (height, width); None: as the data.

        num_frames: of a clip, where the network denoises videos; None: as the data.
        """
        num_frames = num_frames or self.num_frames
        if size is None:
            return with_frames(num_frames, self.image_shape)
        factor = 1 if self.first_stage is None else self.first_stage.factor
        shape = (size[0] // factor, size[1] // factor, self.image_shape[-1])
        return with_frames(num_frames, shape)

    def decode(self, frozen: PyTree, x: Array) -> Array:
        """Turn what the network denoised into images [b h w c] in about [-1, 1], float32."""
        if self.first_stage is None:
            return x
        return self.first_stage.decode(frozen["first_stage"], x / frozen["scale_factor"])

    def example_inputs(self, size: int) -> dict[str, Array]:
        """Return zeros with the shapes and dtypes of all that is read of a batch but images."""
        inputs = self._embedder_inputs(size)
        if self.num_frames is None:
            return inputs
        given = {e.input_key for e in self.embedders.values() if e.frames is not None}
        made = {*FRAME_INPUTS[1:]} if FRAME in given else {*FRAME_INPUTS}
        found = {key: value for key, value in inputs.items() if key not in made}
        return {**found, IMAGE_ONLY: jnp.zeros((size, self.num_frames))}

    def _embedder_inputs(self, size: int) -> dict[str, Array]:
        height, width, channels = self.image_shape
        factor = 1 if self.first_stage is None else self.first_stage.factor
        pixels = (height * factor, width * factor, channels)
        return {
            e.input_key: e.example(size, pixels if e.input_key == FRAME else self.image_shape)
            if e.staged is None
            else example_pixels(e, size, self.image_shape, self.first_stage)
            for e in self.embedders.values()
        }

    def with_inputs(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Add to a host batch what embedders read and it lacks: angles, tokens, hints, defaults.

        An embedder whose outputs are in the batch already needs no input.
        """
        batch = with_cameras(batch, self.num_views, absolute=self.first_views == "orbit")
        return add_inputs(self.embedders, self.tokenize, batch)


def build_network(
    model: Mapping[str, Any],
    conditioning: Mapping[str, Any] | None,
    data_shape: tuple[int, int, int],
    first_stage: Mapping[str, Any] | None = None,
    num_frames: int | None = None,
) -> Network:
    """Build the network of a config for images of data_shape, or clips of so many of them.

    Fields of the network that follow from the data and the embedders may be left out: see _derived.
    Raises ConfigError when an option is wrong, or differs from what follows.
    """
    (options,) = bind_section(CONDITIONING, conditioning).own
    options = ConditioningOptions(**options)
    pick(CONDITIONING_KEYS, options.key, f"{CONDITIONING.path}.key")
    for name in options.force_uc_zero:
        pick(options.embedders, name, f"{CONDITIONING.path}.force_uc_zero")
    embedders = {name: _embedder(name, options.embedders[name]) for name in _ordered(options)}
    stage = None if first_stage is None else build_first_stage(first_stage, data_shape)
    image_shape = data_shape if stage is None else stage.latent_shape
    embedders = with_channels(embedders, image_shape, num_frames)
    derived = _derived(options.key, embedders, image_shape, is_latent=stage is not None)
    return Network(
        _module(model, derived),
        embedders,
        options.key,
        image_shape,
        stage,
        tokenizers_of(embedders),
        options.force_uc_zero,
        num_frames,
        options.frame_noise,
        options.frame_fit,
        options.object_share,
        options.first_views,
    )


def _ordered(options: ConditioningOptions) -> Sequence[str]:
    """List the names of the embedders in the order of the config.

    An embedder that was taken out of a config may still stand in the order.
    """
    names = list(options.embedders)
    if not options.order:
        return names
    ordered = [name for name in options.order if name in names]
    if sorted(ordered) != sorted(names):
        raise ConfigError(
            f"{CONDITIONING.path}.order = {options.order!r} should name each embedder once: "
            f"{', '.join(names)}"
        )
    return ordered


def conditioning_shapes(
    embedders: Mapping[str, Embedder], image_shape: tuple[int, int, int]
) -> dict[str, jax.ShapeDtypeStruct]:
    """Find the shape and dtype of the Conditioning of one sample; nothing is computed.

    Raises ValueError when outputs of embedders that meet in one entry cannot be joined.
    """
    outputs = {}
    for name, embedder in embedders.items():
        example = jax.eval_shape(lambda e=embedder: e.example(1, image_shape))
        is_text = embedder.text is not None
        outputs[name] = _output_shapes(embedder.module, example.shape, example.dtype, is_text)

    def join(outputs: Mapping[str, tuple[Array, ...]]) -> Conditioning:
        named = [name_outputs(name, own) for name, own in outputs.items()]
        batch = {key: output for own in named for key, output in own.items()}
        return embed(embedders, {}, batch, null_outputs=batch)

    return jax.eval_shape(join, outputs)


@functools.cache
def _output_shapes(
    module: nn.Module, shape: tuple[int, ...], dtype: Any, is_text: bool
) -> tuple[Any, ...]:
    # Text encoders take seconds to trace, and every experiment asks for them again.
    def compute(value: Array) -> Any:
        return module.init_with_output(jax.random.key(0), value)[0]

    compute_all = functools.partial(encode_windows, compute) if is_text else compute
    outputs = jax.eval_shape(compute_all, jax.ShapeDtypeStruct(shape, dtype))
    return outputs if isinstance(outputs, tuple) else (outputs,)


def _embedder(name: str, section: Any) -> Embedder:
    path = f"config.conditioning.embedders.{name}"
    embedder = bind_section(EMBEDDER._replace(path=path), section).make()
    if not isinstance(embedder, Embedder):
        raise ConfigError(f"{path}.name = {section['name']!r} should return an Embedder")
    check_range(embedder.ucg_rate, f"{path}.ucg_rate", low=0.0, high=1.0)
    try:
        jnp.dtype(embedder.dtype)
    except TypeError as error:
        raise ConfigError(
            f"{path}.dtype = {embedder.dtype!r} should be a dtype such as float32 or int32"
        ) from error
    return with_null_tokens(embedder, path)


def _derived(
    key: str,
    embedders: Mapping[str, Embedder],
    image_shape: tuple[int, int, int],
    *,
    is_latent: bool,
) -> dict[str, tuple[Any, str]]:
    """Find what the data and the embedders say about the network: {field: (value, why)}."""
    images = "the latents" if is_latent else "the images (config.data.batches.channels)"
    derived: dict[str, tuple[Any, str]] = {
        "out_channels": (image_shape[-1], f"the channels of {images}")
    }
    shapes = conditioning_shapes(embedders, image_shape)
    given = {entry: shapes[entry] for entry in CONDITIONING_KEYS[key] if entry in shapes}
    if "crossattn" in given:
        width = given["crossattn"].shape[-1]
        derived["context_dim"] = (width, "the width of what the embedders give as context")
    if "vector" in given and len(given["vector"].shape) > 1:
        derived["num_classes"] = ("sequential", "as the embedders give vectors of features")
        width = given["vector"].shape[-1]
        derived["adm_in_channels"] = (width, "the width of the vectors that the embedders give")
    for name, embedder in embedders.items():
        if embedder.embeds_labels_in_network and embedder.num_classes is not None:
            why = f"the null class and the {embedder.num_classes} of {CONDITIONING.path}.embedders"
            derived["num_classes"] = (embedder.num_classes + 1, f"{why}.{name}")
    return derived


def _takes(annotation: Any, value: Any) -> bool:
    """Tell whether a field takes a value: num_classes of a module may be a number and no word."""
    try:
        check_type(value, annotation, MODEL.path)
    except ConfigError:
        return False
    return True


def _module(model: Mapping[str, Any], derived: Mapping[str, tuple[Any, str]]) -> nn.Module:
    fields = parameters_of(row(MODEL.table, model, MODEL.path, own=True))
    follows = {
        name: value
        for name, (value, _) in derived.items()
        if name in fields and _takes(fields[name].annotation, value)
    }
    bound = bind_section(MODEL, follows | dict(model))
    for name, value in follows.items():
        given = bound.keywords[name]
        widths = set(given) if isinstance(given, tuple) else {given}  # one for each block
        if widths != {value}:
            raise ConfigError(
                f"{MODEL.path}.{name} = {given!r} should be {value!r}, {derived[name][1]}; or "
                "leave it out"
            )
    return bound.make()
