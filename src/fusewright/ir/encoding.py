"""fp16 halves of a float32 matrix: how the one buffer that holds them is laid out.

`cuda/split_f16.cuh` has the same arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fusewright.ir.graph import TensorType, contiguous
from fusewright.ir.size import Size


@dataclass(frozen=True)
class Halves:
    """A float32 matrix of `lines` lines of `length` consecutive elements, as fp16 planes with a power of two in common,
    or one a line.

    planes: hi and lo, or hi alone. by_line: each line has an exponent of its own, which follows from its largest
    magnitude; else they have one in common. The buffer is made of 32-bit words, in this order: the planes, [planes,
    lines, padded] of fp16; the bits of the largest magnitude of every line; then, unless by line, of every column; and
    the exponent. Without planes it is the exponent alone: products read the matrix itself and round it in registers.
    """

    lines: Size
    length: Size
    planes: int
    by_line: bool = False

    @classmethod
    def of(cls, shape: Sequence[Size], planes: int, by_line: bool = False) -> Halves:
        lines, length = shape
        return cls(lines, length, planes, by_line)

    @property
    def padded(self) -> Size:
        """Elements from one line of a plane to the next: bulk copies want multiples of 16 bytes, and are twice as fast
        where lines lie at multiples of 128."""
        return (self.length + 63) // 64 * 64

    @property
    def plane(self) -> Size:
        """Elements of a plane."""
        return self.lines * self.padded

    @property
    def words(self) -> Size:
        if not self.planes:
            return 1
        planes = self.planes * self.lines * ((self.length + 63) // 64) * 32
        return planes + self.lines + (0 if self.by_line else self.length + 1)

    def type(self, device: torch.device) -> TensorType:
        """Of the buffer."""
        return contiguous((self.words,), torch.int32, device)
