"""Record what the UNet's default tests compare with, so that they need neither torch nor diffusers.

    python tests/support/unet_fixtures.py --keys DIR    # unet_names.npz: what released UNets hold
    python tests/support/unet_fixtures.py --diffusers   # unet_diffusers.npz: what CASES compute

DIR holds unet_NAME.txt, one "parameter shape" per line. Weights and inputs of CASES are never
stored: both sides draw them from `numbers`, seeded by the parameter's released name.
"""

import argparse
import lzma
import re
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

FIXTURES = Path(__file__).parents[1] / "fixtures"
LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}
BATCH, SIZE, TOKENS = 2, 8, 5


class Case(NamedTuple):
    """The same network twice: fields of our UNet, and class and config of diffusers' network."""

    fields: dict[str, Any]
    kind: str
    config: dict[str, Any]
    y: str | None = None


COMMON = {
    "model_channels": 32,
    "channel_mult": (1, 2),
    "num_res_blocks": 1,
    "num_groups": 8,
    "out_channels": 3,
}
THEIRS = {
    "sample_size": SIZE,
    "in_channels": 3,
    "out_channels": 3,
    "layers_per_block": 1,
    "block_out_channels": (32, 64),
    "norm_num_groups": 8,
    "norm_eps": 1e-5,
}
CROSS = {
    **THEIRS,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 24,
}
CROSS_LAST = {
    **CROSS,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
}
TRANSFORMER = COMMON | {
    "use_spatial_transformer": True,
    "attention_resolutions": (1,),
    "context_dim": 24,
    "num_heads": 4,
}
# diffusers reads attention_head_dim as the number of heads in UNet2DConditionModel.
CASES = {
    "conv_projection": Case(TRANSFORMER, "condition", CROSS | {"attention_head_dim": 4}),
    "linear_projection_depth_2": Case(
        TRANSFORMER
        | {
            "attention_resolutions": (2,),
            "transformer_depth": (1, 2),
            "use_linear_in_transformer": True,
            "num_heads": -1,
            "num_head_channels": 16,
            "num_classes": "sequential",
            "adm_in_channels": 12 + 6 * 4,
        },
        "condition",
        CROSS_LAST
        | {
            "attention_head_dim": (2, 4),
            "transformer_layers_per_block": (1, 2),
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 4,
            "projection_class_embeddings_input_dim": 12 + 6 * 4,
        },
        "text_time",
    ),
    "labels_only_cross_attention": Case(
        TRANSFORMER | {"num_classes": 10, "disable_self_attentions": (True, False)},
        "condition",
        CROSS
        | {
            "attention_head_dim": 4,
            "num_class_embeds": 10,
            "only_cross_attention": (True, False),
            "mid_block_only_cross_attention": False,
        },
        "labels",
    ),
    "continuous_class": Case(
        TRANSFORMER | {"num_classes": "continuous"},
        "condition",
        CROSS
        | {
            "attention_head_dim": 4,
            "class_embed_type": "simple_projection",
            "projection_class_embeddings_input_dim": 1,
        },
        "number",
    ),
    "timestep_class_scale_shift": Case(
        TRANSFORMER | {"num_classes": "timestep", "use_scale_shift_norm": True},
        "condition",
        CROSS
        | {
            "attention_head_dim": 4,
            "class_embed_type": "timestep",
            "resnet_time_scale_shift": "scale_shift",
        },
        "number",
    ),
    "attention_block": Case(
        COMMON | {"attention_resolutions": (2,), "num_heads": -1, "num_head_channels": 16},
        "plain",
        THEIRS
        | {
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
            "attention_head_dim": 16,
        },
    ),
    "adm_resblock_updown": Case(
        COMMON
        | {
            "num_res_blocks": 2,
            "use_scale_shift_norm": True,
            "resblock_updown": True,
            "num_heads": -1,
            "num_head_channels": 16,
        },
        "plain",
        THEIRS
        | {
            "layers_per_block": 2,
            "down_block_types": ("ResnetDownsampleBlock2D",) * 2,
            "up_block_types": ("ResnetUpsampleBlock2D",) * 2,
            "resnet_time_scale_shift": "scale_shift",
            "attention_head_dim": 16,
            # Without it diffusers leaves the norm of the middle attention out.
            "attn_norm_num_groups": 8,
        },
    ),
}
# Gradients of these are recorded too; a few kB.
RECORDED = (
    "time_embed.0.bias",
    "input_blocks.0.0.weight",
    "input_blocks.1.0.emb_layers.1.bias",
    "middle_block.0.in_layers.0.weight",
    "output_blocks.1.0.out_layers.0.bias",
    "out.2.weight",
)


