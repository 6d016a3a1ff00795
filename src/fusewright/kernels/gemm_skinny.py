"""Products of few rows, such as those of small batches: what counts is to read the weight once, at full bandwidth.

Where the launch before it is one of the same call, such a launch begins early and reads the weight ahead.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import sympy
import torch

from fusewright.chip import Chip
from fusewright.codegen.functor import functor
from fusewright.codegen.launch import BufferArg, LaunchSpec, SizeArg
from fusewright.codegen.scalar import C_TYPES
from fusewright.codegen.text import call
from fusewright.fusion.plan import Gemm, Region
from fusewright.ir.size import evaluate_typical
from fusewright.kernels.base import Program, Refused, comment, initialiser, translation_unit
from fusewright.kernels.gemm_simt import CONFIGS, aligned, blocks, gemm_launch, major

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

MOST_ROWS = 32  # from there on, larger tiles reuse what they read
_MOST_WORTH = 64  # rows for which a launch, made for fewer, is still better than one that is made for many
LEAST_BYTES = 1 << 20  # of the weight: of less, launches cost more than reading

# Of gemm_skinny.cuh: threads, columns of a thread.
_THREADS, _VECTOR = 256, 4

# Estimates, for ranking: shares of the memory's bandwidth and of the tensor cores' rate that are reached, how much more
# the L2 cache gives than memory, how much more one multiprocessor takes than its share, and seconds that a launch adds.
_BANDWIDTH, _RATE, _CACHE, _SHARE, _LAUNCH = 0.85, 0.3, 1.2, 2.0, 3e-6


@dataclass(frozen=True)
class Tile:
    """What a block computes: template parameters of `GemmSkinny`, in tiles of 16 rows and of 8 columns."""

    row_tiles: int
    tiles: int
    itemsize: int

    def __str__(self) -> str:
        return f"{self.rows}×{self.columns}"

    @property
    def rows(self) -> int:
        return 16 * self.row_tiles

    @property
    def columns(self) -> int:
        return 8 * self.tiles

    @property
    def depth(self) -> int:
        """k of a thread's pieces."""
        return 16 // self.itemsize

    @property
    def shared_bytes(self) -> int:
        """As `GemmSkinny::kSharedBytes`: a ring of pieces of both operands."""
        stage = (2 * self.row_tiles + self.tiles) * _THREADS * 16
        return min(8, 98304 // stage) * stage

    def line(self, layout: str) -> int:
        """Elements of B that a thread copies at once."""
        return self.depth if layout == "K" else self.tiles


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
        if major(gemm.a, 1) != "K":
            return Refused(self.name, "rows of operand a are not contiguous")
        if major(gemm.b, 0) == "Strided":
            return Refused(self.name, "operand b has no contiguous dimension")
        if not aligned(gemm.a, 16 // gemm.a.dtype.itemsize) or not _tiles(gemm):
            return Refused(self.name, "lines of an operand are not 16-byte aligned")
        if max(tile.shared_bytes for tile in _tiles(gemm)) > chip.shared_bytes:
            return Refused(self.name, f"{chip.name} has too little shared memory")
        return None

    def programs(self, region: Region, chip: Chip) -> Sequence[Program]:
        assert region.gemm is not None
        programs = [
            Program(self.name, region, (_launch(region, tile),), cost=_cost(region, tile, chip), variant=str(tile))
            for tile in _tiles(region.gemm)
        ]
        return sorted(programs, key=lambda p: p.cost)


def with_more_rows(program: Program, other: Program) -> Program:
    """This family's program where rows turn out few enough, else `other`: the grid of one of the two is empty."""
    assert isinstance(program.region, Region) and program.region.gemm is not None
    few = sympy.Min(1, (_MOST_WORTH + 1) // (program.region.gemm.a.shape[0] + 1))
    launches = [(launch, few) for launch in program.launches] + [(launch, 1 - few) for launch in other.launches]
    return replace(
        program,
        launches=tuple(replace(s, grid=(s.grid[0] * wanted, *s.grid[1:])) for s, wanted in launches),
        workspaces=(*program.workspaces, *other.workspaces),
    )


def _tiles(gemm: Gemm) -> list[Tile]:
    """Those whose copies fit the operands' lines."""
    row_tiles, layout, size = (
        (1 if evaluate_typical(gemm.a.shape[0]) <= 16 else 2),
        major(gemm.b, 0),
        gemm.b.dtype.itemsize,
    )
    tiles = [Tile(row_tiles, count, size) for count in (1, 2, 4)]
    return [t for t in tiles if t.line(layout) * size >= 4 and aligned(gemm.b, t.line(layout))]


def _launch(region: Region, tile: Tile) -> LaunchSpec:
    gemm = region.gemm
    assert gemm is not None
    layout, element = major(gemm.b, 0), C_TYPES[gemm.a.dtype]
    epilogue = functor(region, _VECTOR, wide=True, prefetch=True)
    alias = (
        f"using Gemm = fusewright::GemmSkinny<{element}, {tile.row_tiles}, {tile.tiles}, "
        f"fusewright::Major::{layout}>;\n"
        f"static_assert(Gemm::kThreads == {_THREADS} && Gemm::kSharedBytes == {tile.shared_bytes});"
    )
    operands = [
        *(f"const {element}* __restrict__ a", "int64_t a_row_stride"),
        *(f"const {element}* __restrict__ b", "int64_t b_line_stride"),
        *("int64_t M", "int64_t N", "int64_t K"),
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
    args = (
        BufferArg(gemm.a.buffer, gemm.a.dtype, gemm.a.offset, False, 16),
        SizeArg(gemm.a.stride[0]),
        BufferArg(gemm.b.buffer, gemm.b.dtype, gemm.b.offset, False, tile.line(layout) * tile.itemsize),
        SizeArg(gemm.b.stride[1 if layout == "K" else 0]),
        *(SizeArg(s) for s in (m, n, k)),
        *(p.arg for p in epilogue.parameters),
    )
    return LaunchSpec(
        kernel=region.name,
        source=translation_unit(("gemm_skinny.cuh", "scalar.cuh"), epilogue, alias, "\n".join(kernel)),
        grid=(blocks(m, tile.rows) * blocks(n, tile.columns), 1, 1),
        block=(_THREADS, 1, 1),
        args=args,
        shared_bytes=tile.shared_bytes,
        unaligned=gemm_launch(region, CONFIGS[-1], wide=False),
        early=True,
        ahead=(gemm.b.buffer,),
    )


def _cost(region: Region, tile: Tile, chip: Chip) -> float:
    assert region.gemm is not None
    m, k = (evaluate_typical(s) for s in region.gemm.a.shape)
    return _seconds(m, evaluate_typical(region.columns), k, tile, chip)


def seconds(m: float, n: float, k: float, dtype: torch.dtype, chip: Chip) -> float:
    """Predicted, of the best tile for a weight whose K is contiguous; infinite where the family does not apply."""
    if m > MOST_ROWS or dtype not in DTYPES:
        return math.inf
    row_tiles = 1 if m <= 16 else 2
    return min(_seconds(m, n, k, Tile(row_tiles, tiles, dtype.itemsize), chip) for tiles in (1, 2, 4))


def _seconds(m: float, n: float, k: float, tile: Tile, chip: Chip) -> float:
    """Predicted: what takes longest of reading the weight, having both operands come from the L2 cache, what the
    busiest multiprocessor reads, and the products. Infinite for a small weight, to which this does not apply: such a
    program is there for those who ask for its variant.
    """
    weight = n * k * tile.itemsize
    if weight < LEAST_BYTES or not m:
        return math.inf
    row_blocks = math.ceil(m / tile.rows)
    count = row_blocks * math.ceil(n / tile.columns)
    block = (min(m, tile.rows) + tile.columns) * k * tile.itemsize
    bandwidth = chip.bandwidth * _BANDWIDTH
    busiest = math.ceil(count / chip.multiprocessors) * chip.multiprocessors * block
    products = 2 * row_blocks * tile.rows * n * k * (6 if tile.itemsize == 4 else 1)
    times = (
        row_blocks * weight / bandwidth,
        count * block / (bandwidth * _CACHE),
        busiest / (bandwidth * _SHARE),
        products / (chip.fp16 * _RATE),
    )
    return max(times) + _LAUNCH
