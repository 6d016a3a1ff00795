"""Products on Hopper's tensor cores: bf16 and fp16, and float32 by products of fp16 halves, with any epilogue.

16-bit operands are copied to shared memory as they lie. float32 operands are read as halves (`split_f16`), where the
format stage had them made: two halves whose three products give float32's accuracy (F16x3), or, where torch's flags
allow TF32, one of TF32's precision (F16x1). Tiles with rows or columns that the halves cannot hold are then computed
again on the CUDA cores; the host is not told and does not wait. A right operand that has no halves, since too few
products read it, is rounded to one in registers: then the transposed product is computed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import sympy
import torch

from fusewright.chip import Chip
from fusewright.codegen.functor import functor
from fusewright.codegen.launch import Arg, LaunchSpec, Size, SizeArg
from fusewright.codegen.scalar import C_TYPES
from fusewright.codegen.text import call
from fusewright.fusion.expression import Apply, walk
from fusewright.fusion.plan import Gemm, Region
from fusewright.ir.size import divides, evaluate_typical
from fusewright.kernels import gemm_simt, gemm_skinny
from fusewright.kernels.base import Program, Refused, boolean, comment, initialiser, translation_unit
from fusewright.kernels.gemm_simt import blocks, gemm_launch, smaller, tiled
from fusewright.kernels.split_f16 import (
    Operand,
    SplitOperand,
    lost_arg,
    lost_flags,
    mark_lost,
    patch_guard,
    split_seconds,
)

ARCH = "sm_90a"
THREADS, TILE_K = 384, 64
_LINE = 8  # elements: bulk copies want lines at multiples of 16 bytes
_LEAST_K = {1: 64, 3: 128}  # by products: below, plain float32 is as fast or more accurate
# Seldom runs, and always compiles.
_PATCH = gemm_simt.Config(128, 128, 8, 16, 8, resident=2, efficiency=0.69, unroll=2)

# Shares of their peak rates that torch's products reach, for comparison.
_TF32, _FP32 = 0.85, 0.72
# Seconds, for ranking: what a launch adds, and what an epilogue that overlaps with nothing does, by sums of a thread,
# with nothing but a store to do and for each operation.
_LAUNCH, _STORE, _OPERATION = 3e-6, 2e-6 / 128, 0.7e-6 / 128


@dataclass(frozen=True)
class Tile:
    """What one block computes, and the stages of its ring. efficiency: share of the peak rate when the chip is full.

    registers: the right operand is rounded in registers. ping_pong: each warpgroup computes whole tiles, in turn.
    """

    m: int
    n: int
    stages: int
    efficiency: float
    registers: bool = False
    ping_pong: bool = False

    def __str__(self) -> str:
        how = " in registers" if self.registers else " ping-pong" if self.ping_pong else ""
        return f"{self.m}×{self.n}×{TILE_K}{how}"

    @property
    def sums(self) -> int:
        """How many a thread holds."""
        return self.m * self.n // (128 if self.ping_pong else 256)

    def shared_bytes(self, products: int, vector: int) -> int:
        """As `kSharedBytes` in the kernels: the ring, the warps' slabs, the barriers, and room to align."""
        planes = 2 if products == 3 else 1
        ring = self.stages * planes * (self.m + self.n * (2 if self.registers else 1)) * TILE_K * 2
        return ring + 8 * 16 * 8 * vector * 4 + (2 * self.stages + 2) * 8 + 1024


# By number of products. Efficiencies as in docs/lab/gemm.md.
TILES = {
    1: (
        Tile(128, 256, 4, 0.81),
        Tile(256, 128, 4, 0.80),
        Tile(128, 128, 6, 0.77, ping_pong=True),
        Tile(128, 128, 6, 0.77),
    ),
    3: (Tile(128, 128, 3, 0.80),),
}
IN_REGISTERS = (Tile(256, 128, 3, 0.67, registers=True), Tile(128, 128, 4, 0.50, registers=True))


