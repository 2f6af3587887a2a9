"""Time a denoising step and the decoding of a clip, here and in diffusers, in alternating rounds.

python benchmarks/video_speed.py --peer_python=PYTHON    # one that has torch and diffusers
python benchmarks/video_speed.py --no_peer               # our side alone
python benchmarks/video_speed.py --nets=clip_decode,clip_chunks --rounds=1 --repeats=1    # memory

Both sides have the same random networks: Stable Video Diffusion with fewer channels, levels and
pixels. Their numbers of parameters must be equal. "full" has the released sizes, for a GPU.
"decode" decodes a whole clip, "chunks" a few frames at a time: here they overlap, in diffusers
(decode_chunk_size) they do not. The peak memory is of the whole process, with all that it loaded;
"temporaries" is what our compiled program allocates while it runs.
"""

import sys
from typing import Any, NamedTuple

import paired


class Sizes(NamedTuple):
    """A network of each part with the shape of its input [b t h w c].

    decoder: with num_res_blocks = 2, because in diffusers the middle has as many, and here two.
    chunk: how many frames of a clip the decoder sees at a time, in "chunks".
    """

    unet: dict[str, Any]
    latents: tuple[int, ...]
    decoder: dict[str, Any]
    decoded: tuple[int, ...]
    chunk: int = 4


# What all UNets of the family have in common.
_UNET = {
    "out_channels": 4,
    "use_linear_in_transformer": True,
    "num_classes": "sequential",
    "use_spatial_context": True,
    "extra_ff_mix_layer": True,
    "merge_strategy": "learned_with_images",
    "video_kernel_size": (3, 1, 1),
}
SIZES = {
    "tiny": Sizes(
        {
            **_UNET,
            "model_channels": 64,
            "channel_mult": (1, 2, 4),
            "num_res_blocks": 1,
            "attention_resolutions": (4, 2),
            "num_head_channels": 32,
            "context_dim": 128,
            "adm_in_channels": 3 * 64,
        },
        (2, 6, 16, 16, 8),
        {"ch": 64, "ch_mult": (1, 2, 2), "num_res_blocks": 2, "video_kernel_size": (3, 1, 1)},
        (1, 6, 16, 16, 4),
    ),
    # No UNet, and a decoder whose memory grows with its frames.
    "clip": Sizes(
        {},
        (),
        {"ch": 64, "ch_mult": (1, 2, 2), "num_res_blocks": 2, "video_kernel_size": (3, 1, 1)},
        (1, 14, 32, 32, 4),
        chunk=7,
    ),
    "full": Sizes(
        {
            **_UNET,
            "model_channels": 320,
            "channel_mult": (1, 2, 4, 4),
            "num_res_blocks": 2,
            "attention_resolutions": (4, 2, 1),
            "num_head_channels": 64,
            "context_dim": 1024,
            "adm_in_channels": 3 * 64,
        },
        (2, 14, 72, 128, 8),
        {"ch": 128, "ch_mult": (1, 2, 4, 4), "num_res_blocks": 2, "video_kernel_size": (3, 1, 1)},
        (1, 14, 72, 128, 4),
    ),
}
TABLE = {
    f"{size}_{part}": paired.Net("", 1)
    for size, sizes in SIZES.items()
    for part in (*(["step"] if sizes.unet else []), "decode", "chunks")
}


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    """Compare every network of --nets; returns the numbers that were printed."""
    arguments = paired.parse(argv, __doc__.splitlines()[0], nets="tiny_step,tiny_decode",
                             table=TABLE)  # fmt: skip
    return [compare(name, arguments) for name in arguments.nets]


def compare(name: str, arguments: Any) -> dict[str, Any]:
    """Time one network in turns and print the comparison; returns the numbers.

    Raises ValueError when the two networks differ in size.
    """
    size, _, part = name.rpartition("_")
    sizes = SIZES[size]
    fields, shape = (
        (sizes.unet, sizes.latents) if part == "step" else (sizes.decoder, sizes.decoded)
    )
    specification = {
        "config": " x ".join(map(str, shape)),
        "batch_size": shape[0] * shape[1],
        "work": part,
        "part": "step" if part == "step" else "decode",
        "fields": fields,
        "shape": shape,
        "chunk": sizes.chunk if part == "chunks" else None,
        "threads": arguments.threads,
        "device": arguments.device,
        "dtype": arguments.dtype,
        "compile": arguments.compile,
    }
    sides = [paired.Side(sys.executable, "side_video_jax.py", specification)]
    try:
        if not arguments.no_peer:
            theirs = {**specification, "network": sides[0].report["network"]}
            sides.append(paired.Side(arguments.peer_python, "side_video_torch.py", theirs))
            paired.same_size(*(side.report["parameters"] for side in sides))
        paired.alternate(sides, arguments.rounds, arguments.repeats)
    finally:
        for side in sides:
            side.close()
    print(paired.describe(name, arguments, specification, sides))
    print(f"  our temporaries     {sides[0].report['temporaries'] / 2**20:.0f} MiB", flush=True)
    return {"ratio": paired.ratios(*sides) if len(sides) == 2 else None, "ours": sides[0].rounds}


if __name__ == "__main__":
    main()
