"""Runs launches on the CPU: the door to the simulator."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, cast

import torch

from fusewright.chip import CHIPS, DEFAULT_ARCH, Chip
from fusewright.codegen.launch import Arg, BufferArg, FloatArg, LaunchSpec, TensorMapArg
from fusewright.simulator import library, tensor_map
from fusewright.simulator.buffer import Buffer
from fusewright.simulator.errors import OrderDependentResult, Where
from fusewright.simulator.limits import check_launch, check_module, registers_at_launch
from fusewright.simulator.module import KernelFacts, Module, load_module
from fusewright.simulator.report import error_of
from fusewright.simulator.tensor_map import EncodedMap, encode
from fusewright.simulator.toolchain import DEVICE_CODE, find_toolchain

# One value for each argument of the launch: memory that begins where the pointer points, a map of it, a size, a number.
Value = torch.Tensor | Buffer | EncodedMap | int | float


@dataclass(frozen=True)
class Simulator:
    """Compiles and runs kernels on the CPU.

    chip: whose limits hold. device_code: the folder of the `.cuh` files that sources include. debug: compile for a
    debugger, and run all blocks on one OS thread. workers: OS threads, each of which runs whole blocks; 0 means as
    many as there are CPUs. The result does not depend on it.
    """

    chip: Chip = CHIPS[DEFAULT_ARCH]
    device_code: Path = DEVICE_CODE
    debug: bool = False
    workers: int = 0

    def load(self, launches: Sequence[LaunchSpec], *, schedules: int = 1, seed: int = 0) -> Sequence[SimulatedKernel]:
        """Compiles the kernels of `launches` together (or finds them in the cache); returns one callable for each.

        schedules: how many orders of threads and blocks each call tries, `seed`, `seed + 1`, …; order 0 is the natural
        one, 1 its reverse, the others are random. Each is repeatable.
        Raises CompilerMissing, SimulatorCompileError, and LaunchLimit for a launch that the chip would refuse.
        """
        if not launches:
            return []
        toolchain = find_toolchain()
        module = load_module(launches, self.chip, toolchain, self.device_code, self.debug)
        workers = 1 if self.debug else self.workers or os.cpu_count() or 1
        kernels = []
        for launch in launches:
            facts = module.kernels[launch.source, launch.kernel]
            check_module(launch, module, facts, self.chip)
            # Blocks that use atomics may see one another: only one at a time keeps their order repeatable.
            orders = range(seed, seed + max(1, schedules))
            kernels.append(SimulatedKernel(launch, module, facts, orders, 1 if facts.atomics else workers))
        return kernels


@dataclass(frozen=True)
class SimulatedKernel:
    """A launch, ready to run on the CPU as often as one likes."""

    launch: LaunchSpec
    module: Module
    facts: KernelFacts
    orders: Sequence[int]
    workers: int

    def __call__(self, arguments: Sequence[Value], grid: Sequence[int]) -> None:
        """Runs the launch over `grid` blocks (x, y, z).

        arguments: one for each of the launch's: for a BufferArg a CPU tensor (or Buffer) that begins where the pointer
        points, for a TensorMapArg the same or an EncodedMap, for a SizeArg an int, for a FloatArg a float. An empty
        grid, with 0 blocks along an axis, does nothing. An interrupt ends the launch: KeyboardInterrupt.
        Raises a SimulationError for a bug of the kernel; it is a LaunchLimit for a grid that the chip would refuse or
        an argument that does not fit.
        """
        blocks = check_launch(self.launch, arguments, grid)
        if 0 in blocks:
            return
        buffers = self._buffers(arguments)
        written = [b for b, arg in zip(buffers, self.launch.args, strict=True) if b and _writes(arg)]
        before = [ctypes.string_at(b.pointer, b.bytes) for b in written] if len(self.orders) > 1 else []
        first: list[bytes] | None = None
        for order in self.orders:
            if first is not None:
                for buffer, contents in zip(written, before, strict=True):
                    ctypes.memmove(buffer.pointer, contents, buffer.bytes)
            self._run(arguments, buffers, blocks, order)
            if len(self.orders) > 1:
                after = [ctypes.string_at(b.pointer, b.bytes) for b in written]
                if first is not None:
                    self._compare(first, after, order)
                first = after

    def _buffers(self, arguments: Sequence[Value]) -> list[Buffer | None]:
        """Returns the memory behind each pointer argument, cut to the extent that the launch declares."""
        buffers: list[Buffer | None] = []
        for arg, value in zip(self.launch.args, arguments, strict=True):
            if not isinstance(arg, BufferArg | TensorMapArg):
                buffers.append(None)
                continue
            if isinstance(value, EncodedMap):
                value = value.buffer
            buffer = value if isinstance(value, Buffer) else Buffer.of(cast(torch.Tensor, value))
            if isinstance(arg, BufferArg) and isinstance(arg.extent, int):
                buffer = Buffer(buffer.pointer, min(buffer.bytes, arg.extent * arg.dtype.itemsize))
            buffers.append(buffer)
        return buffers

    def _run(
        self, arguments: Sequence[Value], buffers: Sequence[Buffer | None], grid: tuple[int, int, int], order: int
    ) -> None:
        values = [
            _passed(arg, value, buffer, self.launch.kernel)
            for arg, value, buffer in zip(self.launch.args, arguments, buffers, strict=True)
        ]
        pointers = (ctypes.c_void_p * len(values))(*(address for _, address in values))
        ranges = [
            library.Range(
                buffer.pointer,
                buffer.bytes,
                arg.buffer.encode(),
                arg.written,
                not self.launch.early or arg.buffer in self.launch.ahead,
            )
            for arg, buffer in zip(self.launch.args, buffers, strict=True)
            if isinstance(arg, BufferArg | TensorMapArg) and buffer is not None
        ]
        variables = [library.Variable(v.offset, v.bytes, v.name.encode()) for v in self.facts.static]
        variables += [library.Variable(v.offset, v.bytes, None) for v in self.facts.guards]
        if self.facts.dynamic is not None:
            variables.append(library.Variable(self.facts.dynamic, self.launch.shared_bytes, b"dynamic shared memory"))
        handle = self.module.handle
        blocks = grid[0] * grid[1] * grid[2]
        launch = library.Launch(
            entry=ctypes.cast(handle[self.facts.entry], ctypes.c_void_p),
            arguments=pointers,
            anchor=ctypes.cast(handle["fusewright_shared_anchor"], ctypes.c_void_p),
            anchor_offset=self.module.anchor_offset,
            ranges=(library.Range * len(ranges))(*ranges),
            range_count=len(ranges),
            variables=(library.Variable * len(variables))(*variables),
            variable_count=len(variables),
            grid=grid,
            block=self.launch.block,
            cluster=self.launch.cluster,
            registers=registers_at_launch(self.launch, self.module, self.facts),
            seed=order,
            workers=min(self.workers, blocks // prod(self.launch.cluster)),
        )
        failure = library.Failure()
        if self.module.runtime.fusewright_simulator_launch(ctypes.byref(launch), ctypes.byref(failure)):
            if failure.kind == library.INTERRUPTED:
                raise KeyboardInterrupt
            raise error_of(failure, self.launch.kernel, self.module)

    def _compare(self, first: Sequence[bytes], after: Sequence[bytes], order: int) -> None:
        names = [arg for arg in self.launch.args if isinstance(arg, BufferArg | TensorMapArg) and arg.written]
        for arg, one, other in zip(names, first, after, strict=True):
            if one == other:
                continue
            at = next(i for i, (a, b) in enumerate(zip(one, other, strict=True)) if a != b) // arg.dtype.itemsize
            raise OrderDependentResult(
                f"{self.launch.kernel}: element {at} of `{arg.buffer}` differs between orders {self.orders[0]} and "
                f"{order} of the same threads and blocks",
                Where(self.launch.kernel),
            )


def _writes(arg: Arg) -> bool:
    return isinstance(arg, BufferArg | TensorMapArg) and arg.written


def _passed(arg: Arg, value: Value, buffer: Buffer | None, kernel: str) -> tuple[Any, int]:
    """What is passed for one argument: the object that holds it, and the address of the value in there."""
    if isinstance(arg, TensorMapArg):
        encoded = value if isinstance(value, EncodedMap) else encode(arg, cast(Buffer, buffer), kernel)
        held: Any = ctypes.create_string_buffer(encoded.data, len(encoded.data) + tensor_map.ALIGNMENT)
        address = ctypes.addressof(held)
        shift = -address % tensor_map.ALIGNMENT
        ctypes.memmove(address + shift, encoded.data, len(encoded.data))
        return held, address + shift
    held = ctypes.c_void_p(buffer.pointer) if buffer is not None else _scalar(arg, cast(float, value))
    return held, ctypes.addressof(held)


def _scalar(arg: Arg, value: float) -> ctypes.c_int64 | ctypes.c_float | ctypes.c_double:
    if isinstance(arg, FloatArg):
        return ctypes.c_double(value) if arg.dtype == torch.float64 else ctypes.c_float(value)
    return ctypes.c_int64(int(value))
