"""Run every command and Python block of the documentation, and fail on what it does not do.

    python tools/run_docs.py [README.md docs/sampling.md ...]

Each page runs in a process of its own, in a copy of a folder that looks like a checkout in which a
few tiny models were trained (PREPARED). Commands of launch.py run inside that process, all other
sh blocks under bash; the Python blocks of a page share their names. Checked are: exit codes,
exceptions, the lines of output blocks, `print(x)  # TEXT`, and the types of arrays in
`x = ...  # uint8 [3, 28, 28, 1]` (in tiny blocks: dtype, rank and first size). A Python block whose
first line is `# name.py` becomes that file. The rules of blocks are in doc_blocks.py.
"""

import argparse
import ast
import contextlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from doc_blocks import Block, commands, read_blocks, shrink

ROOT = Path(__file__).resolve().parents[1]
PAGES = ["README.md", "CONTRIBUTING.md", *(f"docs/{p.name}" for p in ROOT.glob("docs/*.md"))]
PAGE_SECONDS = 1800
# A page is mostly Python, and compilation by one thread: alone it leaves the other cores idle.
_WORKERS = min(4, os.cpu_count() or 1)
# A training step that calls oneDNN would be compiled anew in every block.
_XLA_FLAGS = (
    "--xla_backend_optimization_level=1",
    "--xla_cpu_experimental_onednn_custom_call=false",
)
# Linked from the checkout; configs are copied, because a page may write a new one.
LINKED = ("launch.py", "diffusion_jax", "benchmarks", "tests", "deploy", "docs")


class Preparation(NamedTuple):
    """A path that pages mention, and the commands that make it out of the paths in needs.

    What is needed needs nothing itself.
    """

    path: str
    commands: Sequence[str]
    needs: tuple[str, ...] = ()


def _train(config: str, steps: int, *more: str) -> str:
    return (
        f"python launch.py --config=configs/{config}.py:tiny --workdir=runs/{config} --no_test "
        f"--config.train.num_steps={steps} " + " ".join(more)
    )


_NO_PICTURES = ("--config.hooks.images=delete",)
PREPARED = (
    Preparation("runs/mnist", [_train("mnist", 8)]),
    Preparation("runs/emoji", [_train("emoji", 1, *_NO_PICTURES)]),
    Preparation("runs/sdxl", [_train("sdxl", 1, *_NO_PICTURES)]),
    Preparation("runs/sdxl_refiner", [_train("sdxl_refiner", 1, *_NO_PICTURES)]),
    Preparation(
        "sd_xl_base_1.0.safetensors",
        ["python launch.py convert --from=runs/sdxl --to=sd_xl_base_1.0.safetensors"],
        needs=("runs/sdxl",),
    ),
    Preparation(
        "sd_xl_refiner_1.0.safetensors",
        ["python launch.py convert --from=runs/sdxl_refiner --to=sd_xl_refiner_1.0.safetensors"],
        needs=("runs/sdxl_refiner",),
    ),
    Preparation(
        "sd_xl_turbo_1.0.safetensors",
        ["python launch.py convert --from=runs/sdxl --to=sd_xl_turbo_1.0.safetensors"],
        needs=("runs/sdxl",),
    ),
    Preparation("sd_xl_base.yaml", ["python tools/doc_fixtures.py yaml"]),
    Preparation("photo.png", ["python tools/doc_fixtures.py photo"]),
    Preparation("~/pictures", ["python tools/doc_fixtures.py pictures"]),
    Preparation("~/photos", ["python tools/doc_fixtures.py photos"]),
    Preparation("~/shards", ["python tools/doc_fixtures.py shards"]),
)


