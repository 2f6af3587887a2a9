"""Compile the programs of every config for NVIDIA GPUs that are not here (`make gpu`).

    python benchmarks/compile_for_gpus.py                          # small variants, minutes
    python benchmarks/compile_for_gpus.py --full --configs sdxl    # the released sizes

For each program: the seconds that XLA's GPU compiler took, the bytes of arguments and temporaries,
and the kernels that it chose. Small variants have the depth of `:tiny`, and the channels, heads and
bfloat16 of the whole model, because they decide about kernels. Exits with 1 when a program does not
compile. Needs the extra `cuda`, and no GPU.
"""

import argparse
import json
import re
import sys
import time
from pathlib import Path

import jax

from diffusion_jax import load_config, make_experiment
from diffusion_jax.devices.chips import GIB
from diffusion_jax.plan import find_topology
from diffusion_jax.plan.parts import parts_of

ROOT = Path(__file__).parents[1]
CONFIGS = sorted(path.stem for path in (ROOT / "configs").glob("*.py"))
# What decides about kernels and not about the number of operations.
WIDTHS = ("model_channels", "num_heads", "num_head_channels", "num_groups", "ch", "dtype")
TOPOLOGIES = ("h100:1", "a100:1", "h100:8")
# How JAX and its compilers refuse a program.
REFUSALS = (jax.errors.JaxRuntimeError, NotImplementedError, TypeError, ValueError)
KERNELS = {
    "cuDNN convolutions": r'custom_call_target="__cudnn\$conv',
    "cuDNN attention": r'custom_call_target="__cudnn\$fmha',
    "cuBLAS products": r'custom_call_target="__cublas',
    "Triton products": r'"kind":"__triton\w*gemm',
    "transposes": r" transpose\(",
    "copies": r" copy\(",
}


def main() -> int:
    """Compile, print a table, write JSON; return 1 if something did not compile."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--configs", nargs="+", default=CONFIGS, choices=CONFIGS)
    parser.add_argument("--topologies", nargs="+", default=list(TOPOLOGIES))
    parser.add_argument("--parts", nargs="+", choices=("train", "eval", "sample"))
    parser.add_argument("--full", action="store_true", help="the whole models, 1 to 5 min each")
    parser.add_argument("--json", type=Path, help="write the figures to this file too")
    options = parser.parse_args()
    start, rows = time.perf_counter(), []
    for name in options.configs:
        for topology in options.topologies:
            # Other devices than one H100 change the training step alone.
            wanted = options.parts or (None if topology == options.topologies[0] else ["train"])
            for row in compiled(name, topology, wanted, options.full):
                rows.append(row)
                print(as_line(row), flush=True)
    failed = [row for row in rows if "error" in row]
    spent = time.perf_counter() - start
    print(f"{len(rows) - len(failed)} of {len(rows)} programs compiled, {spent / 60:.1f} min")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")
    return 1 if failed else 0


def load(name: str, full: bool, devices: int):
    """Load a config as it is compiled: the whole model, or a shallow one of the same widths."""
    whole = load_config(f"configs/{name}.py")
    if full:
        return whole
    config = load_config(f"configs/{name}.py:tiny")
    with config.unlocked():
        for key in WIDTHS:
            if key in config.model:
                del config.model[key]
            if key in whole.model:
                config.model[key] = whole.model[key]
        config.model.dtype = "bfloat16"
    config.train.batch_size = max(config.train.batch_size, devices)
    return config


def compiled(name: str, topology: str, wanted: list[str] | None, full: bool):
    """Compile the programs of a config one by one -> a dictionary for each."""
    found = find_topology(topology)
    if found.compiler != "gpu":
        raise SystemExit("no GPU compiler: pip install -c constraints.txt -e '.[cuda]'")
    built = make_experiment(load(name, full, len(found.devices)), devices=found.devices)
    for part, lower in parts_of(built).items():
        if wanted is not None and part not in wanted:
            continue
        row = {"config": name, "topology": topology, "part": part}
        start = time.perf_counter()
        try:
            program = lower(built).compile()
        except REFUSALS as error:  # every program is tried, and the exit code says it
            yield row | {"error": f"{type(error).__name__}: {str(error).splitlines()[0]}"}
            continue
        memory, text = program.memory_analysis(), program.as_text()
        kernels = {kernel: len(re.findall(form, text)) for kernel, form in KERNELS.items()}
        yield row | {
            "seconds": time.perf_counter() - start,
            "arguments": memory.argument_size_in_bytes,
            "temporaries": memory.temp_size_in_bytes,
            "kernels": kernels,
        }


def as_line(row) -> str:
    """Write one program as a line of the table."""
    head = f"{row['config']:<13}{row['topology']:<8}{row['part']:<7}"
    if "error" in row:
        return f"{head} FAILED  {row['error']}"
    kernels = ", ".join(f"{count} {kernel}" for kernel, count in row["kernels"].items() if count)
    arguments, temporaries = row["arguments"] / GIB, row["temporaries"] / GIB
    return f"{head}{row['seconds']:>5.0f} s {arguments:>7.3f} + {temporaries:.3f} GiB  {kernels}"


if __name__ == "__main__":
    jax.config.update("jax_enable_compilation_cache", False)
    sys.exit(main())
