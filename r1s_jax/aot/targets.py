"""Compiling for absent accelerators: the real TPU and GPU compilers on any machine.

TPUs need the `libtpu` wheel, H100 the CUDA plugin and compiler wheels (`pip install
"r1s-jax[cuda]"`). Nothing is run: the result is a memory analysis, or the compiler's error.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from r1s_jax.io.errors import UserError
from r1s_jax.system.chips import show_tpu_runtime

# Environment variables that libtpu needs to compile without a TPU.
_TPU_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}

# An H100 SXM as XLA describes one to its compiler.
_H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32
  shared_memory_per_block: 49152 shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84929347584
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  cuda_compute_capability { major: 9 }
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 7 }
runtime_version { major: 13 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""

# Fails the compilation of a GPU kernel that does not fit its registers.
NO_SPILLS = {"xla_gpu_fail_ptx_compilation_on_register_spilling": True}


class CannotCompile(UserError, RuntimeError):
    """The compiler for a target is not installed, or does not know the target."""


def target_devices(topology: str) -> list[Any]:
    """Devices to compile for: "v5e:2x4", "v5p:2x2x1", "v6e:2x4", or "h100:8" for eight H100.

    Raises CannotCompile with the package to install and the compiler's own error.
    """
    kind, _, count = topology.partition(":")
    try:
        if kind == "h100":
            return topologies.get_topology_desc(
                platform="cuda", target_config=_H100, topology=f"1x1x{count or 1}"
            ).devices
        show_tpu_runtime()
        for name, value in _TPU_ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    except Exception as error:
        package = "r1s-jax[cuda]" if kind == "h100" else "libtpu"
        raise CannotCompile(
            f"no such topology as {topology!r}, or no compiler for it (pip install '{package}'): "
            f"{error}"
        ) from error


@contextmanager
def tracing_for(device: Any) -> Iterator[None]:
    """Programs lowered in this context take `device` as the accelerator that they will run on.

    Mosaic kernels read the kind of chip when they are lowered.
    """
    if device.platform != "tpu":
        yield
        return
    chip = AbstractDevice(
        device_kind=device.device_kind, num_cores=device.num_cores, platform="tpu"
    )
    with use_abstract_mesh(AbstractMesh((1,), ("chip",), abstract_device=chip)):
        yield


def compile_for(device: Any, function: Any, *args: Any, **options: Any) -> Any:
    """`jax.jit(function)` compiled for one device that need not be present.

    `args` are arrays or `jax.ShapeDtypeStruct`s; `options` go to the compiler.
    """
    here = jax.sharding.SingleDeviceSharding(device)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), args)
    with tracing_for(device):
        return jax.jit(function).lower(*shapes).compile(compiler_options=options or None)