@dataclass(frozen=True)
class GemmSm90:
    name: str = "gemm_sm90"

    def supports(self, region: Region, chip: Chip) -> Refused | None:
        gemm = region.gemm
        if gemm is None:
            return Refused(self.name, "no matrix product")
        if chip.arch != ARCH:
            return Refused(self.name, f"needs the tensor cores of {ARCH}")
        if gemm.a.dtype != gemm.b.dtype or gemm.accumulator != torch.float32:
            return Refused(self.name, f"operands of {gemm.a.dtype} and {gemm.b.dtype}, summed in {gemm.accumulator}")
        if gemm.encoded:
            return None
        if gemm.a.dtype == torch.float32:
            return Refused(self.name, "float32 operands that are not split into halves")
        if evaluate_typical(gemm.a.shape[1]) < _LEAST_K[1]:
            return Refused(self.name, f"sums of fewer than {_LEAST_K[1]} products")
        for operand in (Operand("a", gemm.a), Operand("b", gemm.b)):
            if operand.major == "Strided":
                return Refused(self.name, f"operand {operand.name} has no contiguous dimension")
            if not _copies_in_bulk(operand):
                return Refused(self.name, f"lines of operand {operand.name} are not 16-byte aligned")
        return None

    def programs(self, region: Region, chip: Chip) -> Sequence[Program]:
        gemm = region.gemm
        assert gemm is not None
        make = _split_program if gemm.encoded else _direct_program
        tiles = IN_REGISTERS if _in_registers(gemm) else TILES[_products(gemm)]
        programs = [make(self.name, region, tile, chip) for tile in tiles]
        return sorted(programs, key=lambda p: p.cost)


@dataclass(frozen=True)
class HalfProducts:
    """What float32 products gain from halves on a chip, as `passes.format` asks.

    tf32: torch's flags allow TF32's precision. library: torch's products would compute what is not split.
    """

    chip: Chip
    tf32: bool
    library: bool

    @property
    def planes(self) -> int:
        return 1 if self.tf32 else 2

    @property
    def products(self) -> int:
        return 1 if self.tf32 else 3

    def gain(self, m: float, n: float, k: float) -> float:
        if k < _LEAST_K[self.products]:
            return -math.inf
        return self._otherwise(m, n, k) - self._best(m, n, k, TILES[self.products]) - _LAUNCH

    def registers(self, m: float, n: float, k: float) -> float:
        if self.products != 1:
            return math.inf
        longer = self._best(m, n, k, IN_REGISTERS) - self._best(m, n, k, TILES[1])
        return max(0.0, longer) + split_seconds(k * n, 0, self.chip)

    def split(self, elements: float) -> float:
        return split_seconds(elements, self.planes, self.chip) + 2 * _LAUNCH

    def _best(self, m: float, n: float, k: float, tiles: Sequence[Tile]) -> float:
        return min(_seconds(m, n, k, tile, self.products, self.chip) for tile in tiles)

    def _otherwise(self, m: float, n: float, k: float) -> float:
        """float32 on the CUDA cores, or torch's TF32: tiles of 64 or 128, each on a multiprocessor of its own. Of few
        rows, what reads the weight as it lies."""
        tile, rate = (128, self.chip.fp16 / 2 * _TF32) if self.tf32 and self.library else (64, self.chip.fp32 * _FP32)
        waves = math.ceil(math.ceil(m / tile) * math.ceil(n / tile) / self.chip.multiprocessors)
        tiled = waves * 2 * tile * tile * k / (rate / self.chip.multiprocessors)
        return min(tiled, gemm_skinny.seconds(m, n, k, torch.float32, self.chip))


def _products(gemm: Gemm) -> int:
    """How many products of halves make one of the operands'."""
    return 3 if gemm.encoded and gemm.encoded[0].halves.planes == 2 else 1


def _in_registers(gemm: Gemm) -> bool:
    """Whether the right operand is rounded in registers."""
    return gemm.encoded is not None and not gemm.encoded[1].halves.planes


