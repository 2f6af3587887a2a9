"""Train a LoRA on 8 emoji here and with diffusers, and see what it learned and what it spoiled.

python benchmarks/lora.py --peer_python=PYTHON

PYTHON has torch, diffusers and peft. A small text-to-image UNet on pixels is trained here on
captioned emoji without those 8. Then both sides train a LoRA of its attention on them, from the
same file of weights, with equal rank, steps, batch, optimizer and captions, in turns of a few
seconds, so that what else runs on the machine slows both alike. Both LoRAs are loaded here and draw
from the same noise:

- own: the distance of what the 8 captions draw, 4 times each, from the 8 emoji; found: the share of
  these drawings whose nearest emoji of all is the one that was asked for.
- kept: the distance of what 50 other captions draw from what they drew without the LoRA; beside it,
  how far apart two seeds are.

Distances are root mean squares over pixels from 0 to 1. The folder --out gets lora.json, lora.md
and lora.png. As it is, all of it takes a quarter of an hour of one free core.
"""

import argparse
import io
import json
import os
import pathlib
import sys
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import paired
from PIL import Image
from race import PATIENCE, Racer, facts, logged, race

HERE = pathlib.Path(__file__).parent
CONFIG = HERE.parent / "configs/sd15.py:tiny"
OWN, KEPT = 8, 50
DRAWS = 4  # of each of the 8 captions
# A text-to-image model on pixels that both programs have: no first stage, a frozen text encoder.
MODEL = (
    "--config.first_stage=delete",
    "--config.model.out_channels=3",
    "--config.conditioning.embedders.text.width=64",
    "--config.model.context_dim=64",
    "--config.data.source={'name': 'image_folder', 'folder': 'set me', 'caption': 'txt'}",
    "--config.data.splits={'train': 'train'}",
    "--config.data.batches.random_flip=False",
    "--config.hooks.images=delete",
    "--config.optimizer.ema_decay=None",
    "--config.optimizer.gradient_clip_norm=1.0",
    "--config.lr_schedule.warmup_steps=0",
    "--config.sampler.clip_denoised=True",
)
# What the network predicts. With eps the steps of the sampler start from noise that training never
# saw, so that backgrounds keep its colour; a schedule that ends in noise alone needs v.
PREDICTIONS = {
    "eps": ("--config.schedule.parameterization=eps",),
    "v": (
        "--config.schedule.parameterization=v",
        "--config.schedule.rescale_zero_snr=True",
        "--config.sampler.discretize=trailing",
    ),
}
# What each side is asked for at once; the patience of a turn is counted from it.
BUDGET = 3600.0


class Emoji(NamedTuple):
    """Pictures uint8 [n h w c] with their captions."""

    images: np.ndarray
    captions: list[str]

    def write(self, folder: pathlib.Path) -> None:
        folder.mkdir(parents=True)
        for number, (image, caption) in enumerate(zip(*self, strict=True)):
            Image.fromarray(image).save(folder / f"{number:04d}.png")
            (folder / f"{number:04d}.txt").write_text(caption)


def read_emoji(count: int, size: int) -> tuple[Emoji, Emoji]:
    """Read the 8 emoji that LoRAs learn, and `count` others, spread over all that there are."""
    from diffusion_jax.experiment import make_experiment
    from diffusion_jax.experiment.config.files import load_config

    more = (f"size={size}", "skin_tones=False", "max_examples=None")
    config = load_config(str(CONFIG), [f"--config.data.source.{option}" for option in more])
    data = make_experiment(config).data
    source = data.source("train")
    if len(source) < OWN + count:
        raise ValueError(f"there are {len(source)} emoji and {OWN + count} are asked for")
    rows = [source[int(i)] for i in np.linspace(0, len(source) - 1, OWN + count).astype(int)]
    captions = [str(row["caption"]) for row in rows]
    images = np.stack([np.asarray(Image.open(io.BytesIO(row["image"]))) for row in rows])
    chosen = np.linspace(0, len(rows) - 1, OWN + 2).astype(int)[1:-1]
    own = np.isin(np.arange(len(rows)), chosen)
    parts = [
        Emoji(images[where], [captions[i] for i in np.flatnonzero(where)]) for where in (own, ~own)
    ]
    return parts[0], parts[1]