def numbers(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Draw the float32 numbers of a name: RandomState keeps its stream between NumPy versions."""
    normal = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
    if len(shape) > 1 and name.endswith("weight"):
        normal *= np.prod(shape[1:]) ** -0.5
    elif name.endswith("weight"):
        normal = 1.0 + 0.3 * normal
    elif name.endswith("bias"):
        normal *= 0.3
    return normal.astype(np.float32)


def inputs(case: Case) -> dict[str, Any]:
    """Draw x [b h w c], t [b], context [b l d], y and the cotangent of the output."""
    drawn: dict[str, Any] = {
        "x": numbers("x", (BATCH, SIZE, SIZE, 3)),
        "t": np.array([7, 613], np.int32),
        "cotangent": numbers("cotangent", (BATCH, SIZE, SIZE, 3)),
        "context": None,
        "y": None,
    }
    if case.kind == "condition":
        drawn["context"] = numbers("context", (BATCH, TOKENS, 24))
    if case.y == "labels":
        drawn["y"] = np.array([3, 9], np.int32)
    elif case.y == "number":
        drawn["y"] = np.array([0.25, 17.5], np.float32)
    elif case.y == "text_time":
        time_ids = np.arange(BATCH * 6, dtype=np.float32).reshape(BATCH, 6) * 9.0
        drawn |= {"text": numbers("text", (BATCH, 12)), "time_ids": time_ids}
        half = np.exp(-np.log(10000.0) * np.arange(2) / 2)
        angles = time_ids[..., None] * half
        waves = np.concatenate([np.cos(angles), np.sin(angles)], -1).reshape(BATCH, 24)
        drawn["y"] = np.concatenate([drawn["text"], waves], -1).astype(np.float32)
    return drawn


def released_name(path: tuple[Any, ...], shape: tuple[int, ...]) -> tuple[str, tuple[int, ...]]:
    """Give the released name and shape of our parameter: input_blocks_1_0 is input_blocks.1.0."""
    *modules, leaf = [entry.key for entry in path]
    name = re.sub(r"_(\d+)", r".\1", ".".join(modules)) + f".{LEAVES.get(leaf, leaf)}"
    return name, (shape[-1], shape[-2], *shape[:-2]) if leaf == "kernel" else shape


def to_ours(array: np.ndarray, leaf: str) -> np.ndarray:
    """Move a released array's output and input axes from the front to the back."""
    if leaf != "kernel":
        return array
    return np.moveaxis(np.moveaxis(array, 0, -1), 0, -2)


def released_block_names(case: Case) -> list[tuple[str, str]]:
    """Pairs of (diffusers' prefix, released prefix)."""
    blocks, levels = case.fields["num_res_blocks"] + 1, len(case.fields["channel_mult"])
    up_down = case.fields.get("resblock_updown", False)
    pairs = [
        ("conv_in.", "input_blocks.0.0."),
        ("time_embedding.linear_1.", "time_embed.0."),
        ("time_embedding.linear_2.", "time_embed.2."),
        ("time_embedding.cond_proj.", "time_embed_cond_proj."),
        ("add_embedding.linear_1.", "label_emb.0.0."),
        ("add_embedding.linear_2.", "label_emb.0.2."),
        ("class_embedding.linear_1.", "label_emb.1.0."),
        ("class_embedding.linear_2.", "label_emb.1.2."),
        ("class_embedding.", "label_emb."),
        ("conv_norm_out.", "out.0."),
        ("conv_out.", "out.2."),
        ("mid_block.resnets.0.", "middle_block.0."),
        ("mid_block.attentions.0.", "middle_block.1."),
        ("mid_block.resnets.1.", "middle_block.2."),
    ]
    for i in range(levels):
        for j in range(blocks):
            down, up = f"input_blocks.{1 + i * blocks + j}", f"output_blocks.{i * blocks + j}"
            pairs += [
                (f"down_blocks.{i}.resnets.{j}.", f"{down}.0."),
                (f"down_blocks.{i}.attentions.{j}.", f"{down}.1."),
                (f"up_blocks.{i}.resnets.{j}.", f"{up}.0."),
                (f"up_blocks.{i}.attentions.{j}.", f"{up}.1."),
            ]
        attends = 2 ** (levels - 1 - i) in case.fields.get("attention_resolutions", ())
        down = f"input_blocks.{(i + 1) * blocks}.0"
        up = f"output_blocks.{(i + 1) * blocks - 1}.{2 if attends else 1}"
        pairs += [
            (f"down_blocks.{i}.downsamplers.0.", f"{down}." if up_down else f"{down}.op@"),
            (f"up_blocks.{i}.upsamplers.0.", f"{up}."),
        ]
    return pairs


INNER = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
    "group_norm": "norm",
    "to_out.0": "proj_out",
}


