"""Products on the CUDA cores: every layout, size and dtype, on every chip. The exact fallback of all products."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import sympy
import torch

from fusewright.chip import Chip
from fusewright.codegen.functor import functor
from fusewright.codegen.launch import Arg, BufferArg, LaunchSpec, Size, SizeArg
from fusewright.codegen.scalar import C_TYPES
from fusewright.codegen.text import call
from fusewright.fusion.plan import Gemm, Matrix, Region
from fusewright.ir.size import divides, evaluate_typical
from fusewright.kernels.base import WAIT, Program, Refused, boolean, comment, initialiser, translation_unit

_LAUNCH = 3e-6  # seconds
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Config:
    """Tile of a block and micro-tile of a thread, in elements: template parameters of `GemmSimt`.

    resident: blocks that a multiprocessor runs at once. efficiency: share of the peak rate when the chip is full.
    unroll: steps along K that are straight code; 0: all of a tile.
    """

    tile_m: int
    tile_n: int
    tile_k: int
    micro_m: int
    micro_n: int
    resident: int
    efficiency: float
    unroll: int = 0

    def __str__(self) -> str:
        return f"{self.tile_m}×{self.tile_n}×{self.tile_k}"

    def threads(self) -> int:
        return self.tile_m * self.tile_n // (self.micro_m * self.micro_n)

    def shared_bytes(self, accumulator: torch.dtype) -> int:
        """Two buffers of both operands' tiles, padded, and the main sums."""
        tiles = 2 * self.tile_k * (self.tile_m + 4 + self.tile_n + 4)
        return (tiles + self.tile_m * self.tile_n) * accumulator.itemsize


# Efficiencies rank, they promise nothing: those of CONFIGS agree with benchmarks/gemm_simt.py at the large sizes,
# DOUBLE's is an estimate. At small sizes the ranking is not always right: see the table that the benchmark fills.
CONFIGS = (
    Config(256, 128, 8, 16, 8, resident=1, efficiency=0.72),
    Config(128, 128, 8, 16, 8, resident=2, efficiency=0.69),
    Config(64, 64, 16, 8, 4, resident=4, efficiency=0.5),
    Config(32, 32, 16, 4, 4, resident=8, efficiency=0.35),
)
DOUBLE = (Config(64, 64, 8, 4, 4, resident=2, efficiency=0.3),)


@dataclass(frozen=True)
class Guard:
    """Lets blocks decide which tiles they compute: further parameters of the kernel, and what it does first.

    before: C++ in which `Gemm` names the product; it ends within a loop over tiles, with the first row and column of
    one in `m` and `n`. blocks: how many, at most.
    """

    name: str
    header: str
    parameters: tuple[tuple[str, Arg], ...]
    blocks: int
    before: tuple[str, ...]


@dataclass(frozen=True)
class GemmSimt:
    name: str = "gemm_simt"

    def supports(self, region: Region, chip: Chip) -> Refused | None:
        if region.gemm is None:
            return Refused(self.name, "no matrix product")
        if region.gemm.a.dtype not in DTYPES or region.gemm.a.dtype != region.gemm.b.dtype:
            return Refused(self.name, f"operands of {region.gemm.a.dtype} and {region.gemm.b.dtype}")
        return None

    def programs(self, region: Region, chip: Chip) -> Sequence[Program]:
        gemm = region.gemm
        assert gemm is not None
        configs = DOUBLE if gemm.accumulator == torch.float64 else CONFIGS
        programs = [
            Program(self.name, region, (gemm_launch(region, c),), cost=_cost(region, c, chip), variant=str(c))
            for c in configs
            if c.shared_bytes(gemm.accumulator) <= chip.shared_bytes
        ]
        return sorted(programs, key=lambda p: p.cost)


def major(matrix: Matrix, k: int) -> str:
    """Which dimension of an operand is contiguous; `k` is the place of its K dimension."""
    if matrix.stride[k] == 1:
        return "K"
    return "MN" if matrix.stride[1 - k] == 1 else "Strided"


def aligned(matrix: Matrix, elements: int) -> bool:
    """Whether every line of the matrix starts at a multiple of `elements` if its base does."""
    strides = [s for s in matrix.stride if s != 1]
    return 1 in matrix.stride and all(divides(elements, s) is not None for s in strides)


