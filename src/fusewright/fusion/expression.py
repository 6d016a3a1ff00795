"""The one expression language: a DAG of typed scalar operations over operands, with sinks.

Every fused computation is this DAG, whatever kernel it ends up in: the epilogue of a product, a pointwise kernel, what
a column sum adds up. `codegen.cuda` prints it; `fusion.reference` evaluates it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from fusewright.ir.size import Size, divides, same


@dataclass(frozen=True)
class Access:
    """Where an element lives: buffer[offset + Σ index of axis i · strides[i]], in elements.

    bits: the buffer is a packed mask, and offset and strides count bits.
    """

    buffer: str
    dtype: torch.dtype
    strides: tuple[Size, ...]
    offset: Size = 0
    bits: bool = False

    @property
    def in_bytes(self) -> bool:
        """Of a packed mask: whether columns are consecutive bits, and those of each row begin with a byte."""
        starts = (self.offset, *self.strides[:-1])
        return same(self.strides[-1], 1) and all(divides(8, s) is not None for s in starts)


# Expressions are compared by identity: equal subexpressions of one region are one object.
@dataclass(frozen=True, eq=False)
class Load:
    access: Access
    dtype: torch.dtype


@dataclass(frozen=True, eq=False)
class Accumulator:
    """The finished sum of products at this element of a matrix product."""

    dtype: torch.dtype


@dataclass(frozen=True, eq=False)
class Constant:
    """A number, or a value computed from sizes."""

    value: Any
    dtype: torch.dtype


@dataclass(frozen=True, eq=False)
class Apply:
    """A primitive of `ir.primitives` applied to operands; dtype is the result's. origin: the operators it computes."""

    op: str
    operands: tuple[Expression, ...] = field(repr=False)  # a DAG written out as a tree is exponentially long
    dtype: torch.dtype
    origin: tuple[str, ...] = ()


Expression = Load | Accumulator | Constant | Apply


@dataclass(frozen=True, eq=False)
class Store:
    """Writes an element; bits in the access packs booleans."""

    value: Expression
    access: Access


@dataclass(frozen=True, eq=False)
class ColumnSum:
    """Sums over the rows of the region; access has a stride for the column axis only (its last)."""

    value: Expression
    access: Access


Sink = Store | ColumnSum


def walk(roots: Iterable[Expression]) -> Iterator[Expression]:
    """Every distinct expression under `roots`, operands first."""
    seen: set[Expression] = set()
    stack: list[tuple[Expression, bool]] = [(r, False) for r in reversed(list(roots))]
    while stack:
        expression, expanded = stack.pop()
        if expression in seen:
            continue
        if expanded or not isinstance(expression, Apply):
            seen.add(expression)
            yield expression
        else:
            stack.append((expression, True))
            stack.extend((o, False) for o in reversed(expression.operands))
