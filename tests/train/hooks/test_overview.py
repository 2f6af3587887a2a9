import flax.linen as nn
import jax
import jax.numpy as jnp

from diffusion_jax.train.hooks.overview import overview


def test_lists_names_shapes_and_the_total():
    params = {"network": {"conv": {"kernel": jnp.zeros((3, 3, 8, 16)), "bias": jnp.zeros(16)}}}
    text = overview(params)
    assert "network/conv/kernel" in text and "(3, 3, 8, 16)" in text
    assert "1,168" in text.splitlines()[-1]


def test_shapes_are_enough_and_boxes_are_opened():
    boxed = {"kernel": nn.Partitioned(jnp.zeros((4, 5)), ("a", "b"))}
    shapes = jax.eval_shape(lambda: boxed)
    assert "(4, 5)" in overview(shapes)
    assert "20" in overview(boxed).splitlines()[-1]
