"""Train the same network here and with diffusers, for the same time and the same steps, and score.

python benchmarks/race.py --peer_python=PYTHON --data=digits --minutes=10

PYTHON has torch and diffusers. Network, objective, optimizer, batch size and data are taken from
configs/mnist.py; --data=fashion takes Fashion-MNIST instead (apt-get install
dataset-fashion-mnist). First each side trains for a moment, which tells how many steps fit into the
time. Then three trainings take turns of a few seconds, so that what else runs on the machine slows
all alike: diffusers for the time, ours for the time, and ours for the steps of diffusers.
Compilation counts as training; a side waits while another has its turn.

All draw from the same noise with DDIM, and the samples are scored by features of
EfficientNet-Lite0: MIND and the kernel distance (KID with Inception's features), and how near they
are to training images. The folder --out gets race.json, race.md and race.png.
"""

import argparse
import json
import os
import pathlib
import platform
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import paired
from race_data import DATA

HERE = pathlib.Path(__file__).resolve().parent
# The trainings run the code of this tree, so drawing, scoring and the revision come from it too.
sys.path.insert(0, str(HERE.parent))
SLICE = 5.0  # seconds of a turn
# A training may take this many times its budget before it is given up.
PATIENCE = 5.0
# Beside that, seconds in which a training starts, which a short budget does not hold.
START = 300.0
METRICS = ("mind", "kernel")
FEATURES = "efficientnet_lite0"
REFERENCE = 5000  # training images that samples are compared with, at most
# Steps between two rows of a log. A trial training that wrote rows more often would take ours for
# slower than it is.
LOG_EVERY = 50
COLUMNS = ("mind", "kernel", "copied", "nearest_ratio")


class Racer:
    """A training in a process of its own, which can be made to wait.

    seconds: that it has run, without waiting. cpu: seconds of processors, known at its end.
    """

    def __init__(self, name: str, command: Sequence[str], folder: pathlib.Path, budget: float):
        self.name, self.command, self.folder = name, list(command), folder
        self.seconds, self.cpu, self.budget = 0.0, 0.0, budget
        self.process: subprocess.Popen | None = None
        folder.mkdir(parents=True)

    def turn(self, seconds: float) -> bool:
        """Run for so long; True when it has ended.

        Raises RuntimeError when it failed or takes too long.
        """
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        begun = time.monotonic()
        if self.process is None:
            self.process = self._start()
        else:
            os.killpg(self.process.pid, signal.SIGCONT)
        try:
            code = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGSTOP)
            self.seconds += time.monotonic() - begun
            if self.seconds > PATIENCE * self.budget + START:
                raise RuntimeError(f"{self.name} has taken {self.seconds:.0f} s") from None
            return False
        self.seconds += time.monotonic() - begun
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        self.cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        if code:
            log = (self.folder / "log.txt").read_text()
            raise RuntimeError(f"{self.name} ended with code {code}:\n{log[-2000:]}")
        return True

    def _start(self) -> subprocess.Popen:
        environment = dict(os.environ)
        # Nothing that an earlier process compiled is found.
        environment["JAX_COMPILATION_CACHE_DIR"] = str(self.folder / "compiled")
        environment["PYTHONPATH"] = f"{HERE.parent}{os.pathsep}{HERE}"
        environment["JAX_PLATFORMS"] = "cpu"
        with (self.folder / "log.txt").open("w") as log:
            return subprocess.Popen(
                self.command, stdout=log, stderr=log, env=environment, start_new_session=True
            )

    def end(self) -> None:
        if self.process is not None and self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


def race(racers: Sequence[Racer], seconds: float = SLICE) -> None:
    """Let all run to their ends, one at a time, in turns of so many seconds."""
    left = list(racers)
    try:
        while left:
            left = [racer for racer in left if not racer.turn(seconds)]
    finally:
        for racer in racers:
            racer.end()


class Speed(NamedTuple):
    """Seconds before the first step and after the last one, and of each step."""

    around: float
    step: float

    def steps_in(self, seconds: float) -> int:
        """How many steps fit into a time, at least 1."""
        return max(1, int((seconds - self.around) / self.step))


