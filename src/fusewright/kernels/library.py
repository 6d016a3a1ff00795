"""Products by torch's own library (cuBLAS), the rest of the region as one pointwise kernel.

The library rounds a 16-bit product when it stores it. So that the result is no less accurate than eager's, a 16-bit
region takes its product in float32, or lets the library add the bias before it rounds, as eager does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from fusewright.chip import Chip
from fusewright.fusion.expression import Access, Accumulator, Apply, Expression, Load, Store, walk
from fusewright.fusion.plan import Buffer, Gemm, Region, View
from fusewright.ir.size import Size
from fusewright.kernels.base import LibraryCall, Program, Refused
from fusewright.kernels.pointwise import pointwise_launch

PRODUCT = "product"


@dataclass(frozen=True)
class Library:
    name: str = "library"

    def supports(self, region: Region, chip: Chip) -> Refused | None:
        if region.gemm is None:
            return Refused(self.name, "no matrix product")
        if any(1 not in m.stride for m in (region.gemm.a, region.gemm.b)):
            return Refused(self.name, "the library would copy an operand")
        return None

    def programs(self, region: Region, chip: Chip) -> Sequence[Program]:
        gemm = region.gemm
        assert gemm is not None
        direct = _direct(region, gemm)
        if direct is not None:
            return [Program(self.name, region, (), library=LibraryCall(gemm.a, gemm.b, None, direct))]
        plain = _with_product(region, chip, None, accumulators(region), gemm.accumulator)
        biased = _biased(region, gemm)
        if biased is None:
            return [plain]
        # The library takes another algorithm where it adds the bias itself; which one is faster depends on the sizes.
        return [biased(chip), plain] if gemm.accumulator == gemm.a.dtype else [biased(chip)]


def _direct(region: Region, gemm: Gemm) -> str | None:
    """The buffer that the product itself is, if storing it is all that the region does."""
    if len(region.sinks) != 1 or not isinstance(region.sinks[0], Store) or len(region.rows) > 1:
        return None
    value, access = region.sinks[0].value, region.sinks[0].access
    if isinstance(value, Apply) and value.op == "cast" and value.dtype == gemm.a.dtype:
        value = value.operands[0]
    plain = access.strides == ((region.columns, 1) if region.rows else (1,)) and access.offset == 0
    stored = isinstance(value, Accumulator) and access.dtype == gemm.a.dtype and plain
    return access.buffer if stored else None


def accumulators(region: Region) -> set[Expression]:
    """The product, wherever a region reads it."""
    return {e for e in walk(s.value for s in region.sinks) if isinstance(e, Accumulator)}


def _biased(region: Region, gemm: Gemm) -> Callable[[Chip], Program] | None:
    """A program whose library call adds a row vector, where the product is read by nothing but that addition."""
    expressions = list(walk(s.value for s in region.sinks))
    readers = [e for e in expressions if isinstance(e, Apply) and any(isinstance(o, Accumulator) for o in e.operands)]
    if len(readers) != 1 or readers[0].op != "add" or any(isinstance(s.value, Accumulator) for s in region.sinks):
        return None
    others = (o for o in readers[0].operands if not isinstance(o, Accumulator))
    bias: Expression | None = next(others, None)
    if isinstance(bias, Apply) and bias.op == "cast":
        bias = bias.operands[0]
    if not isinstance(bias, Load) or bias.access.bits or bias.dtype != gemm.a.dtype:
        return None
    if any(s != 0 for s in bias.access.strides[:-1]) or bias.access.strides[-1] != 1:
        return None
    view = View(bias.access.buffer, (region.columns,), (1,), bias.access.offset)
    return lambda chip: _with_product(region, chip, view, {readers[0]}, gemm.a.dtype)


def _with_product(
    region: Region, chip: Chip, bias: View | None, replaced: set[Expression], dtype: torch.dtype
) -> Program:
    """The library's product in a workspace, then one kernel that reads it in place of `replaced`."""
    gemm = region.gemm
    assert gemm is not None
    rows = gemm.a.shape[0]
    workspace = Buffer(PRODUCT, (rows, region.columns), (region.columns, 1), dtype, torch.device("meta"))
    strides: list[Size] = [*contiguous_rows(region), 1]
    load: Expression = Load(Access(PRODUCT, dtype, tuple(strides)), dtype)
    if dtype != gemm.accumulator:
        load = Apply("cast", (load,), gemm.accumulator)
    known: dict[Expression, Expression] = dict.fromkeys(replaced, load)
    sinks = tuple(Store(substitute(s.value, known), s.access) for s in region.stores)
    rest = Region(region.name, region.rows, region.columns, sinks, region.origins)
    call = LibraryCall(gemm.a, gemm.b, bias, PRODUCT)
    return Program("library", region, (pointwise_launch(rest, chip),), (workspace,), library=call)


def contiguous_rows(region: Region) -> list[Size]:
    """Strides of the row axes in a contiguous matrix."""
    strides: list[Size] = []
    step = region.columns
    for size in reversed(region.rows):
        strides.append(step)
        step = step * size
    return strides[::-1]


def substitute(expression: Expression, known: dict[Expression, Expression]) -> Expression:
    """The expression with others in place of the keys of `known`, to which it adds what it has replaced."""
    if expression not in known:
        if isinstance(expression, Apply):
            operands = tuple(substitute(o, known) for o in expression.operands)
            known[expression] = Apply(expression.op, operands, expression.dtype, expression.origin)
        else:
            known[expression] = expression
    return known[expression]