class Timed(Racer):
    """A training that knows when it had its turns, and how busy it was in them."""

    def __init__(self, name: str, command: Sequence[str], folder: pathlib.Path) -> None:
        super().__init__(name, command, folder, BUDGET)
        self.turns: list[Turn] = []

    def turn(self, seconds: float) -> bool:
        begun, before = time.time(), self._processors()
        ended = super().turn(seconds)
        # What is left of the last turn is not known any more once the process has ended.
        self.turns.append(Turn(begun, time.time(), max(0.0, self._processors() - before)))
        return ended

    def _processors(self) -> float:
        """Seconds of processors that the process has taken; 0 before its start and after it."""
        stat = pathlib.Path(f"/proc/{self.process.pid}/stat") if self.process else None
        if stat is None or not stat.exists():
            return 0.0
        fields = stat.read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def step(self) -> tuple[float, float]:
        """Seconds of a step on the clock, without the other side's turns, and of processors."""
        rows = list(logged(self.folder / "run" if self.name == "ours" else self.folder))
        (first, begun), (last, ended) = rows[len(rows) // 4], rows[-1]
        whole = [turn for turn in self.turns[:-1] if turn.begun >= begun]
        wall = active(self.turns, begun, ended) / (last - first)
        spent = sum(turn.ended - turn.begun for turn in whole)
        share = sum(turn.processors for turn in whole) / spent if spent else float("nan")
        return wall, wall * share


class Turn(NamedTuple):
    """When a training ran, and how long processors were busy with it."""

    begun: float  # seconds of the day
    ended: float
    processors: float


def active(turns: Sequence[Turn], begun: float, ended: float) -> float:
    """Add up how long turns lasted between two times."""
    return sum(max(0.0, min(turn.ended, ended) - max(turn.begun, begun)) for turn in turns)


class Bench:
    """The base, the data and the two trainings."""

    def __init__(self, arguments: argparse.Namespace, out: pathlib.Path) -> None:
        self.arguments, self.out = arguments, out
        self.own, self.others = read_emoji(arguments.num_others, arguments.size)
        self.own.write(out / "own")
        self.others.write(out / "others")
        given = arguments.base
        self.base_run = out / "base/run" if given is None else pathlib.Path(given).absolute()

    def _model(self) -> tuple[str, ...]:
        return MODEL + PREDICTIONS[self.arguments.predict]

    def _command(self, name: str, folder: str, steps: int, rate: float, *more: str) -> list[str]:
        return [
            sys.executable,
            str(HERE.parent / "launch.py"),
            f"--config={CONFIG}",
            f"--workdir={self.out / name / 'run'}",
            "--no_test",
            *self._model(),
            f"--config.data.source.folder={self.out / folder}",
            f"--config.data.batches.image_size={self.arguments.size}",
            f"--config.train.batch_size={self.arguments.batch_size}",
            f"--config.train.num_steps={steps}",
            f"--config.checkpoint.every={steps}",
            f"--config.hooks.scalars.every={max(1, steps // 40)}",
            f"--config.optimizer.learning_rate={rate}",
            f"--config.seed={self.arguments.seed}",
            *more,
        ]

    def base(self) -> Racer:
        """Train the base model here, on all but the 8."""
        steps, rate = self.arguments.base_steps, self.arguments.base_learning_rate
        warmup = min(100, steps // 10)
        schedule = {"name": "cosine_decay", "warmup_steps": warmup, "decay_steps": steps}
        command = self._command("base", "others", steps, rate, f"--config.lr_schedule={schedule}")
        racer = Racer("base", command, self.out / "base", BUDGET)
        race([racer], seconds=PATIENCE * BUDGET)
        return racer

    def racers(self) -> list[Timed]:
        """Prepare both trainings of a LoRA."""
        a = self.arguments
        more = (
            f"--config.train.ckpt_path={self.base_run}",
            f"--config.adapters.rank={a.rank}",
            "--config.conditioning.embedders.text.ucg_rate=0.0",
            "--config.guidance={'name': 'none'}",  # which captions that are never dropped ask for
        )
        command = self._command("ours", "own", a.steps, a.learning_rate, *more)
        ours = Timed("ours", command, self.out / "ours")
        folder = self.out / "diffusers"
        script = [a.peer_python, str(HERE / "side_lora_torch.py"), str(self._specify(folder))]
        return [Timed("diffusers", script, folder), ours]

    def _specify(self, folder: pathlib.Path) -> pathlib.Path:
        """Write what diffusers reads: the base, the pictures and what the text encoder says."""
        from diffusion_jax import Pipeline
        from diffusion_jax.convert.weights.diffusers_folder import unet_config
        from diffusion_jax.convert.weights.exporting import export_params, save_weights
        from diffusion_jax.experiment.config.files import load_config

        pipe, unet = Pipeline.from_workdir(self.base_run, ema=False), self.out / "unet"
        network = pipe.experiment.network
        unet.mkdir()
        described = unet_config(network.module, 3, sample_size=self.arguments.size)
        (unet / "config.json").write_text(json.dumps(described))
        save_weights(
            unet / "diffusion_pytorch_model.safetensors",
            [export_params(pipe.params["network"], "unet_diffusers")],
        )
        batch = {"image": self.own.images, "caption": np.array(self.own.captions)}
        conditioning = network.embed(pipe.params, pipe.frozen, network.with_inputs(batch))
        contexts = np.asarray(conditioning["crossattn"], np.float32)
        np.savez(self.out / "own.npz", images=self.own.images, contexts=contexts)
        config = load_config(str(CONFIG), list(self._model()))
        schedule, optimizer = config.schedule, config.optimizer
        specification = {
            "folder": str(folder),
            "unet": str(unet),
            "data": str(self.out / "own.npz"),
            "rank": self.arguments.rank,
            "gaussian": False,  # both sides begin as a layer of PyTorch does
            "num_steps": self.arguments.steps,
            "log_every": max(1, self.arguments.steps // 40),
            "batch_size": self.arguments.batch_size,
            "learning_rate": self.arguments.learning_rate,
            "weight_decay": optimizer.weight_decay,
            "gradient_clip_norm": optimizer.gradient_clip_norm,
            "beta_start": schedule.linear_start,
            "beta_end": schedule.linear_end,
            "predict": self.arguments.predict,
            "threads": self.arguments.threads,
            "seed": self.arguments.seed,
        }
        path = self.out / "specification.json"
        path.write_text(json.dumps(specification))
        return path

    def drawn(self) -> dict[str, np.ndarray]:
        """Draw all captions with the base and with both LoRAs -> {name: [n h w c] in [0, 1]}."""
        from diffusion_jax import Pipeline
        from diffusion_jax.runs.files.export import convert_weights

        convert_weights(self.out / "ours/run", self.out / "ours.safetensors", "peft", raw=True)
        files = {
            "base": {},
            "ours": {self.out / "ours.safetensors": 1.0},
            "diffusers": {self.out / "diffusers/lora/pytorch_lora_weights.safetensors": 1.0},
        }
        pipe = Pipeline.from_workdir(self.base_run, ema=False)
        others = self.others.captions[:: len(self.others.captions) // KEPT][:KEPT]
        captions = DRAWS * self.own.captions + others
        options = {
            "num_steps": self.arguments.sampling_steps,
            "guidance_scale": self.arguments.guidance_scale,
        }
        found = {}
        for name, loras in files.items():
            own = pipe.with_lora(loras) if loras else pipe
            found[name] = own(captions, seed=self.arguments.seed, **options) / 255.0
        found["another seed"] = pipe(captions, seed=self.arguments.seed + 1, **options) / 255.0
        return found


def distance(one: np.ndarray, two: np.ndarray) -> np.ndarray:
    """Root mean square over the pixels of each pair of images."""
    return np.sqrt(np.mean(np.square(one - two), axis=(1, 2, 3)))


def score(drawn: dict[str, np.ndarray], own: Emoji, others: Emoji) -> list[dict[str, Any]]:
    """Measure what was learned and what was kept, for the base, ours and theirs."""
    pictures = np.concatenate([own.images, others.images]) / 255.0
    rows = []
    wanted, count = np.tile(np.arange(OWN), DRAWS), OWN * DRAWS
    for name, images in drawn.items():
        mine = images[:count]
        nearest = [int(np.argmin(distance(pictures, image[None]))) for image in mine]
        rows.append(
            {
                "name": name,
                "own": float(distance(mine, pictures[wanted]).mean()),
                "found": float(np.mean(np.array(nearest) == wanted)),
                "kept": float(distance(images[count:], drawn["base"][count:]).mean()),
            }
        )
    return rows


def main(argv: list[str] | None = None) -> dict[str, Any]:
    arguments = parse(argv)
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: arguments.threads])
    out = pathlib.Path(arguments.out).absolute()
    out.mkdir(parents=True)
    bench = Bench(arguments, out)
    if arguments.base is None:
        base = bench.base()
        print(f"the base took {base.seconds:.0f} s ({base.cpu:.0f} s of CPU)", flush=True)
    racers = bench.racers()
    race(racers, seconds=arguments.turn)
    drawn = bench.drawn()
    rows = score(drawn, bench.own, bench.others)
    seconds = {racer.name: (*racer.step(), racer.seconds) for racer in racers}
    result = {
        "arguments": vars(arguments),
        "facts": facts(arguments),
        "rows": rows,
        "seconds": seconds,
    }
    (out / "lora.json").write_text(json.dumps(result, indent=1))
    (out / "lora.md").write_text(table(result))
    draw(out / "lora.png", bench.own, drawn)
    print(table(result), end="")
    return result


def table(result: dict[str, Any]) -> str:
    """What was found as a table of Markdown."""
    a, about, seconds = result["arguments"], result["facts"], result["seconds"]
    lines = [
        "| | own | found | kept | step, s | step, CPU s | whole training, s |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        cells = [row["name"], f"{row['own']:.3f}", f"{row['found']:.0%}", f"{row['kept']:.3f}"]
        times = seconds[row["name"]] if row["name"] in seconds else ()
        cells += [f"{times[0]:.3f}", f"{times[1]:.3f}", f"{times[2]:.0f}"] if times else [""] * 3
        lines.append(f"| {' | '.join(cells)} |")
    versions = ", ".join(f"{name} {version}" for name, version in about["packages"].items())
    notes = (
        f"rank {a['rank']}, {a['steps']} steps of {a['batch_size']}",
        f"{a['size']} px, base {a['base'] or a['base_steps']}",
        f"guidance {a['guidance_scale']:g}, {about['hardware']} (load {about['load']:.1f})",
        f"revision {about['revision']}",
        versions,
    )
    return "\n".join([*lines, "", f"{', '.join(notes)}."]) + "\n"


def draw(path: pathlib.Path, own: Emoji, drawn: dict[str, np.ndarray], columns: int = 16) -> None:
    """Draw the 8 emoji, and below them what each side drew: for these, then for others."""
    from diffusion_jax.train.pictures import image_grid, save_png

    first = np.full((columns, *own.images.shape[1:]), 255, np.uint8)
    first[:OWN] = own.images
    shown = [*range(OWN), *range(OWN * DRAWS, OWN * DRAWS + columns - OWN)]
    rows = [np.rint(images[shown] * 255).astype(np.uint8) for images in drawn.values()]
    save_png(path, image_grid(np.stack([first, *rows])))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flag = parser.add_argument
    flag("--peer_python", default=sys.executable, help="a Python that has torch, diffusers, peft")
    flag("--size", type=int, default=16, help="pixels of a side, a multiple of 4")
    flag("--num_others", type=int, default=KEPT, help="emoji that the base learns, at least 50")
    flag("--base", help="folder base/run of an earlier --out, for the same --num_others")
    flag("--base_steps", type=int, default=2400)
    flag("--base_learning_rate", type=float, default=1e-3)
    flag("--predict", choices=tuple(PREDICTIONS), default="v", help="what the network predicts")
    flag("--steps", type=int, default=800, help="of each LoRA")
    flag("--rank", type=int, default=16)
    flag("--batch_size", type=int, default=8)
    flag("--learning_rate", type=float, default=3e-3, help="of the LoRAs")
    flag("--sampling_steps", type=int, default=25)
    flag("--guidance_scale", type=float, default=1.5)
    flag("--turn", type=float, default=10.0, help="seconds until the other side goes on")
    flag("--threads", type=int, default=len(os.sched_getaffinity(0)))
    flag("--seed", type=int, default=0)
    flag("--out", default="runs/lora", help="a new folder")
    arguments = parser.parse_args(argv)
    least = {"num_others": KEPT, "base_steps": 1, "steps": 8, "rank": 1, "threads": 1}
    paired.check(parser, arguments, least)
    return arguments


if __name__ == "__main__":
    main()
