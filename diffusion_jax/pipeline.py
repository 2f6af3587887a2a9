"""The programmatic sampling API: a trained model as a function from what you want to uint8
images."""

import os
import pathlib
from typing import NamedTuple

import jax
import numpy as np

from diffusion_jax.build import Experiment, experiment
from diffusion_jax.build.conditions import Conditions, encode_conditions
from diffusion_jax.build.experiment import MAX_SEED
from diffusion_jax.run_folder import load_saved_config
from diffusion_jax.train.checkpoint import load_params
from diffusion_jax.train.grids import to_pixels
from diffusion_jax.types import PyTree


class Pipeline(NamedTuple):
    """A model ready to sample. Make one with from_workdir; call it for images.

    >>> pipe = Pipeline.from_workdir("runs/mnist")
    >>> images = pipe([7, 7, 3], num_steps=50, guidance_scale=3.0, seed=0)  # uint8 [3, 28, 28, 1]
    """

    experiment: Experiment
    params: PyTree
    frozen: PyTree

    @classmethod
    def from_workdir(
        cls, workdir: str | os.PathLike, *, step: int | None = None, ema: bool = True
    ) -> "Pipeline":
        """Load the weights of a run: the newest checkpoint or that of `step`, averaged (EMA) or
        raw.

        Raises FileNotFoundError when the folder holds no run or no such checkpoint, ValueError
        when it is damaged.
        """
        workdir = pathlib.Path(workdir)
        built = experiment(load_saved_config(workdir))
        params = load_params(
            workdir / "checkpoints", built.abstract_state().params, step=step, ema=ema
        )
        return cls(built, params, built.frozen)

    def __call__(
        self,
        conditions: Conditions = None,
        *,
        n: int | None = None,
        num_steps: int | None = None,
        guidance_scale: float | None = None,
        seed: int = 0,
        batch_size: int = 64,
        image: np.ndarray | None = None,
        mask: np.ndarray | None = None,
    ) -> np.ndarray:
        """Draw images: uint8 [B, H, W, C].

        conditions: one class number or name for each image, or a dict of arrays by input; None for
        an unconditional
            model. n: number of images for one condition or none.
        num_steps, guidance_scale: the config's when None; a scale of 1 is no guidance.
        seed: image i depends on (seed, i) only, whatever B and batch_size are.
        batch_size: images per device call; memory grows with it.
        image, mask: inpainting; uint8 [B, H, W, C] or [H, W, C], and [.., H, W, 1] with 1 where
        the image is kept.
        Raises ValueError for a class out of range or shapes that do not fit, before anything is
        compiled.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size = {batch_size} should be at least 1")
        if not 0 <= seed <= MAX_SEED:
            raise ValueError(f"seed = {seed} should be between 0 and {MAX_SEED}")
        inputs, count = encode_conditions(self.experiment.network, conditions, n, self._class_names)
        inpaint = _inpainting(image, mask, count, self.experiment.network.image_shape)
        size = self.experiment.round_up(min(batch_size, count))
        root = jax.random.key(seed)
        images = []
        for start in range(0, count, size):
            rows = np.minimum(np.arange(start, start + size), count - 1)
            samples = self.experiment.sample_fn(
                self.params,
                self.frozen,
                {key: value[rows] for key, value in inputs.items()},
                jax.vmap(jax.random.fold_in, (None, 0))(root, rows),
                num_steps=num_steps,
                guidance_scale=guidance_scale,
                inpaint=None if inpaint is None else tuple(part[rows] for part in inpaint),
            )
            images.append(to_pixels(jax.device_get(samples.x))[: count - start])
        drawn = np.concatenate(images)
        if image is None or mask is None:
            return drawn
        # The sampler sees what is kept through noise; the pixels themselves come from the image.
        kept = np.asarray(mask, np.float32)
        return np.rint(kept * image + (1.0 - kept) * drawn).astype(np.uint8)

    def num_classes(self) -> int:
        """Tell how many classes the model knows; ValueError when they are not its condition."""
        counts = [e.num_classes for e in self.experiment.network.embedders.values()]
        if len(counts) != 1 or counts[0] is None:
            raise ValueError("this model is not conditioned on one class label alone")
        return counts[0]

    def _class_names(self) -> tuple[str, ...]:
        return self.experiment.data.class_names(self.experiment.data.source("train"))


def _inpainting(
    image: np.ndarray | None, mask: np.ndarray | None, count: int, shape: tuple[int, int, int]
) -> tuple[np.ndarray, np.ndarray] | None:
    if image is None and mask is None:
        return None
    if image is None or mask is None:
        raise ValueError("inpainting needs both image and mask")
    image, mask = np.asarray(image), np.asarray(mask, np.float32)
    if image.dtype != np.uint8:
        raise ValueError(f"image has dtype {image.dtype}; inpainting takes uint8 pixels")
    height, width, channels = shape
    for name, array, wanted in (
        ("image", image, (height, width, channels)),
        ("mask", mask, (height, width, 1)),
    ):
        if array.shape not in (wanted, (count, *wanted)):
            raise ValueError(
                f"{name} has shape {array.shape}; it should be {wanted} or {(count, *wanted)}"
            )
    x_start = image.astype(np.float32) / 127.5 - 1.0
    return np.broadcast_to(x_start, (count, *shape)), np.broadcast_to(
        mask, (count, height, width, 1)
    )
