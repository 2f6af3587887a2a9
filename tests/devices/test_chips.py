"""Chips are found by the names that JAX reports, each by its own."""

import re

import jax
import pytest

from diffusion_jax.devices.chips import CHIPS, find_chip


@pytest.mark.parametrize(
    ("device_kind", "name"),
    [
        ("TPU v3", "v3"),
        ("TPU v4", "v4"),
        ("TPU v5 lite", "v5e"),
        ("TPU v5e", "v5e"),
        ("TPU v5", "v5p"),
        ("TPU v5p", "v5p"),
        ("TPU v6 lite", "v6e"),
        ("TPU7x", "v7x"),
        ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA A100 80GB PCIe", "a100"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
    ],
)
def test_finds_a_chip_by_the_name_that_jax_reports(device_kind, name):
    chip = find_chip(device_kind)
    assert chip is not None and chip.name == name
    assert [c.name for c in CHIPS if re.fullmatch(c.kind, device_kind)] == [name]


@pytest.mark.parametrize("device_kind", ["cpu", "", "TPU v9", "NVIDIA H100", "NVIDIA T4"])
def test_an_unknown_chip_is_none(device_kind):
    assert find_chip(device_kind) is None


def test_the_devices_of_these_tests_are_no_chip():
    assert find_chip(jax.devices()[0].device_kind) is None


def test_figures_have_the_magnitudes_of_accelerators():
    """A figure typed in GB for bytes, or in TFLOP/s for FLOP/s, is far outside."""
    assert len({chip.name for chip in CHIPS}) == len(CHIPS)
    for chip in CHIPS:
        assert 5e13 < chip.peak_flops < 3e15, chip
        assert 15 * 2**30 < chip.hbm < 200e9, chip
        assert 2e11 < chip.hbm_bandwidth < 9e12, chip
        assert 2e10 < chip.interconnect < 1e12, chip
        # From L4 to v6e, a byte of memory traffic is worth 100 to 600 FLOP.
        assert 70 < chip.peak_flops / chip.hbm_bandwidth < 600, chip


def test_gpus_and_only_they_have_a_compute_capability():
    for chip in CHIPS:
        assert (chip.capability is not None) == chip.kind.startswith("NVIDIA"), chip
    capability = {chip.name: chip.capability for chip in CHIPS}
    assert capability["a100"] == (8, 0) and capability["h200"] == capability["h100"] == (9, 0)
