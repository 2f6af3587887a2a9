"""Record what diffusers' network of Stable Video Diffusion computes, for tests without torch.

    PYTHONPATH=tests:. python -m support.video_fixtures    # tests/fixtures/video_unet_diffusers.npz

Weights and inputs are never stored: both sides draw them from unet_fixtures.numbers.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.convert.weights.exporting import export_params
from diffusion_jax.models.unet.video_unet import VideoUNet
from support import unet_fixtures

FIXTURE = Path(__file__).parents[1] / "fixtures/video_unet_diffusers.npz"
CLIPS, FRAMES, SIZE, TIME_DIM = 2, 3, 8, 8
FIELDS = {
    "out_channels": 4,
    "model_channels": 32,
    "channel_mult": (1, 2),
    "num_res_blocks": 1,
    "attention_resolutions": (1,),
    "num_head_channels": 16,
    "transformer_depth": (1, 2),
    "context_dim": 24,
    "num_classes": "sequential",
    "adm_in_channels": 3 * TIME_DIM,
    "use_linear_in_transformer": True,
    "use_spatial_context": True,
    "merge_strategy": "learned_with_images",
    "video_kernel_size": (3, 1, 1),
}
CONFIG = {
    "in_channels": 8,
    "out_channels": 4,
    "down_block_types": ("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
    "up_block_types": ("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
    "block_out_channels": (32, 64),
    "addition_time_embed_dim": TIME_DIM,
    "projection_class_embeddings_input_dim": 3 * TIME_DIM,
    "layers_per_block": 1,
    "cross_attention_dim": 24,
    "transformer_layers_per_block": (1, 2),
    "num_attention_heads": (2, 4),
    "num_frames": FRAMES,
}
# Gradients that are recorded, by their released names.
RECORDED = (
    "input_blocks.1.0.time_stack.in_layers.2.weight",
    "input_blocks.1.0.time_mixer.mix_factor",
    "middle_block.1.time_stack.1.norm1.weight",
    "middle_block.1.time_pos_embed.0.bias",
    "output_blocks.2.1.time_stack.0.attn2.to_v.weight",
    "output_blocks.3.1.time_mixer.mix_factor",
)


def inputs() -> dict[str, np.ndarray]:
    """Draw x [b t h w c], t [b], context [b 1 d], the numbers behind y, y and a cotangent."""
    time_ids = np.array([[6.0, 127.0, 0.02], [12.0, 30.0, 0.5]], np.float32)
    half = np.exp(-np.log(10000.0) * np.arange(TIME_DIM // 2) / (TIME_DIM // 2))
    angles = time_ids[..., None] * half
    waves = np.concatenate([np.cos(angles), np.sin(angles)], -1)
    numbers = unet_fixtures.numbers
    return {
        "x": numbers("x", (CLIPS, FRAMES, SIZE, SIZE, 8)),
        "t": np.array([0.25, -1.5], np.float32),
        "context": numbers("context", (CLIPS, 1, 24)),
        "y": waves.reshape(CLIPS, -1).astype(np.float32),
        "time_ids": time_ids,
        "cotangent": numbers("cotangent", (CLIPS, FRAMES, SIZE, SIZE, 4)),
    }


def drawn_params(module: VideoUNet) -> Any:
    """Draw every parameter by its released name."""
    drawn = inputs()
    arguments = [jnp.asarray(drawn[name]) for name in ("x", "t", "context", "y")]
    return drawn_of(jax.eval_shape(module.init, jax.random.key(0), *arguments)["params"])


def drawn_of(shapes: Any) -> Any:
    """Draw the numbers of a tree of shapes."""

    def draw(path: Any, leaf: Any) -> Any:
        name, shape = unet_fixtures.released_name(path, leaf.shape)
        numbers = unet_fixtures.numbers(name, shape)
        return jnp.asarray(unet_fixtures.to_ours(numbers, path[-1].key))

    return jax.tree_util.tree_map_with_path(draw, shapes)


def named(params: Any, name_map: str) -> dict[str, np.ndarray]:
    """Give a tree the names and axes of files."""
    return dict(export_params(params, name_map).tensors)


def peer(config: dict[str, Any], params: Any) -> Any:
    """Make diffusers' network with these parameters, and the epsilons of the original."""
    import diffusers
    import torch

    module = diffusers.UNetSpatioTemporalConditionModel(**config)
    weights = named(params, "unet_diffusers")
    tensors = {name: torch.from_numpy(array.copy()) for name, array in weights.items()}
    module.load_state_dict(tensors, strict=True)
    for name, layer in module.named_modules():
        if isinstance(layer, torch.nn.GroupNorm):
            layer.eps = 1e-6 if ".attentions." in name else 1e-5
    return module


def run_diffusers(params: Any) -> dict[str, np.ndarray]:
    """Compute the output [b t h w c], and the gradients of x and of every parameter."""
    import torch

    module, drawn = peer(CONFIG, params), inputs()
    tensors = {name: torch.from_numpy(array) for name, array in drawn.items()}
    x = tensors["x"].permute(0, 1, 4, 2, 3).requires_grad_()
    output = module(x, tensors["t"], tensors["context"], tensors["time_ids"]).sample
    output = output.permute(0, 1, 3, 4, 2)
    (output * tensors["cotangent"]).sum().backward()
    assert x.grad is not None
    result = {"output": output.detach().numpy(), "x": x.grad.permute(0, 1, 3, 4, 2).numpy()}
    gradients = {name: p.grad.numpy() for name, p in module.named_parameters()}
    released = zip(named(params, "unet_ldm"), named(params, "unet_diffusers"), strict=True)
    return result | {name: gradients[theirs] for name, theirs in released}


def run_ours(module: VideoUNet, params: Any) -> dict[str, np.ndarray]:
    """Compute the same with our network."""
    drawn = {name: jnp.asarray(array) for name, array in inputs().items()}

    def loss(params: Any, x: Any) -> Any:
        arguments = x, drawn["t"], drawn["context"], drawn["y"]
        output = module.apply({"params": params}, *arguments)
        return jnp.sum(output * drawn["cotangent"]), output

    options = {"xla_backend_optimization_level": 0}  # it runs once
    gradient = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True), compiler_options=options)
    (grads, x), output = gradient(params, drawn["x"])
    return {"output": np.asarray(output), "x": np.asarray(x)} | named(grads, "unet_ldm")


def main() -> None:
    results = run_diffusers(drawn_params(VideoUNet(**FIELDS)))
    np.savez_compressed(FIXTURE, **{k: results[k] for k in ("output", "x", *RECORDED)})


if __name__ == "__main__":
    main()