def to_released(name: str, case: Case) -> str:
    """Translate one of diffusers' parameter names; split q, k and v keep a name each."""
    theirs, ours = next(pair for pair in released_block_names(case) if name.startswith(pair[0]))
    module, leaf = name[len(theirs) :].rpartition(".")[::2]
    if ours.endswith("@"):  # a convolution that diffusers wraps once more
        return f"{ours[:-1]}.{leaf}"
    return f"{ours}{INNER.get(module, module)}.{leaf}".replace("..", ".")


def drawn_weights(module: Any, case: Case) -> dict[str, np.ndarray]:
    """Draw every parameter of diffusers' module by its released name, split where it is split."""
    weights = {}
    for name, parameter in module.named_parameters():
        released, shape = to_released(name, case), tuple(parameter.shape)
        match = re.search(r"\.to_([qkv])\.(weight|bias)$", released)
        if case.kind == "condition" or not match:
            # Ours is a 1 x 1 convolution where diffusers has a dense layer.
            tall = case.kind == "plain" and re.search(r"\.1\.proj_out\.weight$", released)
            drawn = numbers(released, (*shape, 1) if tall else shape)
        else:
            qkv = released[: match.start()] + f".qkv.{match[2]}"
            whole = numbers(qkv, (3 * shape[0], *shape[1:], *([1] if len(shape) > 1 else [])))
            heads = shape[0] // case.fields["num_head_channels"]
            drawn = whole.reshape(heads, 3, -1, *shape[1:])[:, "qkv".index(match[1])]
        weights[name] = drawn.reshape(shape)
    return weights


