"""Time sampling from a small SDXL, here and in diffusers for the same latents.

python benchmarks/sampling.py --peer_python=PYTHON     # one with torch and diffusers
python benchmarks/sampling.py --no_peer
python benchmarks/sampling.py --device=gpu --dtype=bfloat16 --nets=sdxl --latents=128 \
    --batch_sizes=1,4,16 --peers=eager,compile --peer_layout=channels_last

Euler's method with classifier-free guidance, both halves in one batch. Both sides have the same
weights, conditions, noise and noise levels, and must make the same latents. Times are of latents,
without decoding; our times include the (small) text encoders, diffusers' do not.
"""

import argparse
import math
import os
import statistics
import sys
import tempfile
from typing import Any, NamedTuple

import paired


class Net(NamedTuple):
    """A config and what to change in it: options of the command line, and fields of `model`."""

    config: str
    overrides: tuple[str, ...] = ()
    model: dict[str, Any] = {}


def _small(channels: int) -> Net:
    """Two levels of SDXL's three, with its heads of 64 channels and two ResBlocks a level."""
    fields = {"model_channels": channels, "num_res_blocks": 2, "num_head_channels": 64}
    return Net("configs/sdxl.py:tiny", (), fields)


NETS = {
    "tiny": Net("configs/sdxl.py:tiny"),
    "small64": _small(64),
    "small128": _small(128),
    # The whole network; for a GPU. Its text encoders are random and small, its latents real.
    "sdxl": Net(
        "configs/sdxl.py:tiny",
        (),
        {
            "model_channels": 320,
            "channel_mult": (1, 2, 4),
            "num_res_blocks": 2,
            "attention_resolutions": (4, 2),
            "num_head_channels": 64,
            "transformer_depth": (1, 2, 10),
        },
    ),
}


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Parse the options; those with several values become lists."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    flag = parser.add_argument
    flag("--nets", default="small64", help=f"comma-separated, of {', '.join(NETS)}")
    flag("--latents", default="32,64", help="sides of the latents")
    flag("--batch_sizes", default="1,4")
    flag("--threads", default="1,2", help="counts of threads, on a CPU")
    flag("--num_steps", type=int, default=20)
    flag("--guidance_scale", type=float, default=5.0)
    flag("--scan", action="store_true", help="scan over the transformers' blocks on our side")
    flag("--peer_python", default=sys.executable, help="a Python that has torch and diffusers")
    flag("--no_peer", action="store_true", help="time our side alone")
    flag("--peers", default="eager", help="comma-separated, of eager, compile (torch.compile)")
    flag("--peer_layout", default="channels_first", choices=["channels_first", "channels_last"])
    flag("--rounds", type=int, default=5, help="alternations")
    flag("--repeats", type=int, default=1, help="batches in a row on one side")
    flag("--device", default="cpu", choices=["cpu", "gpu"])
    flag("--dtype", default="float32", choices=["float32", "bfloat16"])
    arguments = parser.parse_args(argv)
    cores = len(os.sched_getaffinity(0))
    for name, known in (("nets", NETS), ("peers", ("eager", "compile"))):
        chosen = getattr(arguments, name).split(",")
        unknown = [item for item in chosen if item not in known]
        if unknown:
            parser.error(f"--{name}: {unknown[0]!r} is unknown; choose from {', '.join(known)}")
        setattr(arguments, name, chosen)
    for name in ("latents", "batch_sizes", "threads"):
        setattr(arguments, name, [int(item) for item in getattr(arguments, name).split(",")])
    for name in ("rounds", "repeats", "num_steps"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name}={getattr(arguments, name)} should be at least 1")
    if max(arguments.threads) > cores:
        parser.error(f"--threads={max(arguments.threads)}: this process has {cores} cores")
    if arguments.device == "gpu":
        arguments.threads = [cores]
    return arguments


