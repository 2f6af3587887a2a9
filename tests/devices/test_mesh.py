"""Meshes of four axes, and which rows of a batch a process holds."""

import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import AxisType

from diffusion_jax.devices import mesh
from diffusion_jax.devices.mesh import batch_shards, make_mesh, process_rows, replicated


def test_mesh_sizes_and_axis_types():
    mesh = make_mesh()
    assert mesh.axis_names == ("slices", "data", "fsdp", "tensor")
    assert mesh.devices.shape == (1, 8, 1, 1)
    assert mesh.axis_types == (AxisType.Auto,) * 4
    assert make_mesh(fsdp=2, tensor=2).devices.shape == (1, 2, 2, 2)
    assert make_mesh(data=2, fsdp=-1).devices.shape == (1, 2, 4, 1)
    assert make_mesh(slices=2, fsdp=2).devices.shape == (2, 2, 2, 1)
    assert make_mesh(data=2, devices=jax.devices()[:2]).devices.size == 2


def test_context_shares_rows():
    mesh = make_mesh(context=2, tensor=2)
    assert dict(mesh.shape) == {"slices": 1, "data": 2, "fsdp": 1, "context": 2, "tensor": 2}
    assert batch_shards(mesh) == 2
    assert make_mesh(slices=2, context=2).devices.shape == (2, 2, 1, 2, 1)
    with pytest.raises(ValueError, match="fsdp=1 context=3 tensor=1 should multiply to 8"):
        make_mesh(context=3)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"data": 3}, "slices=1 data=3 fsdp=1 tensor=1 should multiply to 8, the number of dev"),
        ({"fsdp": 3}, "data=-1 fsdp=3 tensor=1 should multiply to 8"),
        ({"data": 0}, "mesh axis data = 0 should be at least 1 device, or -1"),
        ({"data": -2}, "mesh axis data = -2 should be at least 1"),
        ({"fsdp": -1}, "mesh axes data = fsdp = -1, which only one of them should be"),
    ],
)
def test_bad_mesh(sizes, message):
    with pytest.raises(ValueError, match=message):
        make_mesh(**sizes)


@dataclasses.dataclass(frozen=True)
class Chip:
    """What the choice of a mesh reads of a TPU."""

    id: int
    slice_index: int
    process_index: int = 0
    platform: str = "tpu"
    device_kind: str = "TPU v4"
    core_on_chip: int = 0

    @property
    def coords(self):
        return (self.id % 2, self.id // 2 % 2, 0)


def test_slices_are_those_that_the_devices_name():
    chips = [Chip(i, slice_index=i // 4) for i in (4, 0, 5, 1, 6, 2, 7, 3)]
    arranged = mesh._arrange(chips, (2, 2, 2, 1))
    assert [{chip.slice_index for chip in part.flat} for part in arranged] == [{0}, {1}]
    assert {chip.id for chip in arranged.flat} == set(range(8))
    with pytest.raises(ValueError, match="slices = 1 should be 2, the number of slices that the 8"):
        mesh._arrange(chips, (1, 4, 2, 1))
    with pytest.raises(ValueError, match="slices = 4 should be 2"):
        mesh._arrange(chips, (4, 1, 2, 1))
    # GPUs name the group that is tied by NVLink; a mesh may well cross it
    gpus = [dataclasses.replace(chip, platform="gpu", device_kind="H100") for chip in chips]
    assert mesh._arrange(gpus, (1, 4, 2, 1)).shape == (1, 4, 2, 1)
    whole = make_mesh(slices=2, data=2, fsdp=2)
    np.testing.assert_array_equal(whole.devices.flat, jax.devices())


def test_replicated():
    array = jax.device_put(np.arange(3.0), replicated(make_mesh()))
    assert array.is_fully_replicated and len(array.addressable_shards) == 8


def test_rows_of_this_process():
    mesh = make_mesh(slices=2, fsdp=2, tensor=2)
    assert batch_shards(mesh) == 4
    np.testing.assert_array_equal(process_rows(mesh, 8), np.arange(8))
    with pytest.raises(ValueError, match="a batch of 6 should divide by the 4"):
        process_rows(mesh, 6)
