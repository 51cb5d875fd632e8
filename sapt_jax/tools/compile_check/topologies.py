"""Devices that are not there: their published peaks, and stand-ins that XLA compiles for."""

import dataclasses
import importlib.util
import math
import os
import re
from collections.abc import Sequence
from typing import Any

import jax
from jax.experimental import topologies

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Device:
    """One chip or card.

    Attributes:
      flops: bfloat16 matrix FLOPs per second, dense.
      memory: bytes that a program may use.
      bandwidth: of the memory, bytes per second.
      link: bytes per second in one direction, over one link of a TPU's torus, or all links of a GPU to its switch.
      clock: cycles per second that TPU's `flops` imply, or None where the compiler's cycles are not of it.
      source: the vendor's page.
    """

    name: str
    flops: float
    memory: int
    bandwidth: float
    link: float
    clock: float | None
    source: str


# TPUs. Memory is what libtpu lets a program use of the 16, 95 and 32 GB. The pages give the bandwidth of all links of a
# chip, in one direction: 1600 Gbit/s over 4 links, 4800 over 6, 3200 over 4. A matrix unit of v5 does 128 x 128
# multiply-adds per cycle, and a v5e chip has 4 of them, a v5p chip 8.
# GPUs, the SXM cards of 80 GB: all of their memory; half of NVLink's 900 and 600 GB/s, which count both ways.
DEVICES = {
    "v5e": Device(
        "TPU v5e",
        197e12,
        int(15.75 * GIB),
        819e9,
        50e9,
        197e12 / (4 * 2 * 128**2),
        "https://cloud.google.com/tpu/docs/v5e",
    ),
    "v5p": Device(
        "TPU v5p",
        459e12,
        int(95.74 * GIB),
        2765e9,
        100e9,
        459e12 / (8 * 2 * 128**2),
        "https://cloud.google.com/tpu/docs/v5p",
    ),
    "v6e": Device(
        "TPU v6e",
        918e12,
        int(31.25 * GIB),
        1600e9,
        100e9,
        None,
        "https://cloud.google.com/tpu/docs/v6e",
    ),
    "h100": Device(
        "NVIDIA H100 SXM",
        989e12,
        84942979072,
        3350e9,
        450e9,
        None,
        "https://www.nvidia.com/en-us/data-center/h100/",
    ),
    "a100": Device(
        "NVIDIA A100 SXM 80 GB",
        312e12,
        85100068864,
        2039e9,
        300e9,
        None,
        "https://www.nvidia.com/en-us/data-center/a100/",
    ),
}

# What XLA asks to know of a card, as `cudaGetDeviceProperties` tells it.
GPU_PROPERTIES = {
    "h100": {
        "cuda_compute_capability": "{ major: 9 minor: 0 feature_extension: ACCELERATED_FEATURES }",
        "core_count": 132,
        "fpus_per_core": 128,
        "clock_rate_ghz": 1.98,
        "shared_memory_per_core": 233472,
        "shared_memory_per_block_optin": 232448,
        "memory_bandwidth": 3352320000000,
        "l2_cache_size": 52428800,
        "device_interconnect_info": "{ active_links: 18 }",
    },
    "a100": {
        "cuda_compute_capability": "{ major: 8 minor: 0 }",
        "core_count": 108,
        "fpus_per_core": 64,
        "clock_rate_ghz": 1.41,
        "shared_memory_per_core": 167936,
        "shared_memory_per_block_optin": 166912,
        "memory_bandwidth": 2039040000000,
        "l2_cache_size": 41943040,
        "device_interconnect_info": "{ active_links: 12 }",
    },
}
GPU_LIMITS = {
    "threads_per_warp": 32,
    "threads_per_block_limit": 1024,
    "threads_per_core_limit": 2048,
    "shared_memory_per_block": 49152,
    "registers_per_core_limit": 65536,
    "registers_per_block_limit": 65536,
    "block_dim_limit_x": 2147483647,
    "block_dim_limit_y": 65535,
    "block_dim_limit_z": 65535,
    "thread_dim_limit_x": 1024,
    "thread_dim_limit_y": 1024,
    "thread_dim_limit_z": 64,
    "runtime_version": '"12.9.0"',
    "compile_time_toolkit_version": '"12.9.0"',
    "driver_version": '"12.9.0"',
    "dnn_version": '"9.10.0"',
}
# Without a card XLA cannot time its Triton kernels, and for some shapes finds none: matrix products go to cuBLAS.
GPU_OPTIONS = {"xla_gpu_enable_triton_gemm": False, "xla_gpu_autotune_level": 0}


