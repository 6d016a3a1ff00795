"""Tensor maps as the simulator encodes them (runtime/tensor_map.hpp), under the rules of `cuTensorMapEncodeTiled`."""

from __future__ import annotations

import struct
from dataclasses import dataclass

from fusewright.codegen.launch import TensorMapArg
from fusewright.simulator.buffer import Buffer
from fusewright.simulator.errors import LaunchLimit, Where

BYTES, ALIGNMENT = 128, 64
_MAGIC = 0x70616D5F72736E74
_DIMENSIONS = 5
_LAYOUT = struct.Struct(f"=QQ{_DIMENSIONS}Q{_DIMENSIONS - 1}Q{_DIMENSIONS}IHBBB")
_SWIZZLES = {0: 0, 32: 1, 64: 2, 128: 3}


@dataclass(frozen=True)
class EncodedMap:
    """A tensor map and the memory that its tensor lies in."""

    data: bytes
    buffer: Buffer


def encode(arg: TensorMapArg, buffer: Buffer, kernel: str = "") -> EncodedMap:
    """Returns the map of `arg`, whose sizes are numbers, of the tensor that begins with the buffer. kernel: takes it.

    Raises LaunchLimit for what the driver refuses, and for boxes narrower than their swizzle, which are not modelled.
    """
    dims, box = [int(n) for n in arg.dims], [int(n) for n in arg.box]
    strides = [int(s) * arg.dtype.itemsize for s in arg.strides]
    line = box[0] * arg.dtype.itemsize
    rules = (
        (1 <= len(dims) <= _DIMENSIONS, f"has {len(dims)} dimensions, and a map has 1 to {_DIMENSIONS}"),
        (
            len(box) == len(dims) == len(strides) + 1,
            "has not one extent of the box, and but for the first one stride, for each dimension",
        ),
        (buffer.pointer % arg.alignment == 0, f"begins at an address that is no multiple of {arg.alignment}"),
        (all(1 <= n <= 2**32 for n in dims), "has an extent that is not from 1 to 2^32"),
        (
            all(s % arg.alignment == 0 and 0 <= s < 2**40 for s in strides),
            f"has a stride that is no multiple of {arg.alignment} bytes below 2^40",
        ),
        (all(1 <= n <= 256 for n in box), "has a box that is not from 1 to 256 elements along each dimension"),
        (line % 16 == 0, f"has a box {line} bytes wide, no multiple of 16"),
        (arg.swizzle in _SWIZZLES, f"has a swizzle of {arg.swizzle} bytes; there are {', '.join(map(str, _SWIZZLES))}"),
        (arg.swizzle in (0, line), f"has a box {line} bytes wide and a swizzle of {arg.swizzle}; they must agree"),
    )
    for met, problem in rules:
        if not met:
            raise LaunchLimit(
                f"the tensor map of {arg.buffer}, {dims} by strides of {strides} bytes in boxes of {box}, {problem}",
                Where(kernel),
            )

    def padded(values: list[int], length: int) -> list[int]:
        return values + [1] * (length - len(values))

    data = _LAYOUT.pack(
        _MAGIC,
        buffer.pointer,
        *padded(dims, _DIMENSIONS),
        *padded(strides, _DIMENSIONS - 1),
        *padded(box, _DIMENSIONS),
        len(dims),
        arg.dtype.itemsize,
        _SWIZZLES[arg.swizzle],
        arg.tf32,
    )
    return EncodedMap(data.ljust(BYTES, b"\0"), buffer)