def speed_of(seconds: float, rows: Sequence[tuple[int, float]]) -> Speed:
    """What a training of so many seconds was spent on. rows: (step, time) of some of its steps."""
    (first, begun), (last, ended) = rows[0], rows[-1]
    step = (ended - begun) / (last - first)
    return Speed(max(0.0, seconds - last * step), step)


def logged(folder: pathlib.Path) -> Iterator[tuple[int, float]]:
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        if "train/loss" in row:
            yield row["step"], row["time"]


class Entry(NamedTuple):
    """A training of the table."""

    name: str
    ours: bool
    steps: int

    @property
    def folder(self) -> str:
        return self.name.replace(", ", "_").replace(" ", "_")


class Track:
    """What all trainings share: the data, the config, the specification of the other side."""

    def __init__(self, arguments: argparse.Namespace, out: pathlib.Path) -> None:
        from diffusion_jax.experiment import make_experiment
        from diffusion_jax.experiment.config.files import load_config
        from diffusion_jax.experiment.scoring import make_extractor

        self.arguments, self.out = arguments, out
        self.extractor = make_extractor(FEATURES)  # before any training: its weights may be missing
        self.images, self.labels = DATA[arguments.data]()
        if arguments.tiny:
            self.images, self.labels = self.images[::50], self.labels[::50]
        np.savez(out / "data.npz", images=self.images, labels=self.labels)
        noise = np.random.default_rng(arguments.seed).standard_normal(
            (arguments.num_samples, *self.images.shape[1:]), np.float32
        )
        self.drawn = np.arange(arguments.num_samples) % 10  # their classes
        np.savez(out / "noise.npz", noise=noise, labels=self.drawn)
        self.noise = noise
        self.config = "configs/mnist.py:tiny" if arguments.tiny else "configs/mnist.py"
        self.overrides = [
            "--config.data.source.name=race_data:Arrays",
            f"--config.data.source.path={out / 'data.npz'}",
            "--config.data.splits.validation=None",
            "--config.data.splits.test=None",
            "--config.hooks.validation=None",
            "--config.hooks.images=None",
            "--config.checkpoint.monitor=None",
            "--config.checkpoint.keep_best=0",
            f"--config.seed={arguments.seed}",
        ]
        config = load_config(self.config, self.overrides)
        self.experiment = make_experiment(config)
        self.batch_size = config.train.batch_size
        num_classes = self.experiment.network.module.num_classes
        self.peer = {
            "data": str(out / "data.npz"),
            "noise": str(out / "noise.npz"),
            "model": config.model.to_dict() | {"num_classes": num_classes},
            "image_shape": list(self.images.shape[1:]),
            "schedule": config.schedule.to_dict(),
            "optimizer": config.optimizer.to_dict(),
            "warmup_steps": config.lr_schedule.warmup_steps,
            "batch_size": self.batch_size,
            "drop_rate": config.conditioning.embedders.label.ucg_rate,
            "sampling_steps": config.sampler.num_steps,
            "guidance_scale": arguments.guidance_scale,
            "layout": arguments.peer_layout,
            "threads": arguments.threads,
            "seed": arguments.seed,
        }

    def racer(self, entry: Entry, budget: float, log_every: int = LOG_EVERY) -> Racer:
        folder = self.out / entry.folder
        command = self._ours(entry, folder, log_every) if entry.ours else None
        racer = Racer(entry.name, command or self._theirs("train", folder), folder, budget)
        if command is None:
            own = {"folder": str(folder), "num_steps": entry.steps, "log_every": log_every}
            (folder / "specification.json").write_text(json.dumps(self.peer | own))
        return racer

    def _ours(self, entry: Entry, folder: pathlib.Path, log_every: int) -> list[str]:
        return [
            sys.executable,
            str(HERE.parent / "launch.py"),
            f"--config={HERE.parent / self.config}",
            f"--workdir={folder / 'run'}",
            "--no_test",
            *self.overrides,
            f"--config.train.num_steps={entry.steps}",
            f"--config.checkpoint.every={entry.steps}",
            f"--config.hooks.scalars.every={log_every}",
        ]

    def _theirs(self, work: str, folder: pathlib.Path) -> list[str]:
        script = str(HERE / "side_race_torch.py")
        return [self.arguments.peer_python, script, work, str(folder / "specification.json")]

    def samples(self, entry: Entry) -> np.ndarray:
        """Draw from the averaged weights -> uint8 [n h w c]."""
        folder = self.out / entry.folder
        if not entry.ours:
            subprocess.run(self._theirs("sample", folder), check=True, timeout=3600)
            with np.load(folder / "samples.npz") as held:
                return held["arr_0"]
        from diffusion_jax import Pipeline

        pipe = Pipeline.from_workdir(folder / "run")
        return pipe(
            self.drawn.tolist(), noise=self.noise, guidance_scale=self.arguments.guidance_scale
        )

    def score(self, sets: dict[str, np.ndarray]) -> dict[str, dict[str, float]]:
        """Score sets of samples by features of the same network and the same training images."""
        from diffusion_jax.metrics.extraction import build_extract, stream_all
        from diffusion_jax.metrics.scores import compute_scores
        from diffusion_jax.metrics.summaries import summary

        extractor = self.extractor
        extract = build_extract(extractor, self.experiment.mesh)
        order = np.random.default_rng(0).permutation(len(self.images))[:REFERENCE]

        def summarise(images: np.ndarray) -> Any:
            ids = np.arange(len(images))
            batches = (
                (images[i : i + 64].astype(np.float32) / 127.5 - 1.0, ids[i : i + 64])
                for i in range(0, len(images), 64)
            )
            return stream_all(summary(extractor.name, extractor.key), extract, batches)

        data = summarise(self.images[np.sort(order)])
        found = {}
        for name, images in sets.items():
            scores = compute_scores(METRICS, summarise(images), data, data)
            found[name] = {key.removesuffix(f"_{FEATURES}"): v for key, v in scores.items()}
        return found