def main() -> int:
    """Run the pages given, or all; return 0 when every block did what its page says."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("pages", nargs="*", default=PAGES)
    parser.add_argument("--inside", help=argparse.SUPPRESS)
    parser.add_argument("--keep", action="store_true", help="keep the temporary folder")
    parser.add_argument("--base", type=Path, help="keep what is prepared here, and use it again")
    arguments = parser.parse_args()
    if arguments.inside:
        return _run_page(Path(arguments.inside), arguments.pages[0])
    pages = {page: read_blocks(ROOT / page, ROOT) for page in arguments.pages}
    work = Path(tempfile.mkdtemp(prefix="docs-"))
    try:
        wanted = {name for blocks in pages.values() for name in _mentioned(blocks)}
        base = _prepare(arguments.base or work / "base", work, wanted)
        results = _run_pages(work, base, pages)
    finally:
        if not arguments.keep:
            shutil.rmtree(work, ignore_errors=True)
    return _report(pages, [result for page in results for result in page])


def _mentioned(blocks: Sequence[Block]) -> Iterator[str]:
    text = "\n".join(block.text for block in blocks if not block.skip)
    for preparation in PREPARED:
        if preparation.path in text:
            yield from (preparation.path, *preparation.needs)


def _prepare(base: Path, work: Path, wanted: set[str]) -> Path:
    if not base.exists():
        (base / "tools").mkdir(parents=True)
        for name in LINKED:
            (base / name).symlink_to(ROOT / name)
        (base / "tools" / "doc_fixtures.py").symlink_to(ROOT / "tools" / "doc_fixtures.py")
    shutil.copytree(ROOT / "configs", base / "configs", dirs_exist_ok=True)
    missing = [
        preparation
        for preparation in PREPARED
        if preparation.path in wanted and not (base / preparation.path.removeprefix("~/")).exists()
    ]
    for needy in (False, True):
        with ThreadPoolExecutor(_WORKERS) as pool:
            now = [preparation for preparation in missing if bool(preparation.needs) == needy]
            list(pool.map(lambda preparation: _make(preparation, base, work), now))
    return base


def _make(preparation: Preparation, base: Path, work: Path) -> None:
    start = time.monotonic()
    for command in preparation.commands:
        done = subprocess.run(
            shlex.split(command.replace("python", sys.executable, 1)),
            cwd=base,
            env=_environment(base, work),
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise SystemExit(f"{command}\n{done.stdout}{done.stderr}")
    print(f"prepared {preparation.path} in {time.monotonic() - start:.0f} s", flush=True)


def _environment(folder: Path, work: Path) -> dict[str, str]:
    """Return the environment of a page: a home of its own, one CPU device, this Python first."""
    home = os.environ.get("HOME", "")
    kept = dict(
        TFDS_DATA_DIR=str(Path(home) / "tensorflow_datasets"),
        JAX_COMPILATION_CACHE_DIR=str(work / "xla"),
        XLA_FLAGS=" ".join(_XLA_FLAGS),
    )
    return {
        **kept,
        **os.environ,
        "HOME": str(folder),
        "JAX_PLATFORMS": "cpu",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
    }


class Result(NamedTuple):
    """What became of a block: seconds, and what went wrong ("" if nothing did)."""

    place: str
    seconds: float
    fault: str


def _run_pages(work: Path, base: Path, pages: dict[str, list[Block]]) -> list[list[Result]]:
    """Run as many pages at once as there are cores, four at most; those with most blocks first."""
    order = sorted(pages, key=lambda page: -sum(map(_runs, pages[page])))
    with ThreadPoolExecutor(_WORKERS) as pool:
        return list(pool.map(lambda page: _page_in_process(work, base, page, pages[page]), order))


def _page_in_process(work: Path, base: Path, page: str, blocks: Sequence[Block]) -> list[Result]:
    running = [block for block in blocks if _runs(block)]
    if not running:
        return []
    folder = work / page.replace("/", "_")
    shutil.copytree(base, folder, symlinks=True)
    results = work / f"{folder.name}.json"
    print(f"{page}: {len(running)} blocks", flush=True)
    command = [sys.executable, __file__, page, f"--inside={results}"]
    try:
        subprocess.run(
            command, cwd=folder, env=_environment(folder, work), timeout=PAGE_SECONDS, check=True
        )
    except (subprocess.TimeoutExpired, subprocess.CalledProcessError) as error:
        return [Result(page, 0.0, str(error))]
    return [Result(*result) for result in json.loads(results.read_text())]


def _runs(block: Block) -> bool:
    return block.language in ("sh", "python") and not block.skip


def _report(pages: dict[str, list[Block]], results: Sequence[Result]) -> int:
    faults = [result for result in results if result.fault]
    skipped = [block for blocks in pages.values() for block in blocks if block.skip]
    tiny = sum(block.tiny for blocks in pages.values() for block in blocks)
    for block in skipped:
        print(f"skipped {block.place}: {block.skip}")
    for result in faults:
        print(f"\nFAILED {result.place}\n{result.fault}")
    print(
        f"{len(results)} blocks ran, {tiny} of them with a tiny config, {len(skipped)} were "
        f"skipped, {len(faults)} failed"
    )
    return 1 if faults else 0


def _run_page(results: Path, page: str) -> int:
    """Run the blocks of one page in this process and write what became of them."""
    sys.path.insert(0, os.getcwd())
    names: dict[str, Any] = {"__name__": "__main__"}
    found = []
    for block in filter(_runs, read_blocks(ROOT / page, ROOT)):
        start = time.monotonic()
        with tempfile.TemporaryFile("w+") as log:
            fault = ""
            with _output_to(log):
                try:
                    _run_python(block, names) if block.language == "python" else _run_sh(block)
                except (Exception, SystemExit):  # of the block's own code: any of them is a fault
                    fault = traceback.format_exc(limit=-4)
            log.seek(0)
            output = log.read()
        fault = fault or "\n".join(_missing_output(block, output))
        seconds = time.monotonic() - start
        fault = fault and f"{fault}\n--- output:\n{output[-3000:]}"
        found.append(Result(block.place, seconds, fault))
        print(f"  {block.place} {'FAILED' if fault else 'ok'} {seconds:.1f} s", flush=True)
    results.write_text(json.dumps(found))
    return 0


@contextlib.contextmanager
def _output_to(log: Any) -> Iterator[None]:
    """Send what this process and its children print to a file, by file descriptor."""
    sys.stdout.flush()
    saved = os.dup(1), os.dup(2)
    try:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, copy in zip((1, 2), saved, strict=True):
            os.dup2(copy, number)
            os.close(copy)


def _run_sh(block: Block) -> None:
    lines = commands(block)
    if all(
        line.startswith("python launch.py") and not re.search("[|&;<>$]", line) for line in lines
    ):
        for line in lines:
            _launch(line, block)
        return
    # Flags that a rule adds belong to each command, whose line may go on below.
    text = "set -e\n" + ("\n".join(lines) if block.with_ else shrink(block.text, block))
    code = subprocess.run(["bash", "-c", text], stdin=subprocess.DEVNULL).returncode
    _check_code(code, block, block.text)


def _launch(line: str, block: Block) -> None:
    from diffusion_jax.cli import main as launch

    print(f"$ {line}", flush=True)
    sys.argv = shlex.split(line)[1:]
    try:
        code = launch()
    except SystemExit as stop:  # how argparse ends --help and wrong flags
        code = stop.code
    _check_code(code, block, line)


def _check_code(code: Any, block: Block, command: str) -> None:
    if code != block.exit_code:
        raise AssertionError(f"exit code = {code} should be {block.exit_code}: {command}")


def _run_python(block: Block, names: dict[str, Any]) -> None:
    text = shrink(block.text, block)
    file = re.match(r"# (\w+\.py)\n", text)
    if file:
        Path(file[1]).write_text(text)
        return
    lines = text.splitlines()
    for statement in ast.parse(text).body:
        code = compile(ast.Module([statement], []), block.place, "exec")
        exec(code, names)
        assert statement.end_lineno is not None
        _check_array(lines[statement.end_lineno - 1], names, block)


def _check_array(line: str, names: dict[str, Any], block: Block) -> None:
    found = re.match(r"(\w+) = .*#.*?\b((?:uint|int|float)\d+) \[([\d, ]+)\]", line)
    if not found:
        return
    array, dtype = names[found[1]], found[2]
    shape = tuple(int(size) for size in found[3].split(","))
    if block.tiny:
        same = len(array.shape) == len(shape) and array.shape[0] == shape[0]
    else:
        same = array.shape == shape
    if not same or array.dtype != dtype:
        raise AssertionError(f"{line.strip()}: {found[1]} is {array.dtype} {array.shape}")


def _missing_output(block: Block, output: str) -> Iterator[str]:
    """Say which lines that the page shows are not in what was printed; ... stands for anything."""
    printed = [] if block.tiny else re.findall(r"print\(.*\)  # (.*)", block.text)
    spaced = " ".join(output.split())
    for line in filter(str.strip, [*block.output.splitlines(), *printed]):
        parts = (re.escape(part) for part in " ".join(line.split()).split("..."))
        if not re.search(".*?".join(parts), spaced):
            yield f"the output lacks: {line}"


if __name__ == "__main__":
    sys.exit(main())
