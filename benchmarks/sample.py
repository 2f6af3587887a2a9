"""Time 50 DDIM steps with classifier-free guidance, here and in PyTorch (diffusers).

python benchmarks/sample.py --peer_python=PYTHON [--batch_size=16]    # one with torch and diffusers
python benchmarks/sample.py --no_peer

Both sides run one batch of conditional and unconditional inputs through the same network at every
step. The options are the same as in train_step.py.
"""

import paired


def main(argv: list[str] | None = None) -> list[dict]:
    """Compare every network of --nets; returns the numbers that were printed."""
    arguments = paired.parse(argv, __doc__.splitlines()[0], nets="demo,wide28")
    return [paired.compare(name, arguments, "sample") for name in arguments.nets]


if __name__ == "__main__":
    main()
