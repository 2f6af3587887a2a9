"""What accelerators can do at best, by their names in JAX: for utilisation and for planning.

Every figure is per `jax.Device`, which is half a chip of TPU v3 and 7x. Peaks are for dense
bfloat16 products with float32 sums; data sheets of NVIDIA often give twice as much, with sparsity.
"""

import re
from typing import NamedTuple, TypeAlias

Real: TypeAlias = int | float
GB, GIB = 10**9, 2**30


class Chip(NamedTuple):
    """One accelerator.

    kind: regex that its whole `jax.Device.device_kind` matches. peak_flops: FLOP/s in bfloat16.
    hbm: bytes of its memory. hbm_bandwidth: bytes/s. interconnect: bytes/s to its neighbours, all
    links together, one way (ICI, NVLink, or else PCIe). capability: the compute capability of a GPU
    of NVIDIA.
    """

    name: str
    kind: str
    peak_flops: float
    hbm: int
    hbm_bandwidth: float
    interconnect: float
    capability: tuple[int, int] | None = None


def _chip(
    name: str,
    kind: str,
    teraflops: Real,
    hbm: Real,
    bandwidth: Real,
    interconnect: Real,
    capability: tuple[int, int] | None = None,
) -> Chip:
    """Make a chip of the figures in data sheets: TFLOP/s, bytes, GB/s of memory and links."""
    speeds = (float(bandwidth) * GB, float(interconnect) * GB)
    return Chip(name, kind, float(teraflops) * 1e12, int(hbm), *speeds, capability)


CHIPS = (
    # https://cloud.google.com/tpu/docs/system-architecture-tpu-vm and the page of each version (v3,
    # v4, v5e, v5p, v6e, tpu7x); links of v3 from Jouppi et al. 2023 (arXiv:2304.01433, table 4).
    # The pages give both directions of the interconnect together, so it is halved here.
    _chip("v3", r"TPU v3", 123 / 2, 32 * GIB / 2, 900 / 2, 4 * 70 / 2),
    _chip("v4", r"TPU v4", 275, 32 * GIB, 1228, 6 * 50),
    _chip("v5e", r"TPU v5( lite|e)", 197, 16 * GIB, 819, 200),
    _chip("v5p", r"TPU v5p?", 459, 95 * GIB, 2765, 600),
    _chip("v6e", r"TPU v6( lite|e)", 918, 32 * GIB, 1638, 400),
    _chip("v7x", r"TPU( v)?7x?", 2307 / 2, 192 * GIB / 2, 7380 / 2, 600 / 2),
    # https://www.nvidia.com/en-us/data-center/a100, /h100, /h200, /l4, /l40s, /hgx (their data
    # sheets); for the others the white papers of the Ampere GA102, Ada and Blackwell architectures;
    # compute capability: https://developer.nvidia.com/cuda-gpus.
    _chip("a100-40gb", r"NVIDIA A100-(SXM4|PCIE)-40GB", 312, 40 * GIB, 1555, 300, (8, 0)),
    _chip("a100", r"NVIDIA A100(-SXM4-80GB| 80GB PCIe)", 312, 80 * GIB, 2039, 300, (8, 0)),
    _chip("h100", r"NVIDIA H100 80GB HBM3", 989, 80 * GIB, 3350, 450, (9, 0)),
    _chip("h100-pcie", r"NVIDIA H100 PCIe", 756, 80 * GIB, 2000, 300, (9, 0)),
    _chip("h100-nvl", r"NVIDIA H100 NVL", 835, 94 * GIB, 3900, 300, (9, 0)),
    _chip("h200", r"NVIDIA H200( 141GB HBM3e)?", 989, 140 * GIB, 4800, 450, (9, 0)),
    _chip("b200", r"NVIDIA B200", 2250, 179 * GIB, 7700, 900, (10, 0)),
    _chip("l4", r"NVIDIA L4", 121, 24 * GB, 300, 32, (8, 9)),
    _chip("l40s", r"NVIDIA L40S", 362, 48 * GB, 864, 32, (8, 9)),
    _chip("a6000", r"NVIDIA RTX A6000", 154.8, 48 * GIB, 768, 56, (8, 6)),
    _chip("rtx3090", r"NVIDIA GeForce RTX 3090", 71, 24 * GIB, 936, 56, (8, 6)),
    _chip("rtx4090", r"NVIDIA GeForce RTX 4090", 165.2, 24 * GIB, 1008, 32, (8, 9)),
    _chip("rtx5090", r"NVIDIA GeForce RTX 5090", 209.5, 32 * GIB, 1792, 64, (12, 0)),
)


def find_chip(device_kind: str) -> Chip | None:
    """Find the chip of a `jax.Device.device_kind`; None where it is not known, as for a CPU."""
    for chip in CHIPS:
        if re.fullmatch(chip.kind, device_kind):
            return chip
    return None