def _copies_in_bulk(operand: Operand) -> bool:
    stride = operand.line_stride
    return stride != 0 and divides(_LINE, stride) is not None


def _direct_program(family: str, region: Region, tile: Tile, chip: Chip) -> Program:
    """16-bit operands as they lie."""
    gemm = region.gemm
    assert gemm is not None
    launches = [_launch(region, tile, Operand("a", gemm.a), Operand("b", gemm.b), chip)]
    if not isinstance(gemm.a.shape[1], int):  # a sum of nothing: there are no maps of empty tensors
        empty = gemm_launch(region, _PATCH)
        launches.append(replace(empty, grid=(empty.grid[0] * (1 - sympy.Min(gemm.a.shape[1], 1)), 1, 1)))
    return Program(family, region, tuple(launches), cost=_region_seconds(region, tile, chip), variant=str(tile))


def _split_program(family: str, region: Region, tile: Tile, chip: Chip) -> Program:
    """float32 operands by their halves: multiply, patch."""
    gemm = region.gemm
    assert gemm is not None and gemm.encoded is not None
    a, b = (SplitOperand(n, m, e) for n, m, e in zip("ab", (gemm.a, gemm.b), gemm.encoded, strict=True))
    # Of few products only float32 sums are accurate enough; of none there is nothing to split.
    least = _LEAST_K[3] if _products(gemm) == 3 else 1
    guard = patch_guard(a, b, (_PATCH.tile_m, _PATCH.tile_n), (tile.m, tile.n), least, chip)
    launches = (_launch(region, tile, a, b, chip), gemm_launch(region, _PATCH, guard=guard))
    seconds = _region_seconds(region, tile, chip) + _LAUNCH
    workspaces = (lost_flags(_tiles(a, b, tile)),)
    return Program(family, region, launches, workspaces, seconds, variant=str(tile))


def _launch(region: Region, tile: Tile, a: Operand, b: Operand, chip: Chip, wide: bool = True) -> LaunchSpec:
    """The product itself. wide: the epilogue uses accesses of several elements, for which pointers must be aligned."""
    gemm = region.gemm
    assert gemm is not None
    vector, products = 4 if tile.registers else _vector(region), _products(gemm)
    left, right, sizes = (b, a, "NMK") if tile.registers else (a, b, "MNK")  # as the kernel takes them
    epilogue = functor(region, vector, wide=wide)
    operands = [f"const __grid_constant__ fusewright::TensorMap {o.name}" for o in (a, b)]
    operands += ["int64_t M", "int64_t N", "int64_t K"]
    args: list[Arg] = [a.tensor_map(), b.tensor_map()]
    args += [SizeArg(s) for s in (a.extent, b.extent, gemm.a.shape[1])]
    passed = [f"{{{left.name}", right.name, *sizes]
    for operand in (left, right):
        if isinstance(operand, SplitOperand):
            declaration, arg = operand.parameter()
            operands.append(declaration)
            args.append(arg)
            passed.append(operand.device())
    if gemm.encoded:
        operands.append("uint8_t* __restrict__ lost")
        args.append(lost_arg(True))
        passed.append("lost")
    kernel = [
        f"// {comment(region)}",
        'extern "C" __global__ void __launch_bounds__(Gemm::kThreads, 1)',
        *call(region.name, [*operands, *(p.declaration for p in epilogue.parameters)], " {"),
        *("    " + line for line in call("Gemm::run", [*passed[:-1], passed[-1] + "}", initialiser(epilogue)], ";")),
        "}",
    ]
    element = C_TYPES[torch.float16 if gemm.encoded else gemm.a.dtype]
    return LaunchSpec(
        kernel=region.name,
        source=translation_unit(
            ("gemm_sm90_registers.cuh" if tile.registers else "gemm_sm90.cuh", "scalar.cuh"),
            epilogue,
            _instantiation(element, tile, products, vector, left, right),
            "\n".join(kernel),
        ),
        grid=(smaller(_tiles(a, b, tile) * _one_or_none(gemm.a.shape[1]), chip.multiprocessors), 1, 1),
        block=(THREADS, 1, 1),
        args=(*args, *(p.arg for p in epilogue.parameters)),
        shared_bytes=tile.shared_bytes(products, vector),
        comment=comment(region),
        unaligned=_unaligned(region, tile, a, b, chip, wide and epilogue.aligned),
    )


