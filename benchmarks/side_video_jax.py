"""Our side of video_speed.py, started by it: see paired.serve."""

import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import paired

from diffusion_jax.convert.weights.diffusers_video import video_unet_config
from diffusion_jax.experiment.config.options import ClipOptions
from diffusion_jax.models.first_stage import VideoDecoder
from diffusion_jax.models.first_stage.tiling import decode_in_clips
from diffusion_jax.models.unet import VideoUNet

# Channels in which each of the three numbers about a clip is embedded.
TIME_DIM = 64


def build(specification: dict[str, Any]) -> tuple[dict[str, Any], Callable[[int], None]]:
    """Build a denoising step or the decoding of a clip; returns the report and run(times)."""
    memory_at_start, start = paired.peak_memory(), time.perf_counter()
    dtype = jnp.dtype(specification["dtype"])
    fields, shape = specification["fields"], tuple(specification["shape"])
    numbers = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(numbers.standard_normal(shape), jnp.float32)
    if specification["part"] == "step":
        module = VideoUNet(**fields, dtype=dtype)
        batch = shape[0]
        context = draw(batch, 1, fields["context_dim"])
        inputs = (draw(*shape), jnp.zeros(batch), context, draw(batch, fields["adm_in_channels"]))
        size = {"sample_size": shape[2], "num_frames": shape[1], "time_dim": TIME_DIM}
        network = video_unet_config(module, shape[-1], **size)
        forward = module.apply
    else:
        module = VideoDecoder(**fields, dtype=dtype)
        inputs, network = (draw(*shape),), {}
        forward = functools.partial(decode, module, specification["chunk"])
    params = jax.jit(module.init)(jax.random.key(0), *inputs)
    lowered = jax.jit(forward).lower(params, *inputs)
    compiled = lowered.compile()

    def run(times: int) -> None:
        for _ in range(times):
            found = compiled(params, *inputs)
        jax.block_until_ready(found)

    run(1)
    stats = jax.devices()[0].memory_stats()
    report = {
        "version": f"jax {jax.__version__}",
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
        "ready": time.perf_counter() - start,
        "flops": lowered.cost_analysis()["flops"],
        "memory_at_start": memory_at_start,
        "device_memory": stats["peak_bytes_in_use"] if stats else 0,
        "temporaries": compiled.memory_analysis().temp_size_in_bytes,
        "network": network,
    }
    return report, run


def decode(module: VideoDecoder, chunk: int | None, params: Any, z: jax.Array) -> jax.Array:
    """Decode a clip [b t h w c], whole or so many frames at a time, as sampling does."""
    whole = functools.partial(module.apply, params)
    if chunk is None:
        return whole(z)
    return decode_in_clips(whole, z, frames=chunk, overlap=ClipOptions().overlap)


if __name__ == "__main__":
    paired.serve(build)
