"""A network with its embedders, and the first stage in whose latents it works: one record."""

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array

from diffusion_jax.data.tokenizer import ClipTokenizer
from diffusion_jax.diffusion.ddpm import expand
from diffusion_jax.experiment.config.options import ConditioningOptions
from diffusion_jax.experiment.first_stage.frozen import FirstStage
from diffusion_jax.experiment.network.cameras import with_cameras
from diffusion_jax.experiment.network.frames import FRAME, FRAME_INPUTS, add_frame, with_frames
from diffusion_jax.experiment.network.host_inputs import add_inputs
from diffusion_jax.experiment.network.shapes import conditioning_shapes
from diffusion_jax.experiment.network.staged import example_pixels, in_cells
from diffusion_jax.models.conditioning.conditioner import (
    Embedder,
    embed,
    init_embedders,
)
from diffusion_jax.models.conditioning.routing import (
    IMAGE_ONLY,
    VIEWS,
    apply_controls,
    apply_network,
    named_inputs,
    network_inputs,
)
from diffusion_jax.models.unet.control_net import ControlNet
from diffusion_jax.models.unet.multiview_unet import MultiviewUNet
from diffusion_jax.models.unet.video_unet import as_image_unet
from diffusion_jax.types import Batch, Conditioning, Keys, PyTree


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

    def with_num_frames(self, num_frames: int) -> "Network":
        """Give the network of clips of another length, with as many numbers of each frame."""
        embedders = {
            name: e._replace(shape=(num_frames, *e.shape[1:]))
            if e.is_of_frames(self.num_frames)
            else e
            for name, e in self.embedders.items()
        }
        return self._replace(embedders=embedders, num_frames=num_frames)

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
