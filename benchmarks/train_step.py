"""Time a training step, here and for the same network in PyTorch.

python benchmarks/train_step.py --peer_python=PYTHON    # one that has torch and diffusers
python benchmarks/train_step.py --no_peer               # our side alone
python benchmarks/train_step.py --device=gpu --dtype=bfloat16 --compile --peak_tflops=989 \
    --nets=cifar10 --batch_size=128 --repeats=20

A step is forward, backward, clipping, AdamW and EMA, of the same widths, batch and threads on both
sides, which take turns. FLOPs are counted in the traced program, before XLA fuses it.
"""

import paired


def main(argv: list[str] | None = None) -> list[dict]:
    """Compare every network of --nets; returns the numbers that were printed."""
    description = __doc__.splitlines()[0]
    arguments = paired.parse(argv, description, nets="demo,wide28,cifar10")
    return [paired.compare(name, arguments, "train") for name in arguments.nets]


if __name__ == "__main__":
    main()
