"""Measure how well a first stage reconstructs unseen images, and what LPIPS and PatchGAN add.

python benchmarks/first_stage.py --workdir=runs/emoji_vae --l1_workdir=runs/emoji_vae_l1
python benchmarks/first_stage.py --num_steps=1600 --config.loss.perceptual_start=800 \
    --config.loss.disc_start=1200                                      # trains both first

Prints PSNR (of uint8 images, peak 255) and LPIPS of the held-out split, with the averaged weights
and a sample of the posterior, for a run of configs/emoji_vae.py and for the same network trained
with L1 alone. LPIPS is measured with both of its networks: training uses VGG16, and AlexNet is a
judge that was not the teacher. The picture shows originals, reconstructions, and reconstructions of
the L1 network, row by row. A missing run is trained first, with --num_steps steps and the
--config.* overrides.
"""

import argparse
import pathlib
import subprocess
import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.experiment import make_experiment
from diffusion_jax.models.first_stage.lpips import load_lpips, lpips
from diffusion_jax.runs.folder import load_saved_config
from diffusion_jax.train.checkpoints.saving import restore_state
from diffusion_jax.train.ema import has_ema
from diffusion_jax.train.first_stage.loss import reconstruct
from diffusion_jax.train.pictures import image_grid, save_png

BATCH = 16
JUDGES = {"vgg16": "VGG16", "alexnet": "AlexNet"}
# No perceptual distance and no adversary: |x - x'| and the regularizer are left.
L1_ALONE = ("--config.loss.perceptual_weight=0.0", f"--config.loss.disc_start={10**9}")


class Scores(NamedTuple):
    """Means over a split, and the images that they were computed from, uint8 [n h w c].

    lpips: by the network of the distance, see JUDGES.
    """

    psnr: float
    lpips: dict[str, float]
    real: np.ndarray
    shown: np.ndarray


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="configs/emoji_vae.py", help="of runs still to train")
    parser.add_argument("--workdir", default="runs/emoji_vae", type=pathlib.Path)
    parser.add_argument("--l1_workdir", default="runs/emoji_vae_l1", type=pathlib.Path)
    parser.add_argument("--split", default="test", choices=("validation", "test"))
    parser.add_argument("--num_steps", type=int, help="of runs still to train (default: config's)")
    parser.add_argument("--columns", type=int, default=12, help="images in the picture")
    arguments, overrides = parser.parse_known_args()
    if arguments.num_steps is not None:
        overrides.append(f"--config.train.num_steps={arguments.num_steps}")
    for folder, extra in ((arguments.workdir, ()), (arguments.l1_workdir, L1_ALONE)):
        if not (folder / "checkpoints").is_dir():
            train(arguments.config, folder, [*overrides, *extra])

    full = score(arguments.workdir, arguments.split)
    l1 = score(arguments.l1_workdir, arguments.split)
    grid = arguments.workdir / "samples" / f"first_stage_{arguments.split}.png"
    grid.parent.mkdir(parents=True, exist_ok=True)
    save_png(grid, picture(full, l1, arguments.columns))
    print(f"picture: {grid}")
    titles = "".join(f"{f'LPIPS ({name})':>17}" for name in JUDGES.values())
    print(f"{f'{len(full.real)} images of {arguments.split}':<25}{'PSNR, dB':>9}{titles}")
    for name, found in (("L1 + LPIPS + PatchGAN", full), ("L1 alone", l1)):
        distances = "".join(f"{found.lpips[net]:17.4f}" for net in JUDGES)
        print(f"{name:<25}{found.psnr:9.2f}{distances}")
    ratios = "".join(f"{l1.lpips[net] / full.lpips[net]:17.2f}" for net in JUDGES)
    print(f"{'L1 alone over ours':<34}{ratios}")


def train(config: str, folder: pathlib.Path, overrides: list[str]) -> None:
    """Run launch.py in a process of its own; exit with its error if it fails."""
    launch = pathlib.Path(__file__).parents[1] / "launch.py"
    command = [sys.executable, str(launch), f"--config={config}", f"--workdir={folder}"]
    print("training:", *command[1:], *overrides, flush=True)
    subprocess.run([*command, *overrides], check=True)


def score(workdir: pathlib.Path, split: str) -> Scores:
    """Reconstruct every image of a split and compare."""
    built = make_experiment(load_saved_config(workdir))
    task = built.task
    if task.reconstructing is None:
        raise ValueError(f"{workdir} holds no first stage; train configs/emoji_vae.py there")
    networks = task.reconstructing.networks
    state, _ = restore_state(workdir / "checkpoints", built.abstract_state(), None)
    params = task.averaged(state) if has_ema(state.opt_state) else state.params
    judges = {net: load_lpips(net=net) for net in JUDGES}

    @jax.jit
    def look(params: Any, mutable: Any, judges: Any, image: jax.Array) -> Any:
        keys = jax.random.split(jax.random.key(0), len(image))
        shown, _, _ = reconstruct(
            networks, params["autoencoder"], mutable["regularizer"], image, keys, train=False
        )
        shown = jnp.round((jnp.clip(shown, -1.0, 1.0) + 1.0) * 127.5)
        real = jnp.round((image + 1.0) * 127.5)
        error = jnp.mean(jnp.square(shown - real), axis=(1, 2, 3))
        # An exact image has an error of 0; half a grey level in one pixel is as good as that.
        psnr = 10.0 * jnp.log10(255.0**2 / jnp.maximum(error, 1e-4))
        pair = (real / 127.5 - 1.0, shown / 127.5 - 1.0)
        distances = {net: lpips(judge, *pair, net=net) for net, judge in judges.items()}
        return psnr, distances, real.astype(jnp.uint8), shown.astype(jnp.uint8)

    found = []
    batches = built.data.eval_batches(built.data.source(split), batch_size=BATCH)
    for batch in batches.iterate(0):
        keep = np.asarray(batch["weight"] > 0) if "weight" in batch else slice(None)
        rows = look(params, state.mutable, judges, batch["image"])
        found.append(jax.tree.map(lambda part, keep=keep: np.asarray(part)[keep], rows))
    psnr, distances, real, shown = jax.tree.map(lambda *parts: np.concatenate(parts), *found)
    means = {net: float(distance.mean()) for net, distance in distances.items()}
    return Scores(float(psnr.mean()), means, real, shown)


def picture(full: Scores, l1: Scores, columns: int) -> np.ndarray:
    """Stack originals, reconstructions and L1's reconstructions, from all over the split."""
    chosen = np.linspace(0, len(full.real) - 1, columns).round().astype(int)
    rows = [images[chosen] for images in (full.real, full.shown, l1.shown)]
    return image_grid(np.concatenate(rows), columns=columns)


if __name__ == "__main__":
    main()
