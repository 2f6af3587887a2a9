"""PatchGAN: released names, PyTorch's running statistics, ActNorm's start, sharded batches."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from support import autoencoder_fixtures as fixtures

from diffusion_jax.models.first_stage.patchgan import (
    ActNorm,
    BatchNorm,
    NLayerDiscriminator,
    fit_actnorm,
    unfitted,
)

X = 3.0 + 2.0 * jax.random.normal(jax.random.key(0), (2, 3, 4, 5))


def released():
    """Names and shapes of the released discriminator, but for its counter of batches."""
    listed = fixtures.read_names()["disc_nlayer3"]
    return {name: shape for name, shape in listed.items() if "num_batches_tracked" not in name}


def released_names(variables):
    names = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(variables):
        module, kind = path[-2].key, path[-1].key
        shape = leaf.shape
        if kind == "kernel":
            shape = (shape[-1], shape[-2], *shape[:-2])
        kind = {"kernel": "weight", "scale": "weight"}.get(kind, kind)
        names[f"{module.replace('_', '.')}.{kind}"] = shape
    return names


def test_names_shapes_and_count_are_the_released_ones():
    module = NLayerDiscriminator()
    image = jnp.ones((1, 64, 64, 3))
    variables = jax.eval_shape(module.init, jax.random.key(0), image)
    assert released_names(variables) == released()
    assert sum(leaf.size for leaf in jax.tree.leaves(variables["params"])) == 2_765_633
    logits = jax.eval_shape(module.apply, variables, image)
    assert logits.shape == (1, 6, 6, 1)


def test_actnorm_has_biases_and_no_running_statistics():
    module = NLayerDiscriminator(ndf=4, use_actnorm=True)
    variables = jax.eval_shape(module.init, jax.random.key(0), jnp.ones((1, 24, 24, 3)))
    assert set(variables) == {"params"}
    assert set(variables["params"]["main_2"]) == {"kernel", "bias"}
    assert set(variables["params"]["main_3"]) == {"loc", "scale"}


def test_parameters_start_as_published():
    module = NLayerDiscriminator(ndf=32, n_layers=2)
    variables = jax.jit(module.init)(jax.random.key(0), jnp.ones((1, 12, 12, 3)))
    params = variables["params"]
    kernel = params["main_2"]["kernel"]
    assert abs(float(kernel.mean())) < 1e-3
    np.testing.assert_allclose(kernel.std(), 0.02, rtol=0.05)
    np.testing.assert_allclose(params["main_3"]["scale"].mean(), 1.0, atol=0.01)
    np.testing.assert_allclose(params["main_3"]["scale"].std(), 0.02, rtol=0.3)
    assert not params["main_3"]["bias"].any()
    bias = np.abs(params["main_0"]["bias"])
    assert 0.5 / np.sqrt(48.0) < bias.max() <= 1 / np.sqrt(48.0)
    assert not variables["batch_stats"]["main_3"]["running_mean"].any()
    np.testing.assert_array_equal(variables["batch_stats"]["main_3"]["running_var"], 1.0)


def test_batch_norm_and_its_running_statistics():
    module = BatchNorm()
    variables = module.init(jax.random.key(0), X, train=True)
    params = {"scale": jnp.arange(1.0, 6.0), "bias": jnp.arange(5.0)}
    variables = {"params": params, "batch_stats": variables["batch_stats"]}
    out, updated = module.apply(variables, X, train=True, mutable=["batch_stats"])
    x = np.asarray(X, np.float64)
    mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2))
    scale, bias = np.arange(1.0, 6.0), np.arange(5.0)
    np.testing.assert_allclose(
        out, (x - mean) / np.sqrt(var + 1e-5) * scale + bias, rtol=1e-4, atol=1e-5
    )
    running = updated["batch_stats"]
    np.testing.assert_allclose(running["running_mean"], 0.1 * mean, rtol=1e-5)
    unbiased = x.var((0, 1, 2), ddof=1)
    np.testing.assert_allclose(running["running_var"], 0.9 + 0.1 * unbiased, rtol=1e-5)
    # Fixed statistics, and a batch whose statistics are not kept.
    fixed = module.apply({"params": params, **updated}, X, train=False)
    expected = (x - 0.1 * mean) / np.sqrt(0.9 + 0.1 * unbiased + 1e-5) * scale + bias
    np.testing.assert_allclose(fixed, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(module.apply(variables, X, train=True), out)


def test_act_norm_whitens_the_batch_that_init_sees():
    module = ActNorm()
    out, variables = module.init_with_output(jax.random.key(0), X)
    np.testing.assert_allclose(out.mean((0, 1, 2)), 0.0, atol=1e-5)
    np.testing.assert_allclose(out.std((0, 1, 2), ddof=1), 1.0, rtol=1e-5)
    # Another batch is seen with the parameters of the first.
    step = jnp.broadcast_to(variables["params"]["scale"][None, None, None], X.shape)
    np.testing.assert_allclose(module.apply(variables, X + 1.0) - out, step, rtol=1e-4, atol=1e-5)


def test_the_first_batch_fits_every_actnorm():
    """As one `init` on the batch does, and a second batch changes nothing."""
    module = NLayerDiscriminator(ndf=4, n_layers=2, use_actnorm=True)
    noise = jax.random.uniform(jax.random.key(0), (1, 12, 12, 3))
    batch = 2.0 + 3.0 * jax.random.normal(jax.random.key(1), (4, 12, 12, 3))
    params = unfitted(module.init(jax.random.key(2), noise)["params"])
    assert not params["main_3"]["loc"].any() and np.all(params["main_3"]["scale"] == 1.0)
    fit = jax.jit(partial(fit_actnorm, module))
    fitted, want = fit(params, batch), module.init(jax.random.key(2), batch)["params"]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), fitted, want)
    assert np.abs(np.log(fitted["main_3"]["scale"])).min() > 0.1
    jax.tree.map(np.testing.assert_array_equal, fit(fitted, batch + 1.0), fitted)


def test_a_sharded_batch_is_normalised_as_one():
    module = NLayerDiscriminator(ndf=4, n_layers=1)
    image = (
        jax.random.normal(jax.random.key(1), (8, 6, 6, 3)) * jnp.arange(8.0)[:, None, None, None]
    )
    variables = jax.jit(module.init)(jax.random.key(2), image)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharded = jax.device_put(image, NamedSharding(mesh, PartitionSpec("data")))
    variables_everywhere = jax.device_put(variables, NamedSharding(mesh, PartitionSpec()))

    @jax.jit
    def run(variables, image):
        return module.apply(variables, image, train=True, mutable=["batch_stats"])

    logits, updated = run(variables, image)
    sharded_logits, sharded_updated = run(variables_everywhere, sharded)
    np.testing.assert_allclose(sharded_logits, logits, rtol=1e-4, atol=1e-6)
    for ours, one in zip(jax.tree.leaves(sharded_updated), jax.tree.leaves(updated), strict=True):
        np.testing.assert_allclose(ours, one, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n_layers": 0}, "n_layers = 0 should be at least 1"),
        ({}, "the image is 23 x 64 pixels; n_layers = 3 needs at least 24 each"),
    ],
)
def test_what_does_not_fit_is_named(fields, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(
            NLayerDiscriminator(**fields).init, jax.random.key(0), jnp.ones((1, 23, 64, 3))
        )
