"""Write the row of a finished run into docs/results.md, and its newest samples into docs/images/.

python tools/result.py runs/mnist
python tools/result.py runs/mnist --score="98 of 100 recognised" --picture=runs/mnist/samples/x.png

A row tells what the folder of the run tells: the config and what differs from its file, hardware,
time of training, images seen, the best score of config.checkpoint.monitor, and the last metrics of
samples with the memorisation. A row of the same command is replaced.
"""

import argparse
import pathlib
import shutil

from diffusion_jax.runs.report.about import number
from diffusion_jax.runs.report.gathering import Gathered, gather
from diffusion_jax.runs.report.page import score_table
from diffusion_jax.runs.report.text import duration

ROOT = pathlib.Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "results.md"
HEAD = "| config | hardware | time | images seen | score | picture | command |"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("workdir", type=pathlib.Path)
    parser.add_argument("--score", help="instead of the scores that the run has logged")
    parser.add_argument("--picture", type=pathlib.Path, help="instead of the newest samples")
    parser.add_argument("--page", type=pathlib.Path, default=PAGE)
    arguments = parser.parse_args(argv)
    try:
        run = gather(arguments.workdir)
        picture = arguments.picture or newest_picture(run)
        row = row_of(run, arguments.score or scores(run), f"images/{image_name(run)}")
        page = with_row(arguments.page.read_text(), row)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    images = arguments.page.parent / "images"
    images.mkdir(exist_ok=True)
    shutil.copyfile(picture, images / image_name(run))
    arguments.page.write_text(page)
    print(row)


def row_of(run: Gathered, score: str, image: str) -> str:
    """The row of a run, with cells in the order of HEAD."""
    if run.images_seen is None or "hardware" not in run.facts:
        raise ValueError(f"{run.folder} does not tell its batch size or its hardware")
    hardware = run.facts["hardware"]
    where = f"{hardware['devices']} x {hardware['device']}, {hardware['cores']} cores"
    config = config_of(run)
    cells = [
        f"`{config}`",
        where,
        duration(run.seconds),
        f"{run.images_seen:,}",
        score,
        f"![Samples of {config}]({image})",
        f"`{command_of(run)}`",
    ]
    return f"| {' | '.join(cell.replace('|', ' ') for cell in cells)} |"


def config_of(run: Gathered) -> str:
    if "config_file" not in run.facts:
        raise ValueError(f"{run.folder} does not tell its config file")
    path, _, variant = run.facts["config_file"].partition(":")
    path = path[path.rfind("configs/") :] if "configs/" in path else path
    return f"{path}:{variant}" if variant else path


def image_name(run: Gathered) -> str:
    """A name for the picture of a run: results_mnist.png, results_mnist_flow.png."""
    path, _, variant = config_of(run).partition(":")
    return "_".join(filter(None, ("results", pathlib.Path(path).stem, variant))) + ".png"


def command_of(run: Gathered) -> str:
    """The command of the run, where its data lie left out."""
    parts = ["python launch.py", f"--config={config_of(run)}"]
    for item in run.differs or []:
        parts.append(f"--config.{item['path']}={item['run']}")
    return " ".join(parts)


def scores(run: Gathered) -> str:
    """The best score by the monitor, and the last metrics of samples."""
    found = []
    if run.best is not None:
        found.append(f"{run.best.monitor} {number(run.best.value)} at step {run.best.step:,}")
    table = score_table(run)
    if table:
        found += [f"{name} {number(value)}" for name, value in table[-1][1].items()]
    if not found:
        raise ValueError(f"{run.folder} has logged no score; give --score")
    return ", ".join(found)


def newest_picture(run: Gathered) -> pathlib.Path:
    """The newest picture of samples or reconstructions, of validation before training."""
    for name in ("val/samples", "val/reconstructions", "train/samples", "train/reconstructions"):
        if name in run.pictures:
            return run.pictures[name][-1][1]
    raise ValueError(f"{run.folder} has logged no samples; give --picture")


def with_row(page: str, row: str) -> str:
    """Put a row at the end of the page's table, in the place of one of the same command."""
    lines = page.splitlines()
    if HEAD not in lines:
        raise ValueError(f"the page has no table with the head {HEAD!r}")
    begin = end = lines.index(HEAD) + 2
    while end < len(lines) and lines[end].startswith("|"):
        end += 1
    command = lambda line: line.rstrip("| ").rpartition(" | ")[2]  # noqa: E731
    kept = [line for line in lines[begin:end] if command(line) != command(row)]
    return "\n".join([*lines[:begin], *kept, row, *lines[end:]]) + "\n"


if __name__ == "__main__":
    main()
