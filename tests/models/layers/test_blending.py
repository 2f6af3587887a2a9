"""What frames are alone and what they are in their clip, blended."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.models.layers.blending import AlphaBlender, blend

SPATIAL = jnp.arange(24.0).reshape(2, 3, 4)
TEMPORAL = jnp.full((2, 3, 4), 100.0)
INDICATOR = jnp.array([[0, 1, 0], [0, 0, 1]])


def blended(module, factor=None):
    params = {} if factor is None else {"params": {"mix_factor": jnp.array([factor])}}
    return blend(module.apply(params, INDICATOR), SPATIAL, TEMPORAL)


def test_strategies():
    # 1 / (1 + exp(-0.8)) = 0.68997
    alpha = 0.6899745
    mixed = alpha * SPATIAL + (1 - alpha) * TEMPORAL
    fixed = blended(AlphaBlender("fixed", 0.25))
    np.testing.assert_allclose(fixed, 0.25 * SPATIAL + 75.0, rtol=1e-6)
    np.testing.assert_allclose(blended(AlphaBlender("learned"), 0.8), mixed, rtol=1e-6)
    with_images = blended(AlphaBlender("learned_with_images"), 0.8)
    images = INDICATOR == 1
    np.testing.assert_array_equal(with_images[images], SPATIAL[images])
    np.testing.assert_allclose(with_images[~images], mixed[~images], rtol=1e-6)


def test_the_factor_starts_as_it_is_given():
    for strategy in ("learned", "learned_with_images"):
        params = AlphaBlender(strategy, 0.3).init(jax.random.key(0), INDICATOR)["params"]
        np.testing.assert_array_equal(params["mix_factor"], np.float32([0.3]))
    assert "params" not in AlphaBlender("fixed").init(jax.random.key(0), INDICATOR)


def test_another_strategy_is_named():
    with pytest.raises(ValueError, match="merge_strategy = 'mean' is unknown; choose from fixed"):
        AlphaBlender("mean").init(jax.random.key(0), INDICATOR)


def test_the_result_has_the_dtype_of_its_arrays():
    half = jnp.bfloat16(SPATIAL)
    alpha = AlphaBlender("fixed", 0.1).apply({}, INDICATOR)
    assert alpha.dtype == jnp.float32 and blend(alpha, half, half).dtype == jnp.bfloat16
