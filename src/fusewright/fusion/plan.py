"""The fusion plan: steps in order, the buffers between them, and why anything was left apart."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from fusewright.fusion.expression import Access, Load, Sink, Store, walk
from fusewright.ir.encoding import Halves
from fusewright.ir.graph import Node, Origin
from fusewright.ir.size import Size, product


@dataclass(frozen=True)
class Buffer:
    """Memory for one value; shape and strides in elements. A graph input, an intermediate or a result."""

    name: str
    shape: tuple[Size, ...]
    stride: tuple[Size, ...]
    dtype: torch.dtype
    device: torch.device

    @property
    def bytes(self) -> Size:
        return product(n for n, s in zip(self.shape, self.stride, strict=True) if s != 0) * self.dtype.itemsize


@dataclass(frozen=True)
class View:
    """A tensor over a buffer: what ATen's as_strided would give."""

    buffer: str
    shape: tuple[Size, ...]
    stride: tuple[Size, ...]
    offset: Size = 0


@dataclass(frozen=True)
class Matrix:
    """A two-dimensional operand of a product, strides in elements."""

    buffer: str
    dtype: torch.dtype
    shape: tuple[Size, Size]
    stride: tuple[Size, Size]
    offset: Size = 0


@dataclass(frozen=True)
class Encoded:
    """An operand's fp16 halves in `buffer`. transposed: the operand is the transpose of the matrix that they hold."""

    buffer: str
    halves: Halves
    transposed: bool = False


@dataclass(frozen=True)
class Gemm:
    """The anchor of a region that is a product: a [M, K] times b [K, N], summed in `accumulator`.

    encoded: the halves of a and b, where it is to be computed by them. tf32: of float32, floats may be rounded to TF32
    as they are read.
    """

    a: Matrix
    b: Matrix
    accumulator: torch.dtype
    encoded: tuple[Encoded, Encoded] | None = None
    tf32: bool = False


@dataclass(frozen=True)
class Region:
    """One fused computation over rows × columns.

    rows: sizes of the row axes, outermost first (none: a single row). columns: size of the column axis. Accesses have
    one stride for each row axis and one for the columns. sinks: stores and column sums; a mask is packed in whole
    bytes, and read in any order. origins: the operators of the user's model that it computes.
    """

    name: str
    rows: tuple[Size, ...]
    columns: Size
    sinks: tuple[Sink, ...]
    origins: tuple[Origin, ...]
    gemm: Gemm | None = None

    def __post_init__(self) -> None:
        assert all(s.access.in_bytes for s in self.stores if s.access.bits), "a mask is not packed in whole bytes"

    def accesses(self) -> Iterator[Access]:
        for expression in walk(s.value for s in self.sinks):
            if isinstance(expression, Load):
                yield expression.access

    def reads(self) -> list[str]:
        matrices = [self.gemm.a.buffer, self.gemm.b.buffer] if self.gemm else []
        halves = [e.buffer for e in self.gemm.encoded or ()] if self.gemm else []
        return list(dict.fromkeys([*matrices, *halves, *(a.buffer for a in self.accesses())]))

    def writes(self) -> list[str]:
        return [s.access.buffer for s in self.sinks]

    @property
    def stores(self) -> tuple[Store, ...]:
        return tuple(s for s in self.sinks if isinstance(s, Store))

    @property
    def operators(self) -> list[str]:
        return [o.name for o in self.origins]


@dataclass(frozen=True)
class Encode:
    """Splits float32 matrices, whose lines are contiguous, into fp16 halves: `results`, one for each matrix.

    kept: the matrix is a parameter whose halves are kept from one call to the next.
    """

    name: str
    matrices: tuple[Matrix, ...]
    results: tuple[Encoded, ...]
    kept: bool = False
    origins: tuple[Origin, ...] = ()

    def reads(self) -> list[str]:
        return list(dict.fromkeys(m.buffer for m in self.matrices))

    def sampled(self) -> list[str]:
        """What it reads a small part of: products round it in registers, and want its exponent alone."""
        split = {m.buffer for m, r in zip(self.matrices, self.results, strict=True) if r.halves.planes}
        return [name for name in self.reads() if name not in split]

    def writes(self) -> list[str]:
        return [r.buffer for r in self.results]

    @property
    def operators(self) -> list[str]:
        return [f"encode {m.buffer}" for m in self.matrices]


@dataclass(frozen=True)
class Fallback:
    """A node that runs as ATen, or by its reference in torch. results: one buffer each, None where eager gives none."""

    node: Node
    inputs: tuple[View | Size | None, ...]
    results: tuple[str | None, ...]
    origins: tuple[Origin, ...]
    reason: str

    def reads(self) -> list[str]:
        return [i.buffer for i in self.inputs if isinstance(i, View)]

    def writes(self) -> list[str]:
        return [r for r in self.results if r is not None]

    @property
    def name(self) -> str:
        if self.schema:
            return str(self.schema.name.split("::")[1])
        return "a tensor that forward makes" if self.makes else self.node.op

    @property
    def schema(self) -> Any:
        """ATen's; None where no operator of ATen runs."""
        return getattr(dict(self.node.attributes).get("target"), "_schema", None)

    @property
    def makes(self) -> bool:
        """Whether it is a tensor that forward makes, and the graph holds."""
        return self.node.op == "aten" and self.schema is None

    @property
    def operators(self) -> list[str]:
        return [o.name for o in self.origins]


Step = Region | Encode | Fallback


@dataclass(frozen=True)
class Refusal:
    """Why something was not fused: the operators involved and the reason, for `explain`."""

    operators: tuple[str, ...]
    reason: str


@dataclass(frozen=True)
class FusionPlan:
    """inputs: the name of a buffer, or the size, that each argument binds. outputs: a view, a size or None each."""

    inputs: tuple[str | Size | None, ...]
    outputs: tuple[View | Size | None, ...]
    buffers: Mapping[str, Buffer]
    steps: tuple[Step, ...]
    refusals: tuple[Refusal, ...]

    @property
    def regions(self) -> tuple[Region, ...]:
        return tuple(s for s in self.steps if isinstance(s, Region))

    @property
    def encodes(self) -> tuple[Encode, ...]:
        return tuple(s for s in self.steps if isinstance(s, Encode))

    @property
    def fallbacks(self) -> tuple[Fallback, ...]:
        return tuple(s for s in self.steps if isinstance(s, Fallback))

    def origins(self) -> list[Origin]:
        return sorted({o for s in self.steps for o in s.origins})

    def temporary(self, name: str) -> bool:
        """Whether a buffer is neither an argument nor part of a result."""
        kept: set[Any] = {*self.inputs, *(o.buffer for o in self.outputs if isinstance(o, View))}
        return name not in kept
