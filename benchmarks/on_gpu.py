"""Measure training and sampling on one NVIDIA GPU, beside the plan (benchmarks/on_gpu.sh).

    python benchmarks/on_gpu.py --seconds=480 --out=on_gpu          # on_gpu.json and on_gpu.md
    python benchmarks/on_gpu.py --tiny --seconds=300                # small networks, on a CPU too

Each case runs in a process of its own, with random weights and data that stay on the device, as
long as time is left: images a second, MFU, the memory that the step took, the memory and the floor
of the compiled program. Then the same training step under XLA flags that are untried so far. With
--peer_python, a Python that has torch and diffusers, cifar10 is trained there too, by torch.compile
with channels_last.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from diffusion_jax.devices.gpu_memory import ask_for_gpu_memory

HERE = Path(__file__).parent
MARK = "figures: "
REPEATS = 5


class Case(NamedTuple):
    """What is measured: a config, the work, and overrides for one card of 80 GB."""

    config: str
    work: str
    overrides: tuple[str, ...]
    flags: str = ""


CACHED = ("latent_cache.folder=unused", "data.batches.crop=center")
CASES = (
    Case("cifar10", "train", ("train.batch_size=128", "model.dtype=bfloat16")),
    Case("cifar10", "sample", ("train.batch_size=128", "model.dtype=bfloat16")),
    Case("sdxl", "train", ("train.batch_size=8", "model.remat=dots", *CACHED)),
    Case("sdxl", "sample", ("train.batch_size=4",)),
    Case("sd21", "train", ("train.batch_size=8", "model.remat=dots", *CACHED)),
    Case("sd21", "sample", ("train.batch_size=4",)),
    Case("vae_kl_f8", "train", ("train.batch_size=4", "model.dtype=bfloat16")),
)
FLAGS = (
    "--xla_gpu_experimental_enable_conv_fusion=true",
    "--xla_gpu_force_conv_nhwc=true",
    "--xla_gpu_cudnn_gemm_fusion_level=2",
    "--xla_gpu_enable_latency_hiding_scheduler=true",
)


def main() -> int:
    """Run the cases that fit into the time; return 1 if one of them failed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=480, help="for everything")
    parser.add_argument("--out", type=Path, default=Path("on_gpu"), help="the files' name")
    parser.add_argument("--tiny", action="store_true", help="the :tiny variants")
    parser.add_argument("--configs", nargs="+", help="of cifar10, sdxl, sd21, vae_kl_f8")
    parser.add_argument("--peer_python", help="a Python that has torch and diffusers")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        ask_for_gpu_memory()
        print(MARK + json.dumps(measure(Case(*json.loads(options.one)), options.tiny)))
        return 0
    until = time.monotonic() + options.seconds
    cases = [c for c in CASES if options.configs is None or c.config in options.configs]
    cases += [case._replace(flags=flag) for case in cases[:1] for flag in FLAGS]
    rows = []
    for case in cases:
        rows.append(case._asdict() | in_process(case, options.tiny, until - time.monotonic()))
        write(options.out, rows)
    if options.peer_python and not options.tiny:
        rows.append(peer(options.peer_python, until - time.monotonic()))
        write(options.out, rows)
    print(options.out.with_suffix(".md").read_text())
    return 1 if any("error" in row for row in rows) else 0


def in_process(case: Case, tiny: bool, seconds: float) -> dict[str, Any]:
    """Measure a case in a process of its own; what went wrong is one line of the result."""
    if seconds < 5:
        return {"skipped": "no time was left"}
    command = [sys.executable, __file__, f"--one={json.dumps(case)}", *(["--tiny"] * tiny)]
    flags = f"{os.environ['XLA_FLAGS']} {case.flags}" if "XLA_FLAGS" in os.environ else case.flags
    environment = {**os.environ, "XLA_FLAGS": flags}
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=seconds
        )
    except subprocess.TimeoutExpired:
        return {"skipped": f"it took longer than the {seconds:.0f} s that were left"}
    found = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
    if done.returncode or not found:
        return {"error": (done.stderr.strip().splitlines() or ["no output"])[-1][:300]}
    return json.loads(found[-1].removeprefix(MARK))


