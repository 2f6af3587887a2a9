"""What diffusion_jax.convert promises, and that the package alone does not load it."""

import subprocess
import sys

from diffusion_jax import convert


def test_the_promised_names_are_there():
    assert {getattr(convert, name).__name__ for name in convert.__all__} == set(convert.__all__)
    assert set(convert.__all__) >= {"import_network", "export_network"}


def test_the_package_does_not_load_its_converters():
    code = "import sys, diffusion_jax; print({'jax', 'diffusion_jax.convert'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