def gemm_launch(region: Region, config: Config, wide: bool = True, guard: Guard | None = None) -> LaunchSpec:
    """The product in tiles of `config`. wide: with accesses of several elements, for which pointers must be aligned."""
    gemm = region.gemm
    assert gemm is not None
    element = C_TYPES[gemm.a.dtype]
    vector = 16 // gemm.accumulator.itemsize
    epilogue = functor(region, vector, wide=wide)
    vectorised = wide and aligned(gemm.a, vector) and aligned(gemm.b, vector)
    alignment = vector * gemm.a.dtype.itemsize if vectorised else 1
    operands = [
        *(f"const {element}* __restrict__ a", "int64_t a_row_stride", "int64_t a_k_stride"),
        *(f"const {element}* __restrict__ b", "int64_t b_k_stride", "int64_t b_col_stride"),
        *("int64_t M", "int64_t N", "int64_t K"),
    ]
    passed = [declaration.split()[-1] for declaration in operands]
    name = f"{region.name}_{guard.name}" if guard else region.name
    guarding = guard.parameters if guard else ()
    declared = [*operands, *(d for d, _ in guarding), *(p.declaration for p in epilogue.parameters)]
    kernel = [
        f"// {comment(region)}",
        'extern "C" __global__ void __launch_bounds__(Gemm::kThreads, Gemm::kBlocksPerMultiprocessor)',
        *call(name, declared, " {"),
        *("    " + line for line in (WAIT, *_body(passed, initialiser(epilogue), guard))),
        "}",
    ]
    m, k = gemm.a.shape
    n = gemm.b.shape[1]
    args = (
        BufferArg(gemm.a.buffer, gemm.a.dtype, gemm.a.offset, False, alignment),
        *(SizeArg(s) for s in gemm.a.stride),
        BufferArg(gemm.b.buffer, gemm.b.dtype, gemm.b.offset, False, alignment),
        *(SizeArg(s) for s in (*gemm.b.stride, m, n, k)),
        *(arg for _, arg in guarding),
        *(p.arg for p in epilogue.parameters),
    )
    tiles: Size = blocks(m, config.tile_m) * blocks(n, config.tile_n)
    return LaunchSpec(
        kernel=name,
        source=translation_unit(
            ("gemm_simt.cuh", *([guard.header] if guard else []), "scalar.cuh"),
            epilogue,
            _instantiation(gemm, config, vectorised),
            "\n".join(kernel),
        ),
        grid=(smaller(tiles, guard.blocks) if guard else tiles, 1, 1),
        block=(config.threads(), 1, 1),
        args=args,
        shared_bytes=config.shared_bytes(gemm.accumulator),
        early=True,
        unaligned=gemm_launch(region, config, wide=False, guard=guard) if vectorised or epilogue.aligned else None,
    )


def _instantiation(gemm: Gemm, config: Config, vectorised: bool) -> str:
    element, accumulator = C_TYPES[gemm.a.dtype], C_TYPES[gemm.accumulator]
    tile = (config.tile_m, config.tile_n, config.tile_k)
    sizes = (gemm.a.shape[0], gemm.b.shape[1], gemm.a.shape[1])
    numbers = ", ".join(str(n) for n in tile)
    layouts = ", ".join(f"fusewright::Major::{major(m, k)}" for m, k in ((gemm.a, 1), (gemm.b, 0)))
    micro = f"{boolean(vectorised)}, {config.micro_m}, {config.micro_n}"
    how = f"/*Whole*/{boolean(tiled(sizes, tile))}, /*Unroll*/{config.unroll or config.tile_k}"
    return f"using Gemm = fusewright::GemmSimt<{element}, {accumulator}, {numbers}, {layouts},\n    {micro}, {how}>;"


def _body(passed: Sequence[str], epilogue: str, guard: Guard | None) -> list[str]:
    if guard is None:
        return call("Gemm::run", [*passed, epilogue], ";")
    lines = call("Gemm::run_tile", [*passed, "m", "n", epilogue], ";")
    return [*guard.before, *("    " + line for line in lines), "}"]


def smaller(a: Size, b: Size) -> Size:
    return min(a, b) if isinstance(a, int) and isinstance(b, int) else sympy.Min(a, b)


def blocks(size: Size, tile: int) -> Size:
    """How many tiles cover a size."""
    return (size + tile - 1) // tile


def tiled(sizes: Sequence[Size], tile: Sequence[int]) -> bool:
    """Whether sizes are known to be multiples of the tile's, so that no tile ends beyond them."""
    return all(divides(t, s) is not None for s, t in zip(sizes, tile, strict=True))


def seconds(m: float, n: float, k: float, chip: Chip) -> float:
    """Predicted for a product in float32 by the best of CONFIGS."""
    return min(_seconds(m, n, k, config, chip.fp32, chip) for config in CONFIGS)


def _cost(region: Region, config: Config, chip: Chip) -> float:
    assert region.gemm is not None
    m, k = (evaluate_typical(s) for s in region.gemm.a.shape)
    n = evaluate_typical(region.gemm.b.shape[1])
    rate = chip.fp64 if region.gemm.accumulator == torch.float64 else chip.fp32
    return _seconds(m, n, k, config, rate, chip)


def _seconds(m: float, n: float, k: float, config: Config, rate: float, chip: Chip) -> float:
    """The blocks of the busiest multiprocessor at the rate of its cores, smaller ones at less of it. A few, which wait
    for memory, take as long as half of those that it holds (benchmarks/results/gemm_simt.json)."""
    tiles = -(-m // config.tile_m) * -(-n // config.tile_n)
    busiest = max(-(-tiles // chip.multiprocessors), config.resident / 2)
    rate *= config.efficiency / chip.multiprocessors
    return float(busiest * 2 * config.tile_m * config.tile_n * k / rate) + _LAUNCH
