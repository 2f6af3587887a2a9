"""Time a training step of a first stage with its adversary, here and in PyTorch.

python benchmarks/autoencoder.py --peer_python=PYTHON    # one that has torch and diffusers
python benchmarks/autoencoder.py --no_peer               # our side alone

A step trains the autoencoder with L1, LPIPS, KL and the adversary, weighed by the gradients of the
last layer, then the discriminator; two Adams and an EMA. Both sides start from the same weights and
have to agree on losses and logits of the same images. A third process takes the step without
weighing the adversary, which shows what that costs.
"""

import statistics
import sys
import tempfile
from typing import Any

import paired

# LPIPS and the adversary from the first step: the other side computes them in all.
RANDOM = (
    "--config.perceptual.weights=random",
    "--config.loss.perceptual_start=0",
    "--config.loss.disc_start=0",
)
NETS = {
    "emoji": paired.Net("configs/emoji_vae.py", 16, RANDOM),
    # Half the widths of kl-f8, with its depth, its attention and its discriminator.
    "kl_f8_64": paired.Net(
        "configs/vae_kl_f8.py",
        2,
        (
            *RANDOM,
            "--config.model.ch=64",
            "--config.data.batches.image_size=64",
            "--config.model.resolution=64",
        ),
    ),
    "tiny": paired.Net("configs/emoji_vae.py:tiny", 4, RANDOM),
}
# Of losses and logits, relative to the larger one.
MAX_DIFFERENCE = 1e-3


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    """Compare every network of --nets; returns the numbers that were printed."""
    arguments = paired.parse(argv, __doc__.splitlines()[0], nets="emoji", table=NETS)
    return [compare(name, arguments) for name in arguments.nets]


def compare(name: str, arguments: Any) -> dict[str, Any]:
    """Time one network in turns and print the comparison; returns the numbers.

    Raises ValueError when the two networks differ in size or in what they compute.
    """
    net = NETS[name]
    specification = {
        **net._asdict(),
        "batch_size": arguments.batch_size or net.batch_size,
        "work": "train",
        "adaptive": True,
        "threads": arguments.threads,
        "device": arguments.device,
        "dtype": arguments.dtype,
        "compile": arguments.compile,
        "layout": arguments.peer_layout,
    }
    sides = []
    with tempfile.TemporaryDirectory() as folder:
        try:
            first = {**specification, "folder": None if arguments.no_peer else folder}
            sides.append(paired.Side(sys.executable, "side_autoencoder_jax.py", first))
            fixed = {**specification, "folder": None, "adaptive": False}
            sides.append(paired.Side(sys.executable, "side_autoencoder_jax.py", fixed))
            if not arguments.no_peer:
                theirs = {**first, "network": sides[0].report["network"]}
                python = arguments.peer_python
                sides.append(paired.Side(python, "side_autoencoder_torch.py", theirs))
                paired.same_size(*(side.report["parameters"] for side in (sides[0], sides[2])))
                same_values(*(side.report["values"] for side in (sides[0], sides[2])))
            paired.alternate(sides, arguments.rounds, arguments.repeats)
        finally:
            for side in sides:
                side.close()
    ours, unweighed, *peers = sides
    print(paired.describe(name, arguments, specification, [ours, *peers]), flush=True)
    share = weighing_share(ours, unweighed)
    print(
        f"  weighing the adversary: {share['median']:.1%} of our step in the median of "
        f"{arguments.rounds} rounds, {share['cpu']:.1%} by CPU time"
    )
    return {"ratio": paired.ratios(ours, *peers) if peers else None, "share": share,
            "ours": ours.rounds}  # fmt: skip


def same_values(ours: dict[str, float], theirs: dict[str, float]) -> None:
    """Raise ValueError when two sides with the same weights compute different losses or logits."""
    for name, value in ours.items():
        other = theirs[name]
        if abs(value - other) > MAX_DIFFERENCE * max(abs(value), abs(other)):
            raise ValueError(
                f"the sides differ: {name} is {value:.6f} here and {other:.6f} in PyTorch, more "
                f"than {MAX_DIFFERENCE:.1%} apart is no comparison"
            )


def weighing_share(adaptive: paired.Side, fixed: paired.Side) -> dict[str, float]:
    """Compute the share of a step that a constant weight of the adversary would save."""
    pairs = zip(fixed.rounds, adaptive.rounds, strict=True)
    cpu = min(r.cpu for r in fixed.rounds) / min(r.cpu for r in adaptive.rounds)
    return {
        "median": 1.0 - statistics.median(a.wall / b.wall for a, b in pairs),
        "cpu": 1.0 - cpu,
    }


if __name__ == "__main__":
    main()