def main(argv: list[str] | None = None) -> dict[str, Any]:
    arguments = parse(argv)
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: arguments.threads])
    out = pathlib.Path(arguments.out).absolute()
    out.mkdir(parents=True)
    track, budget = Track(arguments, out), 60.0 * arguments.minutes
    speeds = calibrate(track, arguments.calibration_steps, budget)
    theirs, ours = (speeds[name].steps_in(budget) for name in ("theirs", "ours"))
    entries = [
        Entry("diffusers", False, theirs),
        Entry("ours, equal time", True, ours),
        Entry("ours, equal steps", True, theirs),
    ]
    racers = [track.racer(entry, budget) for entry in entries]
    print(f"{theirs} steps of diffusers and {ours} of ours fit into {budget:.0f} s", flush=True)
    race(racers)
    for racer in racers:  # before drawing and scoring, which can fail
        print(f"{racer.name}: {racer.seconds:.0f} s, {racer.cpu:.0f} CPU s", flush=True)
    check_size(out / entries[1].folder / "run", out / entries[0].folder)
    drawn = {entry.name: track.samples(entry) for entry in entries}
    scores = track.score(drawn)
    rows = [
        {
            "name": entry.name,
            "steps": entry.steps,
            "images_seen": entry.steps * track.batch_size,
            "seconds": racer.seconds,
            "cpu_seconds": racer.cpu,
            **scores[entry.name],
        }
        for entry, racer in zip(entries, racers, strict=True)
    ]
    result = {"arguments": vars(arguments), "facts": facts(arguments), "rows": rows}
    (out / "race.json").write_text(json.dumps(result, indent=1))
    (out / "race.md").write_text(table(result))
    draw(out / "race.png", list(drawn.values()))
    print(table(result), end="")
    return result


