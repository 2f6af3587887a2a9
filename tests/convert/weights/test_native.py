"""Trees under our own names: what is written comes back, and what does not fit is named."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

from diffusion_jax.convert.weights.exporting import save_weights
from diffusion_jax.convert.weights.native import (
    KEY,
    export_tree,
    import_tree,
    read_about,
    read_tree,
)
from diffusion_jax.convert.weights.reading import open_weights

TREE = {
    "net": {"conv": {"kernel": np.arange(24, dtype=np.float32).reshape(2, 3, 4)}},
    "scale": np.float32(0.1),
    "ids": np.arange(3, dtype=np.int32),
}


def described(tree, **other):
    place = SingleDeviceSharding(jax.devices()[0])
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree)
    return shapes | other


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "x.safetensors"
    save_weights(path, [export_tree(TREE, "params/", dtype=np.float16)], metadata={KEY: "{}"})
    return path


def test_the_bytes_have_our_names_and_axes(file):
    """Read by the format's own words: only floating-point arrays are cast, no axis is moved."""
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header, content = json.loads(data[8 : 8 + length]), data[8 + length :]
    dtypes = {"F16": np.float16, "F32": np.float32, "I32": np.int32}
    held = {
        name: np.frombuffer(content[slice(*e["data_offsets"])], dtypes[e["dtype"]]).reshape(
            e["shape"]
        )
        for name, e in header.items()
        if name != "__metadata__"
    }
    assert held.keys() == {"params/net/conv/kernel", "params/scale", "params/ids"}
    np.testing.assert_array_equal(held["params/net/conv/kernel"], TREE["net"]["conv"]["kernel"])
    assert held["params/net/conv/kernel"].dtype == np.float16
    assert held["params/scale"] == TREE["scale"] and held["params/ids"].dtype == np.int32


def test_a_tree_comes_back_in_the_wanted_dtypes(file):
    found = import_tree(described(TREE), open_weights(file), "params/")
    jax.tree.map(np.testing.assert_array_equal, found, TREE)
    assert found["net"]["conv"]["kernel"].dtype == jnp.float32
    jax.tree.map(np.testing.assert_array_equal, read_tree(open_weights(file), "params/"), TREE)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scale": np.zeros(2)}, r"1 of another shape: scale \(\) \(here \(2,\)\)"),
        ({"more": np.zeros(2)}, "does not fit the config, in params/: 1 missing: more"),
        ({"net": {}}, "1 unused: net/conv/kernel"),
    ],
)
def test_a_tree_that_does_not_fit_is_told(file, change, message):
    with pytest.raises(ValueError, match=message):
        import_tree(described(TREE | change), open_weights(file), "params/")


def test_numbers_that_are_not_finite_are_refused_both_ways(tmp_path):
    path, bad = tmp_path / "x.safetensors", {"a": np.array([1.0, np.nan], np.float32)}
    with pytest.raises(ValueError, match="1 number of params/a is NaN or infinite"):
        save_weights(path, [export_tree(bad, "params/")])
    large = {"a": np.array([1e6], np.float32)}
    with pytest.raises(ValueError, match="1 number of params/a becomes infinite as float16"):
        save_weights(path, [export_tree(large, "params/", dtype=np.float16)])
    save_weights(path, [export_tree(bad, "params/", nonfinite=True)])
    with pytest.raises(ValueError, match="holds 1 NaN or infinite number in params/a"):
        import_tree(described(bad), open_weights(path), "params/")


def test_only_native_files_say_what_they_are(tmp_path, file):
    assert read_about(file) == "{}"
    other, text = tmp_path / "y.safetensors", tmp_path / "y.ckpt"
    save_weights(other, [export_tree(TREE, "")])
    text.write_text("x")
    assert [read_about(p) for p in (other, text, tmp_path, tmp_path / "none")] == [None] * 4
