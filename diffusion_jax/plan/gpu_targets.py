"""What XLA's GPU compiler has to know of a GPU that is not there, as text of its protocol buffer.

The compiler reads stream_executor.GpuTargetConfigProto. Limits of an architecture come from the
table "Technical Specifications per Compute Capability" of the CUDA programming guide; numbers of
multiprocessors, clocks and caches from NVIDIA's data sheets and white papers, and where OpenXLA
keeps a description of the chip (xla/backends/gpu/target_config/specs: a100, a6000, b200, h100,
h200) from there. Bandwidth is in devices.chips.
"""

from typing import NamedTuple

from diffusion_jax.devices.chips import GIB, Chip
from diffusion_jax.devices.gpu_memory import SHARE

MIB = 2**20
# The versions that the pinned packages bring.
CUDA, CUDNN = "13.0.0", (9, 10, 0)
# Bytes for the workspaces of cuDNN and cuBLAS, which are chosen on the device and are in no plan.
WORKSPACES = GIB


class Architecture(NamedTuple):
    """Limits of a multiprocessor: bytes of shared memory, threads, and float32 units."""

    shared_memory: int
    threads: int
    fpus: int
    accelerated: bool = False


ARCHITECTURES = {
    (8, 0): Architecture(164 * 1024, 2048, 64),
    (8, 6): Architecture(100 * 1024, 1536, 128),
    (8, 9): Architecture(100 * 1024, 1536, 128),
    (9, 0): Architecture(228 * 1024, 2048, 128, accelerated=True),
    (10, 0): Architecture(228 * 1024, 2048, 128, accelerated=True),
    (12, 0): Architecture(100 * 1024, 1536, 128),
}


class Gpu(NamedTuple):
    """One GPU: multiprocessors, clock in GHz, bytes of the L2 cache, bytes that the driver shows.

    links: NVLinks, 0 without.
    """

    name: str
    cores: int
    clock: float
    l2_cache: int
    memory: int
    links: int = 0


GPUS = {
    "a100-40gb": Gpu("NVIDIA A100-SXM4-40GB", 108, 1.41, 40 * MIB, 42331013120, 12),
    "a100": Gpu("NVIDIA A100-SXM4-80GB", 108, 1.41, 40 * MIB, 85100068864, 12),
    "h100": Gpu("NVIDIA H100 80GB HBM3", 132, 1.98, 50 * MIB, 84942979072, 18),
    "h100-pcie": Gpu("NVIDIA H100 PCIe", 114, 1.755, 50 * MIB, 84942979072),
    "h100-nvl": Gpu("NVIDIA H100 NVL", 132, 1.785, 50 * MIB, 95830 * MIB, 12),
    "h200": Gpu("NVIDIA H200", 132, 1.98, 50 * MIB, 151397597184, 18),
    "b200": Gpu("NVIDIA B200", 148, 1.965, 132644864, 191514411008, 18),
    "l4": Gpu("NVIDIA L4", 58, 2.04, 48 * MIB, 23034 * MIB),
    "l40s": Gpu("NVIDIA L40S", 142, 2.52, 96 * MIB, 46068 * MIB),
    "a6000": Gpu("NVIDIA RTX A6000", 84, 1.8, 6 * MIB, 51041271808, 4),
    "rtx3090": Gpu("NVIDIA GeForce RTX 3090", 82, 1.695, 6 * MIB, 24576 * MIB, 4),
    "rtx4090": Gpu("NVIDIA GeForce RTX 4090", 128, 2.52, 72 * MIB, 24564 * MIB),
    "rtx5090": Gpu("NVIDIA GeForce RTX 5090", 170, 2.407, 96 * MIB, 32607 * MIB),
}


def usable_bytes(chip: Chip) -> int:
    """Compute the bytes that a program may have of what JAX has of a GPU."""
    return int(SHARE * GPUS[chip.name].memory) - WORKSPACES


def target_config(chip: Chip) -> str:
    """Write the description of a GPU as the compiler reads it: text of GpuTargetConfigProto.

    Raises:
        KeyError: the chip is no GPU of GPUS.
    """
    gpu, capability = GPUS[chip.name], chip.capability
    assert capability is not None
    architecture = ARCHITECTURES[capability]
    major, minor = capability
    suffix = "a" if architecture.accelerated else ""
    features = "ACCELERATED_FEATURES" if architecture.accelerated else "NONE"
    dnn = ".".join(map(str, CUDNN))
    links = f"device_interconnect_info {{ active_links: {gpu.links} }}" if gpu.links else ""
    return f"""
gpu_device_info {{
  name: "{gpu.name}"
  device_vendor: "NVIDIA Corporation"
  platform_version: "Compute Capability {major}.{minor}{suffix}"
  cuda_compute_capability {{ major: {major} minor: {minor} feature_extension: {features} }}
  core_count: {gpu.cores}
  clock_rate_ghz: {gpu.clock}
  fpus_per_core: {architecture.fpus}
  device_memory_size: {gpu.memory}
  memory_bandwidth: {int(chip.hbm_bandwidth)}
  l2_cache_size: {gpu.l2_cache}
  shared_memory_per_core: {architecture.shared_memory}
  shared_memory_per_block: {48 * 1024}
  shared_memory_per_block_optin: {architecture.shared_memory - 1024}
  threads_per_core_limit: {architecture.threads}
  threads_per_block_limit: 1024
  threads_per_warp: 32
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  device_address_bits: 64
  driver_version: "{CUDA}"
  runtime_version: "{CUDA}"
  compile_time_toolkit_version: "{CUDA}"
  dnn_version: "{dnn}"
  {links}
}}
platform_name: "CUDA"
dnn_version_info {{ major: {CUDNN[0]} minor: {CUDNN[1]} patch: {CUDNN[2]} }}
device_description_str: "{gpu.name}"
"""
