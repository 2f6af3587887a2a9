"""The autoencoder against diffusers' AutoencoderKL and VQModel: outputs and every gradient.

Every weight is random and none is zero. diffusers writes 1 x 1 convolutions of the attention as
dense layers and counts the levels of its decoder from the lowest resolution.
"""

import re
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.models.autoencoder import Autoencoder

pytestmark = pytest.mark.parity

TINY = {
    "ch": 8,
    "ch_mult": (1, 2, 2),
    "num_res_blocks": 1,
    "num_groups": 4,
    "resolution": 16,
    "z_channels": 3,
    "embed_dim": 3,
}
THEIRS = {
    "block_out_channels": (8, 16, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "latent_channels": 3,
    "sample_size": 16,
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
}
ATTENTION = {
    "down_block_types": ("DownEncoderBlock2D", "AttnDownEncoderBlock2D", "DownEncoderBlock2D"),
    "up_block_types": ("UpDecoderBlock2D", "AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
}
# Our fields, diffusers' class, its config.
CASES = {
    "kl": (TINY, "AutoencoderKL", THEIRS),
    "no_quant_conv": (
        TINY | {"use_quant_conv": False, "num_res_blocks": 2},
        "AutoencoderKL",
        THEIRS | {"use_quant_conv": False, "use_post_quant_conv": False, "layers_per_block": 2},
    ),
    "no_attention": (
        TINY | {"attn_type": "none"},
        "AutoencoderKL",
        THEIRS | {"mid_block_add_attention": False},
    ),
    "vq_with_attention": (
        TINY | {"double_z": False, "attn_resolutions": (8,), "embed_dim": 2},
        "VQModel",
        THEIRS | ATTENTION | {"vq_embed_dim": 2, "num_vq_embeddings": 7},
    ),
}
INNER = {
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
    "conv_shortcut": "nin_shortcut",
}


def our_path(name, levels):
    """Translate one of diffusers' parameter names into the path of ours."""
    for theirs, ours in INNER.items():
        name = name.replace(f".{theirs}.", f".{ours}.")
    name = re.sub(r"down_blocks\.(\d+)\.resnets\.(\d+)", r"down_\1_block_\2", name)
    name = re.sub(r"down_blocks\.(\d+)\.attentions\.(\d+)", r"down_\1_attn_\2", name)
    name = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down_\1_downsample", name)
    up = lambda m: f"up_{levels - 1 - int(m[1])}"
    name = re.sub(r"up_blocks\.(\d+)\.resnets\.(\d+)", lambda m: f"{up(m)}_block_{m[2]}", name)
    name = re.sub(r"up_blocks\.(\d+)\.attentions\.(\d+)", lambda m: f"{up(m)}_attn_{m[2]}", name)
    name = re.sub(r"up_blocks\.(\d+)\.upsamplers\.0", lambda m: f"{up(m)}_upsample", name)
    name = re.sub(r"mid_block\.resnets\.([01])", lambda m: f"mid_block_{int(m[1]) + 1}", name)
    name = name.replace("mid_block.attentions.0", "mid_attn_1")
    return tuple(name.replace("conv_norm_out", "norm_out").split("."))


def numbers(name, shape):
    normal = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
    if len(shape) > 1:
        normal *= np.prod(shape[1:]) ** -0.5
    else:
        normal = 0.3 * normal + name.endswith("weight")
    return normal.astype(np.float32)


def to_tree(arrays, levels):
    """Build our parameter tree from {diffusers' name: array}."""
    tree = {}
    for name, array in arrays.items():
        *modules, leaf = our_path(name, levels)
        if leaf == "weight":
            leaf = "scale" if array.ndim == 1 else "kernel"
        if leaf == "kernel":
            array = array if array.ndim == 4 else array[:, :, None, None]
            array = array.transpose(2, 3, 1, 0)
        node = tree
        for module in modules:
            node = node.setdefault(module, {})
        node[leaf] = jnp.asarray(array)
    return tree


def run_diffusers(kind, config, image, cotangents):
    """Outputs, gradients of image and parameters of sum(moments c1 + decode(half of them) c2)."""
    diffusers = pytest.importorskip("diffusers")
    import torch

    module = getattr(diffusers, kind)(**config)
    named = {k: p for k, p in module.named_parameters() if not k.startswith("quantize.")}
    with torch.no_grad():
        for name, parameter in named.items():
            parameter.copy_(torch.from_numpy(numbers(name, tuple(parameter.shape))))
    first = lambda a: a.permute(0, 3, 1, 2)
    last = lambda a: a.permute(0, 2, 3, 1)
    x = first(torch.from_numpy(image)).requires_grad_()
    if kind == "VQModel":
        moments = module.encode(x).latents
        decoded = module.decode(moments, force_not_quantize=True).sample
    else:
        moments = module.encode(x).latent_dist.parameters
        decoded = module.decode(moments.chunk(2, 1)[0]).sample
    pairs = zip((moments, decoded), cotangents, strict=True)
    sum((last(a) * torch.from_numpy(c)).sum() for a, c in pairs).backward()
    outputs = [last(a).detach().numpy() for a in (moments, decoded, x.grad)]
    weights = {name: p.detach().numpy() for name, p in named.items()}
    return outputs, weights, {name: p.grad.numpy() for name, p in named.items()}


@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients_are_those_of_diffusers(name):
    fields, kind, config = CASES[name]
    module, levels = Autoencoder(**fields), len(fields["ch_mult"])
    d = module.embed_dim
    image = numbers("image", (2, 16, 24, 3)) * 10
    moments_shape = (2, 4, 6, 2 * d if module.double_z else d)
    cotangents = numbers("moments", moments_shape), numbers("decoded", image.shape)
    theirs, weights, their_grads = run_diffusers(kind, config, image, cotangents)

    params = to_tree(weights, levels)
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.asarray(image))["params"]
    assert jax.tree.map(lambda a: a.shape, params) == jax.tree.map(lambda a: a.shape, shapes)

    def loss(params, image):
        moments = module.apply({"params": params}, image, method="encode")
        decoded = module.apply({"params": params}, moments[..., :d], method="decode")
        total = jnp.sum(moments * cotangents[0]) + jnp.sum(decoded * cotangents[1])
        return total, (moments, decoded)

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))
    (grads, image_grad), outputs = gradient(params, jnp.asarray(image))
    errors = {}
    for key, ours, their in zip(
        ("moments", "decoded", "image"), (*outputs, image_grad), theirs, strict=True
    ):
        errors[key] = np.abs(ours - their).max() / np.abs(their).max()
    # Some gradients are zero but for rounding, that of the keys' bias, say.
    their_tree = to_tree(their_grads, levels)
    floor = 0.01 * max(np.abs(leaf).max() for leaf in jax.tree.leaves(their_tree))

    def compare(path, ours, their):
        error = np.abs(ours - their).max() / max(np.abs(their).max(), floor)
        errors[jax.tree_util.keystr(path)] = error

    jax.tree_util.tree_map_with_path(compare, grads, their_tree)
    worst = max(errors, key=errors.get)
    shown = ", ".join(f"{k} {errors[k]:.1e}" for k in ("moments", "decoded", "image"))
    print(f"{shown}, worst {worst} {errors[worst]:.1e}")
    assert errors[worst] < 1e-4, (worst, errors[worst])
