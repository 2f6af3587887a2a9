"""`python -m diffusion_jax`: the command line, as `diffusion-jax` and `python launch.py` are."""

from diffusion_jax.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