@dataclasses.dataclass(frozen=True)
class Topology:
    """Abstract devices, and where each is in the torus; `coordinates` is empty behind a switch."""

    name: str
    device: Device
    devices: tuple[Any, ...]
    coordinates: dict[int, tuple[int, ...]]
    compiler_options: dict[str, Any] = dataclasses.field(default_factory=dict)

    def bandwidth(self, members: Sequence[int]) -> float:
        """Bytes per second that each of these devices (by id) can receive of the others.

        A slice smaller than a pod is a mesh, not a torus: the chip in its corner has one link along each axis that the
        group extends over, and is the last to be done.
        """
        if not self.coordinates:
            return self.device.link
        axes = zip(*(self.coordinates[member] for member in members), strict=True)
        return self.device.link * max(1, sum(len(set(axis)) > 1 for axis in axes))


def parse(name: str) -> tuple[Device, tuple[int, ...]]:
    """The device and the shape of a topology such as v5p:2x2x2 (chips along each axis) or h100:8 (cards).

    Raises:
      ValueError: says what is wrong with the name.
    """
    kind, _, shape = name.partition(":")
    if kind not in DEVICES or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape):
        raise ValueError(
            f"--topology={name!r} is not understood: name one of {', '.join(DEVICES)} and its shape, as in v5e:4x4, "
            "v5p:2x2x2 or h100:8."
        )
    dims = tuple(int(size) for size in shape.split("x"))
    wanted = {"v5e": 2, "v6e": 2, "v5p": 3}.get(kind, 1)
    if len(dims) != wanted:
        example = "x".join("2" * wanted)
        raise ValueError(f"--topology={name!r}: {DEVICES[kind].name} needs {wanted} size(s), as in {kind}:{example}.")
    return DEVICES[kind], dims


def make_topology(name: str) -> Topology:
    """Stand-ins for the devices of a topology.

    Raises:
      ValueError: a name that is not understood, or a shape that XLA refuses.
      ModuleNotFoundError: the compiler for that kind of device is not installed.
    """
    device, dims = parse(name)
    if device.name.startswith("TPU"):
        devices = _tpu_devices(name, dims)
        return Topology(name, device, devices, {one.id: tuple(one.coords) for one in devices})
    return Topology(name, device, _gpu_devices(name, device, dims[0]), {}, GPU_OPTIONS)


def _tpu_devices(name: str, dims: tuple[int, ...]) -> tuple[Any, ...]:
    if importlib.util.find_spec("libtpu") is None:
        raise ModuleNotFoundError(
            f"--topology={name} needs the TPU compiler: pip install 'jax[tpu]=={jax.__version__}' (but no TPU)."
        )
    # Nobody to ask which TPU this is, and no lock: nothing is run.
    for variable, value in {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }.items():
        os.environ.setdefault(variable, value)
    options = {"chips_per_host_bounds": (1, 1, 1)} if math.prod(dims) == 1 else {}
    try:
        return tuple(topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices)
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(f"--topology={name} is refused by the TPU compiler: {error}") from error


def _gpu_devices(name: str, device: Device, cards: int) -> tuple[Any, ...]:
    if importlib.util.find_spec("jax_cuda12_plugin") is None:
        raise ModuleNotFoundError(
            f"--topology={name} needs the GPU compiler: pip install 'jax[cuda12]=={jax.__version__}' (but no GPU)."
        )
    # The CUDA plugin's check of its libraries asks for a driver.
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    properties = GPU_LIMITS | GPU_PROPERTIES[name.partition(":")[0]] | {"device_memory_size": device.memory}
    fields = "\n".join(
        f"{field} {value}" if str(value).startswith("{") else f"{field}: {value}" for field, value in properties.items()
    )
    description = (
        f'gpu_device_info {{\n{fields}\n}}\nplatform_name: "CUDA"\n'
        f'dnn_version_info {{ major: 9 minor: 10 patch: 0 }}\ndevice_description_str: "{device.name}"\n'
    )
    topology = topologies.get_topology_desc(
        platform="cuda", topology_name=name, topology=f"1x1x{cards}", target_config=description
    )
    return tuple(topology.devices)
