"""A ControlNet changes nothing at its start, and sees its hint once it has learned."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.trees import drawn

from diffusion_jax.models.unet.control_net import ControlNet
from diffusion_jax.models.unet.unet import UNet

UNET = UNet(
    out_channels=4, model_channels=8, channel_mult=(1,), num_res_blocks=1, num_groups=2,
    attention_resolutions=(1,), num_heads=2, use_spatial_transformer=True, context_dim=6,
)  # fmt: skip
NET = ControlNet(UNET, (4, 6))


@pytest.fixture(scope="module")
def inputs():
    keys = jax.random.split(jax.random.key(0), 3)
    x, context, hint = (
        jax.random.normal(key, shape)
        for key, shape in zip(keys, [(2, 4, 4, 4), (2, 3, 6), (2, 8, 8, 3)], strict=True)
    )
    return {"x": x, "t": jnp.array([3, 700]), "context": context, "hint": hint}


def compiled(function):
    """Compile with little optimisation: these networks run once."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


def shapes(module, *arguments):
    return jax.eval_shape(module.init, jax.random.key(1), *arguments)["params"]


@pytest.mark.slow
def test_a_copy_adds_nothing_until_it_has_learned(inputs):
    x, t, context, hint = inputs["x"], inputs["t"], inputs["context"], inputs["hint"]
    base = drawn(shapes(UNET, x, t, context), 1)
    own = NET.init(jax.random.key(2), x, t, hint, context)["params"]
    copy = {**own, **{name: base[name] for name in own if name in base}}
    assert set(base) - set(own) == {n for n in base if n.startswith(("output_blocks", "out_"))}

    steer = compiled(lambda params, hint: NET.apply({"params": params}, x, t, hint, context))
    denoise = compiled(
        lambda params, control: UNET.apply({"params": params}, x, t, context, control=control)
    )
    control = steer(copy, hint)
    assert len(control) == 3 and not any(np.any(h) for h in control)
    plain = denoise(base, None)
    np.testing.assert_array_equal(denoise(base, control), plain)
    learned = drawn(shapes(NET, x, t, hint, context), 3)
    first, second = (denoise(base, steer(learned, h)) for h in (hint, hint + 1.0))
    assert np.abs(first - plain).max() > 1e-2 and np.abs(first - second).max() > 1e-3


def test_a_hint_of_another_size_is_refused(inputs):
    arguments = (inputs["x"], inputs["t"], jnp.zeros((2, 4, 4, 3)), inputs["context"])
    with pytest.raises(ValueError, match=r"hint has shape \(2, 4, 4, 3\); it should be \(2, 8, 8"):
        shapes(NET, *arguments)
