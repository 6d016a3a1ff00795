"""Products of few rows, such as those of small batches: what counts is to read the weight once, at full bandwidth.

Blocks split K so that they fill the chip, and leave partial sums; the rest of the region is a pointwise kernel that
adds them in order. With one split there is one launch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import torch

from fusewright.chip import Chip
from fusewright.codegen.functor import functor
from fusewright.codegen.launch import BufferArg, LaunchSpec, Size, SizeArg
from fusewright.codegen.scalar import C_TYPES
from fusewright.codegen.text import call
from fusewright.fusion.expression import Access, Accumulator, Apply, Constant, Expression, Load, Store
from fusewright.fusion.plan import Buffer, Gemm, Region
from fusewright.ir.size import evaluate_typical
from fusewright.kernels.base import Program, Refused, comment, initialiser, translation_unit
from fusewright.kernels.gemm_simt import CONFIGS, DOUBLE, DTYPES, aligned, blocks, gemm_launch, major
from fusewright.kernels.library import accumulators, contiguous_rows, substitute
from fusewright.kernels.pointwise import pointwise_launch

PARTIAL = "split_sums"  # sums of each split: [splits · M, N]

MOST_ROWS = 32  # from there on, larger tiles reuse what they read
LEAST_BYTES = 1 << 20  # of the weight: of less, launches cost more than reading
MOST_SPLITS = 16

# Of gemm_skinny.cuh: threads, blocks of a multiprocessor, stages of the ring, lanes that share columns.
_THREADS, _RESIDENT, _STAGES, _LANES_K = 256, 2, 4, 8

# Estimates, for ranking: shares of the chip's bandwidth and rate that are reached, and seconds that a launch adds.
_BANDWIDTH, _RATE, _LAUNCH = 0.85, 0.7, 3e-6


@dataclass(frozen=True)
class Tile:
    """What a block computes. rows: template parameter of `GemmSkinny`. vector: columns of a thread."""

    rows: int
    element: torch.dtype
    accumulator: torch.dtype

    @property
    def vector(self) -> int:
        return 16 // self.accumulator.itemsize

    @property
    def columns(self) -> int:
        return _THREADS // _LANES_K * self.vector

    @property
    def step(self) -> int:
        """k of one stage."""
        return _LANES_K * 16 // self.element.itemsize

    @property
    def shared_bytes(self) -> int:
        """As `GemmSkinny::kSharedBytes`: a panel of rows, and the ring."""
        return self.rows * 2048 + _STAGES * self.vector * _THREADS * 16

    def line(self, layout: str) -> int:
        """Elements of B that a thread copies at once."""
        return 16 // self.element.itemsize if layout == "K" else self.vector


@dataclass(frozen=True)
class GemmSkinny:
    name: str = "gemm_skinny"

    def supports(self, region: Region, chip: Chip) -> Refused | None:
        gemm = region.gemm
        if gemm is None:
            return Refused(self.name, "no matrix product")
        if gemm.a.dtype not in DTYPES or gemm.a.dtype != gemm.b.dtype:
            return Refused(self.name, f"operands of {gemm.a.dtype} and {gemm.b.dtype}")
        if evaluate_typical(gemm.a.shape[0]) > MOST_ROWS:
            return Refused(self.name, f"more than {MOST_ROWS} rows")
        tile, layout = _tile(gemm), major(gemm.b, 0)
        if major(gemm.a, 1) != "K":
            return Refused(self.name, "rows of operand a are not contiguous")
        if layout == "Strided":
            return Refused(self.name, "operand b has no contiguous dimension")
        if not aligned(gemm.a, tile.vector) or not aligned(gemm.b, tile.line(layout)):
            return Refused(self.name, "lines of an operand are not 16-byte aligned")
        if tile.shared_bytes > chip.shared_bytes:
            return Refused(self.name, f"{chip.name} has too little shared memory")
        return None

    def programs(self, region: Region, chip: Chip) -> Sequence[Program]:
        """The best few numbers of splits."""
        assert region.gemm is not None
        tile = _tile(region.gemm)
        most = max(1, min(MOST_SPLITS, int(evaluate_typical(region.gemm.a.shape[1])) // tile.step))
        ranked = sorted(range(1, most + 1), key=lambda splits: _cost(region, tile, splits, chip))
        return [_program(self.name, region, tile, splits, chip) for splits in ranked[:3]]


def _tile(gemm: Gemm) -> Tile:
    few = evaluate_typical(gemm.a.shape[0]) <= 8 or gemm.accumulator == torch.float64
    return Tile(8 if few else 16, gemm.a.dtype, gemm.accumulator)


def _program(family: str, region: Region, tile: Tile, splits: int, chip: Chip) -> Program:
    cost, variant = _cost(region, tile, splits, chip), f"{tile.rows}×{tile.columns}{' split' if splits > 1 else ''}"
    if splits == 1:
        return Program(family, region, (_launch(region, tile, 1, region),), cost=cost, variant=variant)
    gemm = region.gemm
    assert gemm is not None
    dtype, m, n = gemm.accumulator, gemm.a.shape[0], region.columns
    workspace = Buffer(PARTIAL, (splits * m, n), (n, 1), dtype, torch.device("meta"))
    launches = (
        _launch(_partial(region, 1), tile, splits, _partial(region, splits)),
        pointwise_launch(_rest(region, splits), chip),
    )
    return Program(family, region, launches, (workspace,), cost, variant=variant)


def _partial(region: Region, splits: int) -> Region:
    """The product alone, stored as the first split's sums; zeros for the other splits."""
    gemm = region.gemm
    assert gemm is not None
    m, n, dtype = gemm.a.shape[0], region.columns, gemm.accumulator
    sinks = tuple(
        Store(Constant(0, dtype) if s else Accumulator(dtype), Access(PARTIAL, dtype, (n, 1), s * m * n))
        for s in range(splits)
    )
    return Region(f"{region.name}_partial", (m,), n, sinks, region.origins, gemm)


