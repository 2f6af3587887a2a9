"""Guidance: the formula, the order of the doubled batch, one trace for every scale."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.diffusion import guidance

X = jnp.arange(24.0).reshape(2, 3, 4, 1)
T = jnp.array([3, 7], jnp.int32)
COND = {"vector": jnp.array([[1.0], [2.0]]), "crossattn": jnp.ones((2, 5, 3))}
NULL = {"vector": jnp.array([[-1.0], [-5.0]]), "crossattn": jnp.zeros((2, 5, 3))}


def apply(x, t, conditioning):
    shift = conditioning["vector"][:, 0] * 10 + conditioning["crossattn"].sum(axis=(1, 2))
    return x * t[:, None, None, None] + shift[:, None, None, None]


def test_identity_passes_its_conditioning():
    got = guidance.identity(apply, COND)(X, T)
    np.testing.assert_array_equal(got, apply(X, T, COND))


@pytest.mark.parametrize("scale", [0.0, 1.0, 7.5])
def test_cfg_is_u_plus_scale_times_the_difference(scale):
    got = guidance.cfg(apply, COND, NULL, scale)(X, T)
    out_u, out_c = apply(X, T, NULL), apply(X, T, COND)
    np.testing.assert_allclose(got, out_u + scale * (out_c - out_u), rtol=1e-6)


def test_one_scale_for_each_sample():
    got = guidance.cfg(apply, COND, NULL, jnp.array([0.0, 1.0]))(X, T)
    np.testing.assert_allclose(got[0], apply(X, T, NULL)[0], rtol=1e-6)
    np.testing.assert_allclose(got[1], apply(X, T, COND)[1], rtol=1e-6)


def test_the_doubled_batch_is_unconditional_first():
    seen = {}

    def spy(x, t, conditioning):
        seen.update(x=x, t=t, **conditioning)
        return x

    guidance.cfg(spy, COND, NULL, 2.0)(X, T)
    np.testing.assert_array_equal(seen["x"], np.concatenate([X, X]))
    np.testing.assert_array_equal(seen["t"], [3, 7, 3, 7])
    np.testing.assert_array_equal(seen["vector"][:, 0], [-1, -5, 1, 2])


def test_another_scale_does_not_retrace():
    traces = []

    @jax.jit
    def run(scale):
        traces.append(None)
        return guidance.cfg(apply, COND, NULL, scale)(X, T)

    assert not np.allclose(run(jnp.float32(1.5)), run(jnp.float32(4.0)))
    assert len(traces) == 1


def test_half_precision_outputs_are_combined_in_float32():
    half = lambda x, t, c: apply(x, t, c).astype(jnp.bfloat16)
    got = guidance.cfg(half, COND, NULL, 3.0)(X, T)
    out_u, out_c = (np.asarray(half(X, T, c), np.float32) for c in (NULL, COND))
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, out_u + 3.0 * (out_c - out_u), rtol=1e-6)


def test_conditionings_must_agree():
    with pytest.raises(
        ValueError, match=r"unconditional has \['vector'\].*\['crossattn', 'vector'\]"
    ):
        guidance.cfg(apply, COND, {"vector": NULL["vector"]}, 2.0)
    short = NULL | {"crossattn": jnp.zeros((2, 4, 3))}
    with pytest.raises(ValueError, match=r"unconditional\['crossattn'\] has the shape \(2, 4, 3\)"):
        guidance.cfg(apply, COND, short, 2.0)