def _tiles(a: Operand, b: Operand, tile: Tile) -> Size:
    return blocks(a.extent, tile.m) * blocks(b.extent, tile.n)


def _one_or_none(size: Size) -> Size:
    """A factor that leaves no blocks where there is nothing to sum."""
    return 1 if isinstance(size, int) else sympy.Min(size, 1)


def _unaligned(region: Region, tile: Tile, a: Operand, b: Operand, chip: Chip, epilogue: bool) -> LaunchSpec | None:
    """The launch for less aligned pointers: of the epilogue first, then of the operands, which needs the CUDA cores."""
    if epilogue:
        return _launch(region, tile, a, b, chip, wide=False)
    if tile.registers:
        return mark_lost(region.name, _tiles(a, b, tile))
    return None if isinstance(a, SplitOperand) else gemm_launch(region, _PATCH, wide=False)


def _instantiation(element: str, tile: Tile, products: int, vector: int, a: Operand, b: Operand) -> str:
    kernel, m, n = ("GemmSm90Registers", tile.n, tile.m) if tile.registers else ("GemmSm90", tile.m, tile.n)
    return f"""struct Config {{
    using Element = {element};
    static constexpr int kProducts = {products}, kTileM = {m}, kTileN = {n}, kStages = {tile.stages};
    static constexpr int kCluster = 1, kPromote = {32 if products == 3 else TILE_K}, kGroup = 8, kVector = {vector};
    static constexpr fusewright::Major kMajorA = fusewright::Major::{a.major}, kMajorB = fusewright::Major::{b.major};
    static constexpr bool kScaled = {boolean(isinstance(a, SplitOperand))}, kPingPong = {boolean(tile.ping_pong)};
    static constexpr bool kWhole = {boolean(tiled((a.extent, b.extent), (m, n)))};
}};
using Gemm = fusewright::{kernel}<Config>;
static_assert(Gemm::kThreads == {THREADS} && Gemm::kSharedBytes == {tile.shared_bytes(products, vector)});"""


def _vector(region: Region) -> int:
    """Columns that a thread finishes at once: 16 bytes of a 16-bit result."""
    stored = [s.access.dtype.itemsize for s in region.stores if not s.access.bits]
    return 8 if stored and max(stored) <= 2 else 4


def _region_seconds(region: Region, tile: Tile, chip: Chip) -> float:
    assert region.gemm is not None
    m, k = (evaluate_typical(s) for s in region.gemm.a.shape)
    n = evaluate_typical(region.gemm.b.shape[1])
    operations = sum(isinstance(e, Apply) for e in walk(s.value for s in region.sinks))
    return _seconds(m, n, k, tile, _products(region.gemm), chip, operations)


def _seconds(m: float, n: float, k: float, tile: Tile, products: int, chip: Chip, operations: int = 0) -> float:
    """Predicted: waves of tiles at the rate of the tensor cores, and each wave's epilogue, of so many operations. In
    ping-pong all but the last run beside products, as far as these last."""
    waves = float(-(-(-(-m // tile.m) * -(-n // tile.n)) // chip.multiprocessors))
    flops = 2 * tile.m * tile.n * products * TILE_K * -(-k // TILE_K)
    main = flops / (chip.fp16 / chip.multiprocessors * tile.efficiency)
    epilogue = tile.sums * (_STORE + _OPERATION * operations)
    if tile.ping_pong:
        return main + (waves - 1) * max(main, (main + epilogue) / 2) + epilogue
    return waves * (main + epilogue)
