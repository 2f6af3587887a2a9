"""Can a classifier that was trained on real digits read the digits of a run?

python benchmarks/recognise_digits.py --workdir=runs/mnist [--seed=0]

Draws ten EMA samples of each digit, lets a support vector machine trained on the real training
split read them, and prints how many of the 100 it reads as the digit that was asked for, beside
its accuracy on real digits that it has not seen. It also prints how far the samples are from their
nearest training image, and how far held-out real digits are: a model that only repeats its
training set would be much nearer.
"""

import argparse
import pathlib

import numpy as np
from sklearn.svm import SVC

from diffusion_jax.pipeline import Pipeline
from diffusion_jax.train.pictures import image_grid, save_png

PER_CLASS = 10
CLASSES = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", default="runs/mnist")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="sampling steps (default: the config's)")
    parser.add_argument("--guidance_scale", type=float, help="default: the config's")
    arguments = parser.parse_args()

    pipe = Pipeline.from_workdir(arguments.workdir)
    labels = np.repeat(np.arange(CLASSES), PER_CLASS)
    samples = pipe(
        list(labels),
        seed=arguments.seed,
        num_steps=arguments.steps,
        guidance_scale=arguments.guidance_scale,
        batch_size=len(labels),
    )
    train_x, train_y = real_digits(pipe, "train")
    test_x, test_y = real_digits(pipe, "test")
    classifier = SVC(C=5.0, gamma="scale").fit(train_x, train_y)
    accuracy = classifier.score(test_x, test_y)
    x = flat(samples.astype(np.float32) / 127.5 - 1.0)
    recognised = int(np.sum(classifier.predict(x) == labels))

    grid = pathlib.Path(arguments.workdir) / "samples" / f"digits_seed{arguments.seed}.png"
    grid.parent.mkdir(parents=True, exist_ok=True)
    save_png(grid, image_grid(samples, columns=PER_CLASS))
    near, unseen = nearest(x, train_x), nearest(test_x, train_x)
    print(f"nearest training image: samples {near:.2f}, unseen real digits {unseen:.2f}")
    print(f"the classifier reads {100 * accuracy:.1f} % of unseen real digits")
    print(f"grid: {grid}")
    print(f"recognised: {recognised} of {len(labels)} samples")


def real_digits(pipe: Pipeline, role: str) -> tuple[np.ndarray, np.ndarray]:
    """Images in [-1, 1], flattened, and labels of a split, as the model sees them."""
    source = pipe.experiment.data.source(role)
    batches = pipe.experiment.data.eval_batches(source, batch_size=len(source))
    batch = next(batches.iterate(0))
    return flat(batch["image"]), batch["label"]


def flat(images: np.ndarray) -> np.ndarray:
    return images.reshape(len(images), -1)


def nearest(x: np.ndarray, references: np.ndarray) -> float:
    """Mean Euclidean distance from each row of x to the nearest row of references."""
    squared = (x**2).sum(1)[:, None] - 2 * x @ references.T + (references**2).sum(1)[None]
    return float(np.sqrt(np.maximum(squared.min(1), 0)).mean())


if __name__ == "__main__":
    main()
