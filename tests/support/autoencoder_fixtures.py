"""Record what the autoencoder's default tests compare with, so that they need no torch.

    python tests/support/autoencoder_fixtures.py --keys DIR    # autoencoder_names.txt.xz
    python tests/support/autoencoder_fixtures.py --diffusers   # autoencoder_diffusers.npz: RECORDED

DIR holds NAME.txt of the released networks NAMES, one "parameter shape" per line. Weights and
inputs of CASES are never stored: both sides draw them from `numbers`, seeded by a name.
"""

import argparse
import lzma
import re
import zlib
from pathlib import Path
from typing import Any

import numpy as np

FIXTURES = Path(__file__).parents[1] / "fixtures"
NAMES = (
    "ae_imagenet-attnfree-logvar_dec",
    "ae_imagenet-attnfree-logvar_enc",
    "ae_imagenet-kl_f8_8chn_dec",
    "ae_imagenet-kl_f8_8chn_enc",
    "vae_klf8_decoder",
    "vae_klf8_encoder",
    "vae_svd_videodecoder",
    "disc_nlayer3",
)
SIDES = 16, 24
TINY = {
    "ch": 8,
    "ch_mult": (1, 2, 2),
    "num_res_blocks": 1,
    "num_groups": 4,
    "resolution": SIDES[0],
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
# The outputs of these are recorded, for the first sample.
RECORDED = ("kl", "vq_with_attention")
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


def numbers(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Draw the float32 numbers of a name: RandomState keeps its stream between NumPy versions."""
    normal = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
    if len(shape) > 1:
        normal *= np.prod(shape[1:]) ** -0.5
    else:
        normal = 0.3 * normal + name.endswith("weight")
    return normal.astype(np.float32)


def inputs(fields: dict[str, Any]) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray]]:
    """Draw an image [b h w 3], and the cotangents of the moments and of the decoded image."""
    parts = 2 if fields.get("double_z", True) else 1
    factor = 2 ** (len(fields["ch_mult"]) - 1)
    latent = (2, SIDES[0] // factor, SIDES[1] // factor, parts * fields["embed_dim"])
    image = numbers("image", (2, *SIDES, 3)) * 10
    return image, (numbers("moments", latent), numbers("decoded", image.shape))


def drawn_tree(shapes: Any, path: tuple[str, ...] = ()) -> Any:
    """Draw a parameter tree of ours, given as nested dicts of shapes; PyTorch's layout is drawn."""
    if isinstance(shapes, dict):
        return {key: drawn_tree(shapes[key], (*path, key)) for key in shapes}
    leaf = {"kernel": "weight", "scale": "weight"}.get(path[-1], path[-1])
    name = ".".join((*path[:-1], leaf))
    if len(shapes) == 1:
        return numbers(name, shapes)
    return numbers(name, (shapes[3], shapes[2], *shapes[:2])).transpose(2, 3, 1, 0)


def to_tree(arrays: dict[str, np.ndarray], levels: int) -> dict[str, Any]:
    """Build our parameter tree from {diffusers' name: array}."""
    tree: dict[str, Any] = {}
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
        node[leaf] = array
    return tree


def run_diffusers(
    fields: dict[str, Any], kind: str, config: dict[str, Any]
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Compute what sum(moments c1 + decode(half of them) c2) gives: outputs, and all gradients.

    Returns {"moments", "decoded", "image" (its gradient)} and a tree of parameter gradients.
    """
    import diffusers
    import torch

    image, cotangents = inputs(fields)
    levels = len(fields["ch_mult"])
    module = getattr(diffusers, kind)(**config)
    named = {k: p for k, p in module.named_parameters() if not k.startswith("quantize.")}
    with torch.no_grad():
        for name, parameter in named.items():
            drawn = numbers(".".join(our_path(name, levels)), tuple(parameter.shape))
            parameter.copy_(torch.from_numpy(drawn))
    x = torch.from_numpy(image).permute(0, 3, 1, 2).requires_grad_()
    if kind == "VQModel":
        moments = module.encode(x).latents
        decoded = module.decode(moments, force_not_quantize=True).sample
    else:
        moments = module.encode(x).latent_dist.parameters
        decoded = module.decode(moments.chunk(2, 1)[0]).sample
    pairs = zip((moments, decoded), cotangents, strict=True)
    sum((a.permute(0, 2, 3, 1) * torch.from_numpy(c)).sum() for a, c in pairs).backward()
    results = {"moments": moments, "decoded": decoded, "image": x.grad}
    outputs = {k: a.detach().permute(0, 2, 3, 1).numpy() for k, a in results.items()}
    return outputs, to_tree({name: p.grad.numpy() for name, p in named.items()}, levels)


def write_names(keys: Path) -> None:
    """Pack the lists of names and shapes of released networks."""
    lists = {name: (keys / f"{name}.txt").read_text().splitlines()[1:] for name in NAMES}
    text = "".join("\n".join([f"# {name}", *lines, ""]) for name, lines in lists.items())
    (FIXTURES / "autoencoder_names.txt.xz").write_bytes(lzma.compress(text.encode()))


def read_names() -> dict[str, dict[str, tuple[int, ...]]]:
    """Unpack them: {network: {parameter: shape}}."""
    networks: dict[str, dict[str, tuple[int, ...]]] = {}
    packed = (FIXTURES / "autoencoder_names.txt.xz").read_bytes()
    for line in lzma.decompress(packed).decode().splitlines():
        name, _, last = line.partition(" ")
        if name == "#":
            current = networks[last] = {}
        else:
            current[name] = tuple(int(side) for side in last.split("x")) if last else ()
    return networks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--keys", type=Path, help="folder of NAME.txt")
    parser.add_argument("--diffusers", action="store_true", help="run diffusers on RECORDED")
    arguments = parser.parse_args()
    if arguments.keys:
        write_names(arguments.keys)
    if arguments.diffusers:
        recorded = {
            f"{name}/{key}": value[:1]
            for name in RECORDED
            for key, value in run_diffusers(*CASES[name])[0].items()
            if key != "image"
        }
        np.savez_compressed(FIXTURES / "autoencoder_diffusers.npz", **recorded)


if __name__ == "__main__":
    main()
