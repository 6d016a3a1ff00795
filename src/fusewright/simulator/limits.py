"""Refuses what the chip would refuse: blocks, grids and shared memory that are too large, arguments that do not fit."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from math import prod
from numbers import Integral, Real

import torch

from fusewright.chip import Chip
from fusewright.codegen.launch import Arg, BufferArg, FloatArg, LaunchSpec, SizeArg, TensorMapArg
from fusewright.simulator.buffer import Buffer
from fusewright.simulator.errors import LaunchLimit, Where
from fusewright.simulator.module import KernelFacts, Module
from fusewright.simulator.tensor_map import BYTES, EncodedMap

# CUDA C++ Programming Guide, "Compute capabilities": alike for every chip that fusewright knows.
BLOCK_THREADS = 1024
BLOCK_EXTENT = (1024, 1024, 64)
GRID_EXTENT = (2**31 - 1, 65535, 65535)
STATIC_SHARED_BYTES = 48 * 1024
CLUSTER_BLOCKS = 16  # more than 8 only where the driver is asked for it, as fusewright does
REGISTERS = 65536  # of a multiprocessor


def refused(kernel: str, problem: str) -> LaunchLimit:
    """Returns the error for a launch of `kernel` that cannot be."""
    return LaunchLimit(f"{kernel}: {problem}", Where(kernel))


def check_module(launch: LaunchSpec, module: Module, facts: KernelFacts, chip: Chip) -> None:
    """Checks what does not depend on the grid. Raises LaunchLimit."""
    _check_block(launch, module, facts)
    _check_shared(launch, facts, chip)
    _check_cluster(launch, chip)
    parameters = module.handle[f"{facts.entry}_parameters"]
    parameters.restype = ctypes.POINTER(ctypes.c_uint)
    found = parameters()
    if found[0] != len(launch.args):
        raise refused(launch.kernel, f"the kernel has {found[0]} parameters, and the launch gives {len(launch.args)}")
    for i, arg in enumerate(launch.args):
        if found[1 + i] != _bytes(arg):
            problem = f"parameter {i} has {found[1 + i]} bytes, and {arg} gives {_bytes(arg)}"
            raise refused(launch.kernel, problem)


def _check_block(launch: LaunchSpec, module: Module, facts: KernelFacts) -> None:
    threads = prod(launch.block)
    if not _within(launch.block, 1, BLOCK_EXTENT) or threads > BLOCK_THREADS:
        raise refused(
            launch.kernel,
            f"a block of {launch.block} threads; a block has 1 to {BLOCK_THREADS} threads, and at most {BLOCK_EXTENT} "
            "along x, y and z",
        )
    bound, _ = _launch_bounds(module, facts)
    if bound and threads > bound:
        raise refused(launch.kernel, f"a block of {threads} threads, but __launch_bounds__ allows {bound}")


def _check_shared(launch: LaunchSpec, facts: KernelFacts, chip: Chip) -> None:
    static = sum(variable.bytes for variable in facts.static)
    if static > STATIC_SHARED_BYTES:
        raise refused(
            launch.kernel,
            f"{static} bytes of static shared memory; the limit is {STATIC_SHARED_BYTES}, and only dynamic shared "
            "memory can be larger",
        )
    if not _within((launch.shared_bytes,), 0, (chip.shared_bytes - static,)):
        raise refused(
            launch.kernel,
            f"{static} + {launch.shared_bytes} bytes of static and dynamic shared memory; a block on {chip.name} "
            f"({chip.arch}) can have {chip.shared_bytes}",
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
        raise refused(launch.kernel, f"clusters of blocks, and {chip.name} ({chip.arch}) has none")
    if not _within(launch.cluster, 1, (CLUSTER_BLOCKS,) * 3) or blocks > CLUSTER_BLOCKS:
        raise refused(launch.kernel, f"a cluster of {launch.cluster} blocks; it has 1 to {CLUSTER_BLOCKS}")


def check_launch(launch: LaunchSpec, arguments: Sequence[object], grid: Sequence[int]) -> tuple[int, int, int]:
    """Checks the arguments and the grid, which it returns. Raises LaunchLimit."""
    if len(arguments) != len(launch.args):
        raise refused(launch.kernel, f"it takes {len(launch.args)} arguments, and was given {len(arguments)}")
    for i, (arg, value) in enumerate(zip(launch.args, arguments, strict=True)):
        if problem := _misfit(arg, value):
            raise refused(launch.kernel, f"argument {i} is {problem}")
    blocks = (*grid, 1, 1)[: max(3, len(grid))] if grid else ()
    if not _within(blocks, 0, GRID_EXTENT):
        raise refused(launch.kernel, f"a grid of {tuple(grid)} blocks; the limit is {GRID_EXTENT}")
    x, y, z = map(int, blocks)
    if any(n % cluster for n, cluster in zip((x, y, z), launch.cluster, strict=True)):
        raise refused(launch.kernel, f"a grid of {(x, y, z)} blocks is not made of clusters of {launch.cluster}")
    return x, y, z


def _within(values: Sequence[object], least: int, most: Sequence[int]) -> bool:
    """Whether these are as many whole numbers, none of them out of its range."""
    return len(values) == len(most) and all(
        isinstance(value, Integral) and least <= int(value) <= limit for value, limit in zip(values, most, strict=True)
    )


def _misfit(arg: Arg, value: object) -> str:
    """What is wrong with the value of an argument; "" if nothing is."""
    if isinstance(arg, BufferArg | TensorMapArg):
        if isinstance(value, torch.Tensor):
            fits = _alike(value.dtype, arg.dtype)
            return "" if fits else f"`{arg.buffer}` of {arg.dtype}, and was given a tensor of {value.dtype}"
        fits = isinstance(value, Buffer) or (isinstance(value, EncodedMap) and isinstance(arg, TensorMapArg))
        return "" if fits else f"`{arg.buffer}`, a tensor, and was given {value!r:.60}"
    if isinstance(value, torch.Tensor | Buffer | EncodedMap):
        return "a number, and was given memory"
    if isinstance(arg, SizeArg):
        fits = _within((value,), -(2**63), (2**63 - 1,))
        return "" if fits else f"a whole number of 64 bits, and was given {value!r:.60}"
    fits = isinstance(value, Real) and not (isinstance(value, int) and abs(value) >= 2**1023)
    return "" if fits else f"a number of {arg.dtype}, and was given {value!r:.60}"


def _alike(one: torch.dtype, other: torch.dtype) -> bool:
    """Whether a kernel may take one for the other: integers of one size, since torch does little with unsigned ones."""
    integers = not any(dtype.is_floating_point or dtype.is_complex for dtype in (one, other))
    return one == other or (integers and one.itemsize == other.itemsize)


def _bytes(arg: Arg) -> int:
    if isinstance(arg, TensorMapArg):
        return BYTES
    if isinstance(arg, FloatArg) and arg.dtype != torch.float64:
        return 4
    return ctypes.sizeof(ctypes.c_void_p) if isinstance(arg, BufferArg) else 8