def calibrate(track: Track, steps: int, budget: float) -> dict[str, Speed]:
    """Train each side for a few steps, alone, and see what it spends its time on."""
    found = {}
    for name, ours in (("theirs", False), ("ours", True)):
        entry = Entry(f"calibration_{name}", ours, steps)
        racer = track.racer(entry, max(budget, 600.0), log_every=min(LOG_EVERY, max(1, steps // 5)))
        race([racer], seconds=PATIENCE * racer.budget)
        folder = racer.folder / "run" if ours else racer.folder
        rows = list(logged(folder))
        # The row of the last step is written after the checkpoint.
        found[name] = speed_of(racer.seconds, rows[len(rows) // 4 : -1])
        print(f"{name}: {found[name].step:.4f} s a step, {found[name].around:.1f} s around")
    return found


def check_size(ours: pathlib.Path, theirs: pathlib.Path) -> None:
    """Raise ValueError when the two networks are not of one size."""
    import jax

    from diffusion_jax import Pipeline

    count = sum(leaf.size for leaf in jax.tree.leaves(Pipeline.from_workdir(ours).params))
    paired.same_size(count, json.loads((theirs / "parameters.json").read_text()))


def facts(arguments: argparse.Namespace) -> dict[str, Any]:
    """What the race was run on, and with."""
    from diffusion_jax.runs.identity import code_facts

    code = "import torch, diffusers; print(torch.__version__, diffusers.__version__)"
    printed = subprocess.run(
        [arguments.peer_python, "-c", code], capture_output=True, text=True, check=True, timeout=300
    )
    versions = dict(zip(("torch", "diffusers"), printed.stdout.split(), strict=True))
    described = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in described if line.startswith("model name")]
    return {
        "hardware": f"{arguments.threads} cores of {names[0] if names else platform.machine()}",
        "packages": {"jax": code_facts()["packages"]["jax"], **versions},
        "revision": code_facts()["revision"],
        "load": os.getloadavg()[2],
    }


def table(result: dict[str, Any]) -> str:
    """The race as a table of Markdown."""
    arguments, facts = result["arguments"], result["facts"]
    title = " | ".join(("training", "steps", "images seen", "time, s", "CPU time, s", *COLUMNS))
    lines = [f"| {title} |", "|" + "---|" * (5 + len(COLUMNS))]
    for row in result["rows"]:
        cells = [row["name"], f"{row['steps']:,}", f"{row['images_seen']:,}"]
        cells += [f"{row['seconds']:.0f}", f"{row['cpu_seconds']:.0f}"]
        cells += [f"{row[name]:.4g}" for name in COLUMNS]
        lines.append(f"| {' | '.join(cells)} |")
    versions = ", ".join(f"{name} {version}" for name, version in facts["packages"].items())
    notes = (
        f"{arguments['data']}, {arguments['minutes']:g} minutes",
        f"{arguments['num_samples']:,} samples with guidance {arguments['guidance_scale']:g}",
        f"{facts['hardware']} (load {facts['load']:.1f})",
        f"revision {facts['revision']}",
        versions,
    )
    return "\n".join([*lines, "", f"{', '.join(notes)}."]) + "\n"


def draw(path: pathlib.Path, sets: Sequence[np.ndarray], columns: int = 20) -> None:
    """Draw the first samples of each set in a row of their own: the same noise, the same class."""
    from diffusion_jax.train.pictures import image_grid, save_png

    save_png(path, image_grid(np.stack([images[:columns] for images in sets])))


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flag = parser.add_argument
    flag("--data", default="digits", choices=list(DATA))
    flag("--minutes", type=float, default=10.0, help="of training, for each side")
    flag("--peer_python", default=sys.executable, help="a Python that has torch and diffusers")
    flag("--peer_layout", default="channels_first", choices=["channels_first", "channels_last"])
    flag("--num_samples", type=int, default=2000)
    flag("--guidance_scale", type=float, default=1.0)
    flag("--threads", type=int, default=len(os.sched_getaffinity(0)))
    flag("--seed", type=int, default=0)
    flag("--calibration_steps", type=int, default=5 * LOG_EVERY)
    flag("--tiny", action="store_true", help="a smaller network, few images and samples")
    flag("--out", default="runs/race", help="a new folder")
    arguments = parser.parse_args(argv)
    if arguments.tiny:
        arguments.num_samples, arguments.calibration_steps = 20, 8
    least = {"minutes": 0.01, "num_samples": 20, "threads": 1, "calibration_steps": 8}
    paired.check(parser, arguments, least)
    return arguments


if __name__ == "__main__":
    main()
