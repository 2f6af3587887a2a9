"""What diffusion_jax.convert promises: three names, loaded on first use."""

import subprocess
import sys

import pytest

from diffusion_jax import convert


def test_the_promised_names_are_there():
    assert {getattr(convert, name).__name__ for name in convert.__all__} == set(convert.__all__)
    assert set(convert.__all__) >= {"import_network", "export_network"}
    with pytest.raises(AttributeError, match="'diffusion_jax.convert' has no attribute 'import_f'"):
        _ = convert.import_f


def test_importing_the_room_loads_nothing_heavy():
    code = "import sys, diffusion_jax.convert; print({'jax', 'flax', 'yaml'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