def run_diffusers(case: Case) -> dict[str, np.ndarray]:
    """Compute the output [b h w c] and the gradients of x and of every parameter."""
    import diffusers
    import torch

    classes = {"condition": diffusers.UNet2DConditionModel, "plain": diffusers.UNet2DModel}
    module = classes[case.kind](**case.config)
    weights = drawn_weights(module, case)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(torch.from_numpy(weights[name]))
    drawn = inputs(case)
    tensors = {k: v if v is None else torch.from_numpy(v) for k, v in drawn.items()}
    x = tensors["x"].permute(0, 3, 1, 2).requires_grad_()
    kwargs: dict[str, Any] = {}
    if case.kind == "condition":
        kwargs["encoder_hidden_states"] = tensors["context"]
    if case.y == "text_time":
        extra = {"text_embeds": tensors["text"], "time_ids": tensors["time_ids"]}
        kwargs["added_cond_kwargs"] = extra
    elif case.y is not None:
        flat = case.config.get("class_embed_type") != "simple_projection"
        kwargs["class_labels"] = tensors["y"] if flat else tensors["y"][:, None]
    output = module(x, tensors["t"], **kwargs).sample.permute(0, 2, 3, 1)
    (output * tensors["cotangent"]).sum().backward()
    assert x.grad is not None
    result = {"output": output.detach().numpy(), "x": x.grad.permute(0, 2, 3, 1).numpy()}
    for name, parameter in module.named_parameters():
        if parameter.grad is not None:
            result[to_released(name, case)] = parameter.grad.numpy()
    return result if case.kind == "condition" else join_qkv(result, case)


def join_qkv(arrays: dict[str, np.ndarray], case: Case) -> dict[str, np.ndarray]:
    """Join to_q, to_k and to_v of attention blocks in the order (head, q k v, channel)."""
    joined = {}
    for name, array in arrays.items():
        if ".to_" not in name:
            joined[name] = array
        elif ".to_q." in name:
            heads = array.shape[0] // case.fields["num_head_channels"]
            parts = [arrays[name.replace(".to_q.", f".to_{part}.")] for part in "qkv"]
            split = [part.reshape(heads, 1, -1, *part.shape[1:]) for part in parts]
            whole = np.concatenate(split, 1).reshape(-1, *array.shape[1:])
            joined[name.replace(".to_q.", ".qkv.")] = whole
    return joined


def write_names(keys: Path, names: list[str]) -> None:
    """Pack the lists of names and shapes of released UNets."""
    text = "\n".join(
        line if line[0] != "#" else f"# {name}"
        for name in names
        for line in (keys / f"unet_{name}.txt").read_text().splitlines()
    )
    packed = np.frombuffer(lzma.compress(text.encode()), np.uint8)
    np.savez(FIXTURES / "unet_names.npz", lines=packed)


def read_names() -> dict[str, dict[str, tuple[int, ...]]]:
    """Unpack them: {network: {parameter: shape}}."""
    with np.load(FIXTURES / "unet_names.npz") as packed:
        text = lzma.decompress(packed["lines"].tobytes()).decode()
    networks: dict[str, dict[str, tuple[int, ...]]] = {}
    for line in text.splitlines():
        name, last = line.split()
        if name == "#":
            current = networks[last] = {}
        else:
            current[name] = tuple(int(side) for side in last.split("x"))
    return networks


RELEASED = (
    "sd1_v1-inference",
    "sd21",
    "sd2_v2-inpainting-inference",
    "sd2_x4-upscaling",
    "sdxl_base",
    "sdxl_refiner",
    "ldm_cin256-v2",
    "ldm_txt2img-1p4B-eval",
    "imagenet_f8",
    "toy_mnist_cond",
    "svd",
    "sv3d_u",
    "sv3d_p",
    "sv4d",
    "sv4d2",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--keys", type=Path, help="folder of unet_NAME.txt")
    parser.add_argument("--diffusers", action="store_true", help="run diffusers on CASES")
    arguments = parser.parse_args()
    FIXTURES.mkdir(exist_ok=True)
    if arguments.keys:
        write_names(arguments.keys, list(RELEASED))
    if arguments.diffusers:
        recorded = {
            f"{name}/{key}": value
            for name, case in CASES.items()
            for key, value in run_diffusers(case).items()
            if key in ("output", "x", *RECORDED)
        }
        np.savez_compressed(FIXTURES / "unet_diffusers.npz", **recorded)


if __name__ == "__main__":
    main()
