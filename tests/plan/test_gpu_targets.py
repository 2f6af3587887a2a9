"""Descriptions of GPUs for the compiler: complete, and consistent with the table of chips."""

import re

from diffusion_jax.devices.chips import CHIPS, GIB, find_chip
from diffusion_jax.plan.gpu_targets import GPUS, target_config, usable_bytes

CHIP = {chip.name: chip for chip in CHIPS if chip.capability is not None}


def test_every_gpu_of_the_table_is_described():
    assert set(GPUS) == set(CHIP)
    for name, gpu in GPUS.items():
        chip = find_chip(gpu.name)
        assert chip is not None and chip.name == name
        assert 0.93 * chip.hbm < gpu.memory <= 1.01 * chip.hbm, name
        assert 0.9 * gpu.memory - GIB < usable_bytes(chip) < gpu.memory - GIB


def test_peaks_follow_from_multiprocessors_and_clocks():
    """Tensor cores of one generation do equally many products per multiprocessor and cycle."""
    per_cycle = {
        name: CHIP[name].peak_flops / (gpu.cores * gpu.clock * 1e9) for name, gpu in GPUS.items()
    }
    for names, low, high in (
        (("a100-40gb", "a100"), 2000, 2100),
        (("h100", "h100-pcie", "h100-nvl", "h200"), 3500, 4200),
        (("b200",), 7500, 8300),
        (("a6000", "rtx3090", "l4", "l40s", "rtx4090", "rtx5090"), 480, 1100),
    ):
        for name in names:
            assert low < per_cycle[name] < high, (name, per_cycle[name])


def test_the_text_is_a_protocol_buffer_with_every_field_that_the_compiler_needs():
    text = target_config(CHIP["h100"])
    assert text.count("{") == text.count("}")
    fields = dict(re.findall(r"^  (\w+): (\S+)$", text, re.M))
    assert fields["core_count"] == "132" and fields["device_memory_size"] == "84942979072"
    assert fields["shared_memory_per_block_optin"] == "232448"
    assert "major: 9 minor: 0 feature_extension: ACCELERATED_FEATURES" in text
    assert "feature_extension: NONE" in target_config(CHIP["a100"])
    assert "active_links" not in target_config(CHIP["l4"])
