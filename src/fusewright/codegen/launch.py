"""A launch as data: what the runtime interprets, `emit` prints as C++ and the simulator executes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar

import sympy
import torch

from fusewright.ir.size import Size, evaluate

__all__ = ["Arg", "BufferArg", "FloatArg", "LaunchSpec", "Size", "SizeArg", "TensorMapArg", "evaluate"]


@dataclass(frozen=True)
class BufferArg:
    """A pointer to element `offset` of buffer `buffer`.

    written: the kernel stores through this pointer. alignment: bytes that the pointer must be a multiple of for
    this kernel to be legal; an executable falls back to `LaunchSpec.unaligned` when a tensor does not meet it.
    extent: elements from the pointer onward that the kernel may touch (what the simulator lets it touch).
    """

    buffer: str
    dtype: torch.dtype
    offset: Size = 0
    written: bool = False
    alignment: int = 1
    extent: Size | None = None


@dataclass(frozen=True)
class SizeArg:
    """An `int64_t` parameter: an extent or a stride, in elements."""

    value: Size


@dataclass(frozen=True)
class FloatArg:
    """A floating-point parameter computed from sizes."""

    value: Size | float
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True)
class TensorMapArg:
    """A `CUtensorMap` by value: a tensor in buffer `buffer`, from element `offset` on, for bulk copies of boxes of it.

    dims: extents, the innermost, which has unit stride, first. strides: of the other dimensions, in elements; multiples
    of `alignment` bytes, as the base must be. box: elements of each dimension that one copy moves; what lies outside
    the tensor arrives as zeros. swizzle: bytes, 0 for none. written: the kernel stores boxes. tf32: floats arrive
    rounded to TF32.
    """

    buffer: str
    dtype: torch.dtype
    dims: tuple[Size, ...]
    strides: tuple[Size, ...]
    box: tuple[int, ...]
    swizzle: int = 128
    offset: Size = 0
    written: bool = False
    tf32: bool = False

    alignment: ClassVar[int] = 16  # CUDA driver API, cuTensorMapEncodeTiled

    def at(self, sizes: Mapping[sympy.Symbol, int]) -> TensorMapArg:
        """The same with numbers in place of size symbols."""
        dims, strides = (tuple(int(evaluate(s, sizes)) for s in values) for values in (self.dims, self.strides))
        return replace(self, dims=dims, strides=strides, offset=int(evaluate(self.offset, sizes)))


_MAP_TYPES = {torch.float16: "FLOAT16", torch.bfloat16: "BFLOAT16", torch.float32: "FLOAT32"}


def map_type(arg: TensorMapArg) -> str:
    """The driver's name for what a map's elements are."""
    return f"CU_TENSOR_MAP_DATA_TYPE_{'TFLOAT32' if arg.tf32 else _MAP_TYPES[arg.dtype]}"


Arg = BufferArg | SizeArg | FloatArg | TensorMapArg


@dataclass(frozen=True)
class LaunchSpec:
    """One kernel launch.

    kernel: the `extern "C"` name in `source`. source: a whole translation unit whose `#include "….cuh"` lines
    name files of `fusewright/cuda`. grid: blocks, as sizes; a launch with an empty grid is skipped.
    block: threads. shared_bytes: dynamic shared memory. unaligned: the launch to use when a pointer is less aligned
    than this one needs. early: it may begin before the launch before it has ended, for which it waits itself
    (launch.cuh). ahead: buffers that it reads before it waits.
    """

    kernel: str
    source: str
    grid: tuple[Size, Size, Size]
    block: tuple[int, int, int]
    args: tuple[Arg, ...]
    shared_bytes: int = 0
    cluster: tuple[int, int, int] = (1, 1, 1)
    unaligned: LaunchSpec | None = field(default=None, repr=False)
    early: bool = False
    ahead: tuple[str, ...] = ()

    @property
    def tensor_maps(self) -> bool:
        """Whether it takes tensor maps: then it runs on one architecture alone."""
        return any(isinstance(arg, TensorMapArg) for arg in self.args)

    def symbols(self) -> Iterator[sympy.Symbol]:
        """Yields every size symbol that the launch depends on."""
        values: list[Size | float | None] = [*self.grid]
        for arg in self.args:
            if isinstance(arg, BufferArg):
                values += [arg.offset, arg.extent]
            elif isinstance(arg, TensorMapArg):
                values += [*arg.dims, *arg.strides, arg.offset]
            else:
                values.append(arg.value)
        for value in values:
            if isinstance(value, sympy.Expr):
                yield from value.free_symbols
