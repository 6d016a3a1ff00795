"""Pointwise regions, and those that also sum over their rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import sympy
import torch

from fusewright.chip import Chip
from fusewright.codegen.functor import Functor, functor
from fusewright.codegen.launch import LaunchSpec, Size, SizeArg
from fusewright.codegen.scalar import C_TYPES
from fusewright.codegen.text import call
from fusewright.fusion.expression import Access, ColumnSum, Load
from fusewright.fusion.plan import Buffer, Region
from fusewright.ir.size import evaluate_typical, product
from fusewright.kernels.base import WAIT, Program, Refused, comment, initialiser, translation_unit

THREADS = 256
# Lanes along a strip of `ColumnSum`.
LANES = 8


@dataclass(frozen=True)
class Pointwise:
    name: str = "pointwise"

    def supports(self, region: Region, chip: Chip) -> Refused | None:
        return Refused(self.name, "a matrix product") if region.gemm else None

    def programs(self, region: Region, chip: Chip) -> Sequence[Program]:
        if any(isinstance(s, ColumnSum) for s in region.sinks):
            return [_column_sum(region, chip)]
        return [Program(self.name, region, (pointwise_launch(region, chip),), cost=_seconds(region, chip))]


def _width(region: Region) -> int:
    """Columns a thread: 16 bytes of the widest type that is read or written."""
    accesses = [*region.accesses(), *(s.access for s in region.sinks)]
    widest = max((a.dtype.itemsize for a in accesses if not a.bits), default=1)
    return max(1, min(8, 16 // widest))


def _rows(region: Region) -> Size:
    return product(region.rows)


def pointwise_launch(region: Region, chip: Chip, wide: bool = True) -> LaunchSpec:
    width = _width(region)
    body = functor(region, width, wide=wide)
    alias = f"using Kernel = fusewright::Pointwise<Epilogue, {THREADS}, {width}>;"
    warps = _ceil(_rows(region) * _ceil(region.columns, 32 * width), 1)
    blocks = _ceil(warps, THREADS // 32)
    limit = chip.multiprocessors * 2048 // THREADS * 4
    return LaunchSpec(
        kernel=region.name,
        source=_unit("pointwise.cuh", body, alias, region, ("rows", "cols")),
        grid=(_at_most(blocks, limit), 1, 1),
        block=(THREADS, 1, 1),
        args=(SizeArg(_rows(region)), SizeArg(region.columns), *(p.arg for p in body.parameters)),
        early=True,
        unaligned=pointwise_launch(region, chip, wide=False) if wide and body.aligned else None,
    )


def _unit(header: str, body: Functor, alias: str, region: Region, sizes: Sequence[str]) -> str:
    kernel = [
        f"// {comment(region)}",
        'extern "C" __global__ void __launch_bounds__(Kernel::kThreads)',
        *call(region.name, [*(f"int64_t {s}" for s in sizes), *(p.declaration for p in body.parameters)], " {"),
        *("    " + line for line in (WAIT, *call("Kernel::run", [*sizes, initialiser(body)], ";"))),
        "}",
    ]
    return translation_unit((header, "scalar.cuh"), body, alias, "\n".join(kernel))


def _column_sum(region: Region, chip: Chip) -> Program:
    """One launch where the columns alone fill the chip; else the rows are split and a second launch adds the splits."""
    width = _width(region)
    strips = _ceil(region.columns, LANES * width)
    rows = _rows(region)
    threads = _sum_threads(region, strips, chip)
    height = threads // LANES
    wanted = chip.multiprocessors / max(1.0, evaluate_typical(strips))
    splits = int(max(1, min(wanted, evaluate_typical(rows) // (4 * height))))
    if splits == 1:
        launch = _sum_launch(region, width, strips, 1, rows, threads)
        return Program("column_sum", region, (launch,), cost=_seconds(region, chip))
    per_split = _ceil(rows, splits)
    partial = tuple(
        Buffer(f"partial{k}", (splits, region.columns), (region.columns, 1), s.value.dtype, torch.device("meta"))
        for k, s in enumerate(s for s in region.sinks if isinstance(s, ColumnSum))
    )
    first = _sum_launch(region, width, strips, splits, per_split, threads)
    second_region = _second(region, partial, splits)
    second_width = _width(second_region)
    second_strips = _ceil(region.columns, LANES * second_width)
    second = _sum_launch(second_region, second_width, second_strips, 1, splits, THREADS)
    return Program("column_sum", region, (first, second), partial, _seconds(region, chip))


def _sum_threads(region: Region, strips: Size, chip: Chip) -> int:
    """Twice as many where there are few blocks a multiprocessor and rows enough: else too few loads are under way. Not
    for many sums, which take registers and shared memory."""
    few = evaluate_typical(strips) < 4 * chip.multiprocessors
    tall = evaluate_typical(_rows(region)) >= 8 * THREADS // LANES
    light = sum(isinstance(s, ColumnSum) for s in region.sinks) <= 4
    return 2 * THREADS if few and tall and light else THREADS


def _second(region: Region, partial: Sequence[Buffer], splits: int) -> Region:
    """The sum of the splits' sums."""
    sums = [s for s in region.sinks if isinstance(s, ColumnSum)]
    sinks = tuple(
        ColumnSum(
            Load(Access(p.name, p.dtype, (region.columns, 1)), p.dtype),
            Access(s.access.buffer, s.access.dtype, (0, s.access.strides[-1]), s.access.offset),
        )
        for p, s in zip(partial, sums, strict=True)
    )
    return Region(f"{region.name}_splits", (splits,), region.columns, sinks, region.origins)


def _sum_launch(
    region: Region, width: int, strips: Size, splits: int, rows_per_split: Size, threads: int, wide: bool = True
) -> LaunchSpec:
    body = functor(region, width, wide=wide, partial=splits > 1)
    sums = [s for s in region.sinks if isinstance(s, ColumnSum)]
    alias = f"using Kernel = fusewright::ColumnSum<Epilogue, {threads}, {width}, {C_TYPES[sums[0].value.dtype]}>;"
    sizes = ("rows", "cols", "rows_per_split")
    return LaunchSpec(
        kernel=region.name,
        source=_unit("column_sum.cuh", body, alias, region, sizes),
        grid=(strips, splits, 1),
        block=(threads, 1, 1),
        args=(
            SizeArg(_rows(region)),
            SizeArg(region.columns),
            SizeArg(rows_per_split),
            *(p.arg for p in body.parameters),
        ),
        early=True,
        unaligned=_sum_launch(region, width, strips, splits, rows_per_split, threads, wide=False)
        if wide and body.aligned
        else None,
    )


def _ceil(size: Size, by: int) -> Size:
    return (size + by - 1) // by


def _at_most(size: Size, limit: int) -> Size:
    return min(size, limit) if isinstance(size, int) else sympy.Min(size, limit)


def _seconds(region: Region, chip: Chip) -> float:
    """Predicted: every operand once, at the chip's bandwidth."""
    elements = evaluate_typical(_rows(region) * region.columns)
    accesses = [*region.accesses(), *(s.access for s in region.sinks)]
    return sum(elements * (1 / 8 if a.bits else a.dtype.itemsize) for a in accesses) / chip.bandwidth