def measure(case: Case, tiny: bool) -> dict[str, Any]:
    """Compile one step or one sampling run, and time it."""
    import jax

    from diffusion_jax import load_config, make_experiment
    from diffusion_jax.devices.chips import find_chip
    from diffusion_jax.plan.floor import floor
    from diffusion_jax.plan.hlo import parse
    from diffusion_jax.plan.parts import lower_sample, lower_train, sample_arguments
    from diffusion_jax.runs.arguments import arguments_of
    from diffusion_jax.runs.measuring.speed import model_flops

    name = f"configs/{case.config}.py" + (":tiny" if tiny else "")
    overrides = [o for o in case.overrides if not tiny or not o.startswith("model.")]
    config = load_config(name, [f"--config.{override}" for override in overrides])
    built = make_experiment(config, devices=jax.devices()[:1])
    training = case.work == "train"
    start = time.perf_counter()
    lowered = lower_train(built) if training else lower_sample(built)
    compiled = lowered.compile()
    compiling = time.perf_counter() - start
    chip = find_chip(jax.devices()[0].device_kind)
    arguments = filled(arguments_of(built) if training else sample_arguments(built))
    result = jax.block_until_ready(compiled(*arguments))
    start = time.perf_counter()
    repeats = REPEATS if training else 1
    for _ in range(repeats):
        if training:
            arguments = (result[0], *arguments[1:])
        result = compiled(*arguments)
    jax.block_until_ready(result)
    seconds = (time.perf_counter() - start) / repeats
    memory, stats = compiled.memory_analysis(), jax.devices()[0].memory_stats()
    figures = {
        "device": jax.devices()[0].device_kind,
        "seconds": seconds,
        "images_per_second": built.training.batch_size / seconds,
        "compile_seconds": compiling,
        "planned_bytes": memory.argument_size_in_bytes + memory.temp_size_in_bytes,
        "peak_bytes": stats["peak_bytes_in_use"] if stats else None,
    }
    if chip is not None:
        work = floor(parse(compiled.as_text()), chip)
        figures["floor_seconds"] = sum(w.seconds for w in work)
        if training:
            figures["mfu"] = model_flops(built) / seconds / chip.peak_flops
    return figures


def filled(tree: Any) -> Any:
    """Make small random floats and zeros of other types, on the device, of abstract arrays."""
    import jax
    import jax.numpy as jnp

    @jax.jit
    def fill(key: Any) -> Any:
        leaves, structure = jax.tree.flatten(tree)
        made = []
        for number, leaf in enumerate(leaves):
            one = jax.random.fold_in(key, number)
            if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
                made.append(jax.random.split(one, leaf.shape))
            elif jnp.issubdtype(leaf.dtype, jnp.floating):
                made.append(0.02 * jax.random.normal(one, leaf.shape, leaf.dtype))
            else:
                made.append(jnp.zeros(leaf.shape, leaf.dtype))
        return jax.tree.unflatten(structure, made)

    return fill(jax.random.key(0))


def peer(python: str, seconds: float) -> dict[str, Any]:
    """Train cifar10 on both sides in one run of train_step.py, and keep its table."""
    command = [sys.executable, str(HERE / "train_step.py"), "--device=gpu", "--dtype=bfloat16"]
    command += ["--compile", "--nets=cifar10", "--batch_size=128", "--peer_layout=channels_last"]
    command += [f"--peer_python={python}", "--repeats=20", "--rounds=3"]
    row = {"config": "cifar10", "work": "train, ratio to torch.compile", "flags": ""}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=max(5.0, seconds))
    except subprocess.TimeoutExpired:
        return row | {"skipped": f"it took longer than the {seconds:.0f} s that were left"}
    if done.returncode:
        return row | {"error": (done.stderr.strip().splitlines() or ["no output"])[-1][:300]}
    return row | {"table": done.stdout}


def write(out: Path, rows: list[dict[str, Any]]) -> None:
    """Write what is known so far: a crash loses nothing."""
    out.with_suffix(".json").write_text(json.dumps(rows, indent=2) + "\n")
    head = "| what | images/s | MFU | s | floor, s | planned, GiB | peak, GiB | compiled in, s |\n"
    lines = [as_row(row) for row in rows]
    tables = [f"\n{row['table']}" for row in rows if "table" in row]
    out.with_suffix(".md").write_text("\n".join([head + "|---" * 8 + "|", *lines, *tables]) + "\n")


def as_row(row: dict[str, Any]) -> str:
    """Write one case as a row of the table."""
    what = f"{row['config']} {row['work']} {row['flags']}".strip()
    for reason in ("error", "skipped"):
        if reason in row:
            return f"| {what} | {reason}: {row[reason]} |" + " |" * 6
    if "table" in row:
        return f"| {what} | see below |" + " |" * 6
    known = lambda name, scale=1.0: f"{row[name] / scale:.4g}" if row.get(name) else ""
    cells = [
        known("images_per_second"),
        known("mfu"),
        known("seconds"),
        known("floor_seconds"),
        known("planned_bytes", 2**30),
        known("peak_bytes", 2**30),
        known("compile_seconds"),
    ]
    return f"| {what} | " + " | ".join(cells) + " |"


if __name__ == "__main__":
    sys.exit(main())
