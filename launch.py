"""The command line: python launch.py [train|sample|evaluate|report] --config=configs/mnist.py"""

from diffusion_jax.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
