"""`import diffusion_jax` is light, and no module needs torch or TensorFlow to be imported."""

import json
import pkgutil
import subprocess
import sys

import jax.numpy as jnp
import jaxtyping
import pytest

import diffusion_jax

# What importing a package that is not installed does, also where it is.
BLOCK = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name in ("tensorflow", "torch"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Missing())
"""
HEAVY = ("tensorflow", "torch", "orbax", "grain", "tensorflow_datasets")


def modules_after(code: str) -> set[str]:
    """Names of the top-level modules that a fresh interpreter holds after running `code`."""
    show = "import json, sys; print(json.dumps(sorted({m.partition('.')[0] for m in sys.modules})))"
    result = subprocess.run(
        [sys.executable, "-c", f"{code}\n{show}"], capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    return set(json.loads(result.stdout.splitlines()[-1]))


def test_package_is_light():
    loaded = modules_after("import diffusion_jax")
    assert "diffusion_jax" in loaded
    assert not loaded & set(HEAVY)


def test_the_command_line_is_light():
    """So that --help is quick, signals are handled early, and the log has our format."""
    loaded = modules_after("from diffusion_jax.cli import arguments; arguments._parser()")
    assert not loaded & {*HEAVY, "jax", "flax", "ml_collections"}


def test_the_maths_is_light():
    loaded = modules_after(
        "import importlib, pkgutil, diffusion_jax.diffusion as maths\n"
        "for module in pkgutil.iter_modules(maths.__path__, 'diffusion_jax.diffusion.'):\n"
        "    importlib.import_module(module.name)"
    )
    assert not loaded & {*HEAVY, "flax", "optax", "ml_collections"}


def test_every_module_imports_without_torch_or_tensorflow():
    names = [m.name for m in pkgutil.walk_packages(diffusion_jax.__path__, "diffusion_jax.")]
    assert "diffusion_jax.types" in names
    imports = "\n".join(f"import {name}" for name in names)
    assert not modules_after(f"{BLOCK}\n{imports}") & {"tensorflow", "torch"}


def test_shapes_in_signatures_are_checked_here():
    """In every process that runs tests: see tests/conftest.py."""
    from diffusion_jax.diffusion import ddpm
    from diffusion_jax.diffusion.schedule import make_schedule

    image, steps = jnp.zeros((2, 4, 4, 1)), jnp.zeros((3,), jnp.int32)
    with pytest.raises(jaxtyping.TypeCheckError):
        ddpm.q_sample(make_schedule("linear"), image, steps, image)


@pytest.mark.parametrize("name", sorted(getattr(diffusion_jax, "__all__", ())))
def test_public_names_resolve(name):
    assert getattr(diffusion_jax, name) is not None
