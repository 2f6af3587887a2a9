"""What the tests of real compilers share."""

import jax
import pytest


@pytest.fixture
def without_cache():
    """What was compiled for absent devices cannot be read back."""
    jax.config.update("jax_enable_compilation_cache", False)
    yield
    jax.config.update("jax_enable_compilation_cache", True)