def compare(name: str, size: int, count: int, threads: int, arguments: Any) -> dict[str, Any]:
    """Time one kind of batch on all sides and print the comparison; returns the numbers."""
    with tempfile.TemporaryDirectory() as folder:
        net = NETS[name]._asdict()
        specification = {
            **net,
            "model": {**net["model"], "scan": arguments.scan},
            "latents": size,
            "batch_size": count,
            "threads": threads,
            "folder": folder,
            "layout": arguments.peer_layout,
            **{k: getattr(arguments, k) for k in ("num_steps", "guidance_scale", "device")},
            "dtype": arguments.dtype,
        }
        sides = []
        try:
            sides.append(paired.Side(sys.executable, "side_latents_jax.py", specification))
            for peer in [] if arguments.no_peer else arguments.peers:
                theirs = {**specification, "compile": peer == "compile"}
                script = "side_latents_torch.py"
                sides.append(paired.Side(arguments.peer_python, script, theirs))
                paired.same_size(*(side.report["parameters"] for side in (sides[0], sides[-1])))
            paired.alternate(sides, arguments.rounds, arguments.repeats)
        finally:
            for side in sides:
                side.close()
    where = "GPU" if arguments.device == "gpu" else f"threads={threads}"
    title = f"{name} latents={size}x{size} batch={count} steps={arguments.num_steps} {where}"
    print(
        "\n".join([f"{title} {arguments.dtype}", *describe(sides, count, arguments.device)]),
        flush=True,
    )
    ours, *theirs = sides
    return {
        "ours": ours.rounds,
        "ratios": [paired.ratios(ours, side) for side in theirs],
        "differences": [side.report["difference"] for side in theirs],
    }


def describe(sides: list[paired.Side], count: int, device: str) -> list[str]:
    """The comparison as lines of plain text: each side, then each ratio."""
    ours, *others = sides
    lines = [
        f"  {side.report['version']}: {_median(side):.3f} s a batch in the median, "
        f"{min(r.cpu for r in side.rounds):.3f} s of processors at least; the first took "
        f"{side.report['compile']:.1f} s more ({side.report['compile_cpu']:.1f} s of processors); "
        f"peak memory {_memory(side)}"
        for side in sides
    ]
    for side in others:
        r = paired.ratios(ours, side)
        lines.append(
            f"  against {side.report['version']}: ratio={r['median']:.2f} ({r['lowest']:.2f} to "
            f"{r['highest']:.2f} in {len(ours.rounds)} rounds) least={r['least']:.2f} "
            f"cpu={r['cpu']:.2f} difference={side.report['difference']:.1e} "
            f"{_ahead_after(ours, side, count, device)}"
        )
    return lines


def images_until_ahead(
    batch: tuple[float, float], compilation: tuple[float, float], count: int
) -> int | None:
    """Find the number of images from which on our total, first batch included, is the smaller;
    None when it never is.

    batch: seconds of `count` images, ours and theirs; compilation: what the first batch adds.
    """
    (ours, theirs), (compile_ours, compile_theirs) = batch, compilation
    later = compile_ours - compile_theirs
    if ours >= theirs:
        return None
    return max(1, math.floor(later / (theirs - ours)) + 1) * count


def _ahead_after(ours: paired.Side, theirs: paired.Side, count: int, device: str) -> str:
    """Say after how many images compilation has paid off; on a CPU by processor seconds."""
    kind, column = ("compile", 0) if device == "gpu" else ("compile_cpu", 1)

    def batch(side: paired.Side) -> float:
        return statistics.median(r[column] for r in side.rounds)

    compilation = ours.report[kind], theirs.report[kind]
    images = images_until_ahead((batch(ours), batch(theirs)), compilation, count)
    return "never_ahead" if images is None else f"ahead_from_images={images}"


def _median(side: paired.Side) -> float:
    return statistics.median(r.wall for r in side.rounds)


def _memory(side: paired.Side) -> str:
    device = side.report["device_memory"]
    return f"{(device or side.memory) / 2**20:.0f} MiB" + (" of the device" if device else "")


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    """Compare every combination that was asked for; returns the numbers that were printed."""
    arguments = parse(argv)
    return [
        compare(name, size, count, threads, arguments)
        for name in arguments.nets
        for threads in arguments.threads
        for size in arguments.latents
        for count in arguments.batch_sizes
    ]


if __name__ == "__main__":
    main()
