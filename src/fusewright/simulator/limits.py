"""Refuses what the chip would refuse: blocks, grids and shared memory that are too large, arguments that do not fit."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from math import prod

import torch

from fusewright.chip import Chip
from fusewright.codegen.launch import Arg, BufferArg, FloatArg, LaunchSpec, TensorMapArg
from fusewright.simulator.errors import LaunchLimit
from fusewright.simulator.module import KernelFacts, Module
from fusewright.simulator.tensor_map import BYTES

# CUDA C++ Programming Guide, "Compute capabilities": alike for every chip that fusewright knows.
BLOCK_THREADS = 1024
BLOCK_EXTENT = (1024, 1024, 64)
GRID_EXTENT = (2**31 - 1, 65535, 65535)
STATIC_SHARED_BYTES = 48 * 1024
CLUSTER_BLOCKS = 16  # more than 8 only where the driver is asked for it, as fusewright does
REGISTERS = 65536  # of a multiprocessor


def check_module(launch: LaunchSpec, module: Module, facts: KernelFacts, chip: Chip) -> None:
    """Checks what does not depend on the grid. Raises LaunchLimit."""
    _check_block(launch, module, facts)
    _check_shared(launch, facts, chip)
    _check_cluster(launch, chip)
    parameters = module.handle[f"{facts.entry}_parameters"]
    parameters.restype = ctypes.POINTER(ctypes.c_uint)
    found = parameters()
    if found[0] != len(launch.args):
        raise LaunchLimit(f"{launch.kernel} has {found[0]} parameters, and the launch gives {len(launch.args)}")
    for i, arg in enumerate(launch.args):
        if found[1 + i] != _bytes(arg):
            raise LaunchLimit(f"{launch.kernel}: parameter {i} has {found[1 + i]} bytes, and {arg} gives {_bytes(arg)}")


def _check_block(launch: LaunchSpec, module: Module, facts: KernelFacts) -> None:
    threads = launch.block[0] * launch.block[1] * launch.block[2]
    if not 1 <= threads <= BLOCK_THREADS or any(e > limit for e, limit in zip(launch.block, BLOCK_EXTENT, strict=True)):
        raise LaunchLimit(
            f"{launch.kernel}: a block of {launch.block} threads; a block has 1 to {BLOCK_THREADS} threads, and at "
            f"most {BLOCK_EXTENT} along x, y and z"
        )
    bound, _ = _launch_bounds(module, facts)
    if bound and threads > bound:
        raise LaunchLimit(f"{launch.kernel}: a block of {threads} threads, but __launch_bounds__ allows {bound}")


def _check_shared(launch: LaunchSpec, facts: KernelFacts, chip: Chip) -> None:
    static = sum(variable.bytes for variable in facts.static)
    if static > STATIC_SHARED_BYTES:
        raise LaunchLimit(
            f"{launch.kernel}: {static} bytes of static shared memory; the limit is {STATIC_SHARED_BYTES}, and only "
            "dynamic shared memory can be larger"
        )
    if static + launch.shared_bytes > chip.shared_bytes:
        raise LaunchLimit(
            f"{launch.kernel}: {static} + {launch.shared_bytes} bytes of static and dynamic shared memory; a block on "
            f"{chip.name} ({chip.arch}) can have {chip.shared_bytes}"
        )


def _launch_bounds(module: Module, facts: KernelFacts) -> tuple[int, int]:
    """The threads and blocks of the kernel's __launch_bounds__; 0 for what it does not say."""
    bound = module.handle[f"{facts.entry}_bound"]
    bound.restype = ctypes.POINTER(ctypes.c_uint)
    threads, blocks = bound()[:2]
    return threads, blocks


def registers_at_launch(launch: LaunchSpec, module: Module, facts: KernelFacts) -> int:
    """Registers that each thread starts with in a kernel that redistributes them, or 0 where it says no bounds.

    ptxas then gives each thread as many as the bounds leave room for.
    """
    threads, blocks = _launch_bounds(module, facts)
    return min(255, REGISTERS // (threads * blocks)) // 8 * 8 if threads and blocks else 0


def _check_cluster(launch: LaunchSpec, chip: Chip) -> None:
    blocks = prod(launch.cluster)
    if blocks > 1 and int("".join(c for c in chip.arch if c.isdigit())) < 90:
        raise LaunchLimit(f"{launch.kernel}: clusters of blocks, and {chip.name} ({chip.arch}) has none")
    if not 1 <= blocks <= CLUSTER_BLOCKS:
        raise LaunchLimit(f"{launch.kernel}: a cluster of {launch.cluster} blocks; it has 1 to {CLUSTER_BLOCKS}")


def check_launch(launch: LaunchSpec, arguments: Sequence[object], grid: Sequence[int]) -> tuple[int, int, int]:
    """Checks the arguments' number and the grid, which it returns. Raises LaunchLimit."""
    if len(arguments) != len(launch.args):
        raise LaunchLimit(f"{launch.kernel} takes {len(launch.args)} arguments, and was given {len(arguments)}")
    x, y, z = (*grid, 1, 1)[:3]
    if any(not 0 <= blocks <= limit for blocks, limit in zip((x, y, z), GRID_EXTENT, strict=True)):
        raise LaunchLimit(f"{launch.kernel}: a grid of {(x, y, z)} blocks; the limit is {GRID_EXTENT}")
    if any(blocks % cluster for blocks, cluster in zip((x, y, z), launch.cluster, strict=True)):
        raise LaunchLimit(f"{launch.kernel}: a grid of {(x, y, z)} blocks is not made of clusters of {launch.cluster}")
    return x, y, z


def _bytes(arg: Arg) -> int:
    if isinstance(arg, TensorMapArg):
        return BYTES
    if isinstance(arg, FloatArg) and arg.dtype != torch.float64:
        return 4
    return ctypes.sizeof(ctypes.c_void_p) if isinstance(arg, BufferArg) else 8