def _rest(region: Region, splits: int) -> Region:
    """The region with the sum of the splits' sums for its product."""
    gemm = region.gemm
    assert gemm is not None
    dtype, elements = gemm.accumulator, gemm.a.shape[0] * region.columns
    strides = (*contiguous_rows(region), 1)
    loads: list[Expression] = [Load(Access(PARTIAL, dtype, strides, s * elements), dtype) for s in range(splits)]
    total = reduce(lambda a, b: Apply("add", (a, b), dtype), loads)
    known: dict[Expression, Expression] = dict.fromkeys(accumulators(region), total)
    sinks = tuple(Store(substitute(s.value, known), s.access) for s in region.stores)
    return Region(region.name, region.rows, region.columns, sinks, region.origins)


def _launch(region: Region, tile: Tile, splits: int, otherwise: Region) -> LaunchSpec:
    """The product in `splits`. otherwise: the region that takes its place where pointers are not aligned."""
    gemm = region.gemm
    assert gemm is not None
    layout = major(gemm.b, 0)
    element, accumulator = C_TYPES[gemm.a.dtype], C_TYPES[gemm.accumulator]
    epilogue = functor(region, tile.vector, wide=True)
    alias = (
        f"using Gemm = fusewright::GemmSkinny<{element}, {accumulator}, {tile.rows}, fusewright::Major::{layout}>;\n"
        f"static_assert(Gemm::kThreads == {_THREADS} && Gemm::kSharedBytes == {tile.shared_bytes});"
    )
    operands = [
        *(f"const {element}* __restrict__ a", "int64_t a_row_stride"),
        *(f"const {element}* __restrict__ b", "int64_t b_line_stride"),
        *("int64_t M", "int64_t N", "int64_t K", "int64_t k_per_split"),
    ]
    passed = [declaration.split()[-1] for declaration in operands]
    kernel = [
        f"// {comment(region)}",
        'extern "C" __global__ void __launch_bounds__(Gemm::kThreads, Gemm::kBlocksPerMultiprocessor)',
        *call(region.name, [*operands, *(p.declaration for p in epilogue.parameters)], " {"),
        *("    " + line for line in call("Gemm::run", [*passed, initialiser(epilogue)], ";")),
        "}",
    ]
    m, k = gemm.a.shape
    n = gemm.b.shape[1]
    size = gemm.a.dtype.itemsize
    args = (
        BufferArg(gemm.a.buffer, gemm.a.dtype, gemm.a.offset, False, tile.vector * size),
        SizeArg(gemm.a.stride[0]),
        BufferArg(gemm.b.buffer, gemm.b.dtype, gemm.b.offset, False, tile.line(layout) * size),
        SizeArg(gemm.b.stride[1 if layout == "K" else 0]),
        *(SizeArg(s) for s in (m, n, k, blocks(k, splits * tile.step) * tile.step)),
        *(p.arg for p in epilogue.parameters),
    )
    config = (DOUBLE if gemm.accumulator == torch.float64 else CONFIGS)[-1]
    tiles: Size = blocks(m, tile.rows) * blocks(n, tile.columns)
    return LaunchSpec(
        kernel=region.name,
        source=translation_unit(("gemm_skinny.cuh", "scalar.cuh"), epilogue, alias, "\n".join(kernel)),
        grid=(tiles, splits, 1),
        block=(_THREADS, 1, 1),
        args=args,
        shared_bytes=tile.shared_bytes,
        comment=comment(region),
        unaligned=gemm_launch(otherwise, config, wide=False),
    )


def _weight_bytes(gemm: Gemm) -> float:
    return evaluate_typical(gemm.b.shape[0]) * evaluate_typical(gemm.b.shape[1]) * gemm.b.dtype.itemsize


def _cost(region: Region, tile: Tile, splits: int, chip: Chip) -> float:
    """Predicted seconds: what takes longer, reading the weight or computing, with the chip as full as the blocks make
    it; then the partial sums, written and read once. Infinite for a small weight, to which this does not apply: such
    a program is there for those who ask for its variant.
    """
    gemm = region.gemm
    assert gemm is not None
    m, k = (evaluate_typical(s) for s in gemm.a.shape)
    n = evaluate_typical(region.columns)
    row_blocks = -(-m // tile.rows)
    count, together = row_blocks * -(-n // tile.columns) * splits, chip.multiprocessors * _RESIDENT
    if not count or _weight_bytes(gemm) < LEAST_BYTES:
        return math.inf
    waves = -(-count // together)
    rate = (chip.fp64 if gemm.accumulator == torch.float64 else chip.fp32) * _RATE
    bandwidth = chip.bandwidth * _BANDWIDTH
    computing = 2 * row_blocks * tile.rows * n * k / rate
    seconds = max(_weight_bytes(gemm) / bandwidth, computing) * waves * together / count + _LAUNCH
    if splits > 1:
        seconds += 2 * splits * m * n * gemm.accumulator.itemsize / bandwidth + _LAUNCH
    return float(seconds)
