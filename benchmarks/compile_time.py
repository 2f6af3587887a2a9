"""Measure what it costs to compile SDXL with scanned and with unrolled transformer blocks.

python benchmarks/compile_time.py                              # full size, traced and lowered only
python benchmarks/compile_time.py --width=32 --compile --run   # full depth, compiled and timed
python benchmarks/compile_time.py --device=gpu --compile --run --batch_size=4

Both layouts of configs/sdxl.py go through the same stages, each in a process of its own: building
the experiment with its checks of shapes, tracing, lowering to StableHLO, compiling. With --run they
then take turns. "forward" is one evaluation of the network at --latents, "train" the whole training
step, with first stage, text encoders, AdamW and EMA.
"""

import argparse
import os
import statistics
import sys
from typing import Any

import paired

STAGES = ("build", "trace", "lower", "compile")
LAYOUTS = {"unrolled": False, "scanned": True}
PIXELS_PER_LATENT = 8


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Parse the options; --programs and --layouts become lists."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    flag = parser.add_argument
    flag("--config", default="configs/sdxl.py")
    flag("--programs", default="forward,train", help="comma-separated")
    flag("--layouts", default="unrolled,scanned", help="comma-separated")
    flag("--width", type=int, help="model_channels; also shrinks the frozen networks' widths")
    flag("--latents", type=int, default=128, help="side of the latents")
    flag("--batch_size", type=int, default=2)
    flag("--remat", choices=["true", "false"], help="default: the config's")
    flag("--dtype", choices=["float32", "bfloat16"], help="of the network; default: the config's")
    flag("--compile", action="store_true", help="compile as well")
    flag("--run", action="store_true", help="and run, taking turns; needs --compile")
    flag("--rounds", type=int, default=5, help="alternations")
    flag("--repeats", type=int, default=1, help="runs in a row of one layout")
    flag("--threads", type=int, default=len(os.sched_getaffinity(0)))
    flag("--device", default="cpu", choices=["cpu", "gpu"])
    arguments = parser.parse_args(argv)
    for name, known in (("programs", ("forward", "train")), ("layouts", tuple(LAYOUTS))):
        chosen = getattr(arguments, name).split(",")
        unknown = [item for item in chosen if item not in known]
        if unknown:
            parser.error(f"--{name}: {unknown[0]!r} is unknown; choose from {', '.join(known)}")
        setattr(arguments, name, chosen)
    if arguments.run and not arguments.compile:
        parser.error("--run needs --compile")
    return arguments


def specify(arguments: argparse.Namespace, program: str, layout: str) -> dict[str, Any]:
    """Return the specification from which side_stages.py builds."""
    model: dict[str, Any] = {"scan": LAYOUTS[layout]}
    embedders: dict[str, dict[str, Any]] = {}
    image_size = arguments.latents * PIXELS_PER_LATENT
    overrides = [
        f"--config.data.batches.image_size={image_size}",
        f"--config.train.batch_size={arguments.batch_size}",
    ]
    if arguments.dtype:
        model["dtype"] = arguments.dtype
    if arguments.remat:
        model["remat"] = arguments.remat == "true"
    if arguments.width:
        # Depths stay; the frozen networks become as narrow as they can be.
        overrides.append("--config.first_stage.ch=32")
        tower = {"width": 32, "num_heads": 2, "mlp_dim": 64}
        embedders = {"clip": tower, "open_clip": tower | {"projection_dim": 32}}
        sizes = ("original_size", "crop_top_left", "target_size")
        embedders |= {name: {"outdim": 16} for name in sizes}
        model |= {"model_channels": arguments.width, "num_head_channels": min(64, arguments.width)}
        model |= {"context_dim": 64, "adm_in_channels": 32 + 2 * 16 * len(sizes)}
    common = {name: getattr(arguments, name) for name in ("config", "latents", "batch_size")}
    common |= {name: getattr(arguments, name) for name in ("compile", "run", "threads", "device")}
    return {
        **common,
        "overrides": overrides,
        "model": model,
        "embedders": embedders,
        "program": program,
    }


def measure(arguments: argparse.Namespace, program: str) -> list[dict[str, Any]]:
    """Build one program in every layout and run them in turns; returns the printed rows."""
    sides: list[paired.Side] = []
    rows = []
    try:
        for layout in arguments.layouts:
            side = paired.Side(
                sys.executable, "side_stages.py", specify(arguments, program, layout)
            )
            sides.append(side)
            rows.append({"program": program, "layout": layout, **side.report})
            if not arguments.run:
                side.close()
            print(describe(rows[-1]), flush=True)
        if arguments.run:
            paired.alternate(sides, arguments.rounds, arguments.repeats)
            for row, side in zip(rows, sides, strict=True):
                row["rounds"] = side.rounds
                print(describe_run(row, side), flush=True)
            if len(sides) == 2:
                r = paired.ratios(*reversed(sides))
                print(
                    f"{program}: {arguments.layouts[0]} over {arguments.layouts[1]} "
                    f"ratio={r['median']:.3f} ({r['lowest']:.3f} to {r['highest']:.3f} in "
                    f"{arguments.rounds} rounds) least={r['least']:.3f} cpu={r['cpu']:.3f}",
                    flush=True,
                )
    finally:
        for side in sides:
            side.close()
    return rows


def describe(row: dict[str, Any]) -> str:
    """Format the stages of one program: wall seconds, processor seconds in brackets, and sizes."""
    seconds = row["seconds"]
    stages = ", ".join(
        f"{name} {seconds[name]['wall']:.1f} s ({seconds[name]['cpu']:.1f})"
        for name in STAGES
        if name in seconds
    )
    sizes = (
        f"{row['equations']:,} equations, StableHLO {row['stablehlo_operations']:,} operations, "
        f"{row['stablehlo_bytes'] / 1e6:.1f} MB"
    )
    if "compile" in seconds:
        sizes += (
            f"; optimised {row['optimised_operations']:,} instructions, "
            f"{row['optimised_bytes'] / 1e6:.1f} MB"
        )
    title = f"{row['program']} {row['layout']} ({row['parameters']:,} parameters)"
    return f"{title}: {stages}\n  {sizes}; peak memory {row['memory'] / 2**20:.0f} MiB"


def describe_run(row: dict[str, Any], side: paired.Side) -> str:
    """Format the time of one run of a program and the peak memory of its process."""
    walls = [r.wall for r in side.rounds]
    return (
        f"{row['program']} {row['layout']}: {statistics.median(walls):.3f} s in the median of "
        f"{len(walls)} rounds, {min(walls):.3f} s at least, "
        f"{min(r.cpu for r in side.rounds):.3f} s of processors; "
        f"peak memory {side.memory / 2**20:.0f} MiB"
    )


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    """Measure every program that was asked for; returns the rows that were printed."""
    arguments = parse(argv)
    rows = []
    for program in arguments.programs:
        rows += measure(arguments, program)
    return rows


if __name__ == "__main__":
    main()
