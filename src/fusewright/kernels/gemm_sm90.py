"""Products on Hopper's tensor cores: bf16 and fp16, and float32 by products of fp16 halves, with any epilogue.

16-bit operands are copied to shared memory as they lie. float32 operands are read as halves (`split_f16`), where the
format stage had them made: two halves whose three products give float32's accuracy (F16x3), or, where torch's flags
allow TF32, one of TF32's precision (F16x1). Tiles with rows or columns that the halves cannot hold are then computed
again on the CUDA cores; the host is not told and does not wait. A right operand that has no halves, since too few
products read it, is rounded to one in registers: then the transposed product is computed. And where TF32 is allowed,
lines run along K, and making halves would not pay, copies round floats to TF32, whose products take twice as long.
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
from fusewright.ir.primitives import PRIMITIVES
from fusewright.ir.size import divides, evaluate_typical
from fusewright.kernels import gemm_simt, gemm_skinny
from fusewright.kernels.base import Program, Refused, boolean, comment, initialiser, translation_unit
from fusewright.kernels.gemm_simt import blocks, gemm_launch, smaller, tiled
from fusewright.kernels.gemm_sm90_tiles import (
    ALL_COPIES,
    IN_REGISTERS,
    LAUNCH,
    LINE,
    STORE,
    TILE_K,
    TILES,
    Copies,
    Tile,
    clusters_at_once,
    copied,
    multiplied,
    seconds,
    with_shared_k,
)
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
THREADS = 384
_LEAST_K = {1: 64, 3: 128}  # by products: below, plain float32 is as fast or more accurate
# Seldom runs, and always compiles.
_PATCH = gemm_simt.Config(128, 128, 8, 16, 8, resident=2, efficiency=0.69, unroll=2)

# Shares of their peak rates that torch's products reach, for comparison.
_TF32, _FP32 = 0.85, 0.72
# Steps of the ring that floats take where 16-bit operands take one.
_TF32_STEPS = 2
# Seconds that an epilogue takes for each operation, for each function and each narrow one, and for the look at sums of
# halves, by sums of a thread.
_OPERATION, _FUNCTION, _NARROW, _UNSCALED = 0.1e-6 / 128, 3e-6 / 128, 2e-6 / 128, 2.5e-6 / 128
# Primitives of an instruction or two, as comparisons are; all others are functions.
_SIMPLE = {"add", "sub", "mul", "neg", "abs", "minimum", "maximum", "and", "or", "xor", "not", "where", "cast", "copy"}
_NARROW_FUNCTIONS = {p.narrow for p in PRIMITIVES.values()}


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
        if gemm.a.dtype == torch.float32 and not gemm.tf32:
            return Refused(self.name, "float32 operands that are not split into halves")
        if evaluate_typical(gemm.a.shape[1]) < _LEAST_K[1]:
            return Refused(self.name, f"sums of fewer than {_LEAST_K[1]} products")
        for operand in _operands(gemm):
            if operand.major == "Strided":
                return Refused(self.name, f"operand {operand.name} has no contiguous dimension")
            if not _copies_in_bulk(operand):
                return Refused(self.name, f"lines of operand {operand.name} are not 16-byte aligned")
            if gemm.tf32 and operand.major != "K":
                return Refused(self.name, f"TF32 products of operand {operand.name}, whose lines do not run along K")
        return None

    def programs(self, region: Region, chip: Chip) -> Sequence[Program]:
        gemm = region.gemm
        assert gemm is not None
        make = _split_program if gemm.encoded else _direct_program
        tiles: Sequence[Tile] = IN_REGISTERS if _in_registers(gemm) else TILES[_products(gemm)]
        tiles = (*tiles, *_pairs(gemm, tiles, chip))
        tiles = (*tiles, *_splits(gemm, tiles, chip))
        programs = [make(self.name, region, tile, chip) for tile in tiles]
        if _products(gemm) == 3:  # where the first fills the chip no other is better, nor worth compiling
            programs = [p for p in programs if p.cost <= programs[0].cost]
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

    def gain(self, m: float, n: float, k: float, direct: int) -> float:
        if k < _LEAST_K[self.products]:
            return -math.inf
        otherwise = self._otherwise(m, n, k)
        if self.tf32 and direct:
            otherwise = min(otherwise, self._best(m, n, _TF32_STEPS * k, TILES[1], direct))
        return otherwise - self._best(m, n, k, TILES[self.products], epilogue=STORE + _UNSCALED) - LAUNCH

    def registers(self, m: float, n: float, k: float) -> float:
        if self.products != 1:
            return math.inf
        longer = self._best(m, n, k, IN_REGISTERS) - self._best(m, n, k, TILES[1])
        return max(0.0, longer) + split_seconds(k * n, 0, self.chip)

    def split(self, elements: float) -> float:
        return split_seconds(elements, self.planes, self.chip) + 2 * LAUNCH

    def _best(
        self, m: float, n: float, k: float, tiles: Sequence[Tile], alignment: int = 128, epilogue: float = STORE
    ) -> float:
        rate = dict(ALL_COPIES)[alignment]
        copies = Copies("K", rate, rate)
        tiles = (*tiles, *with_shared_k(tiles, m, n, k, self.products, "K", self.chip))
        return min(seconds(m, n, k, tile, self.products, copies, self.chip, epilogue) for tile in tiles)

    def _otherwise(self, m: float, n: float, k: float) -> float:
        """Our float32 on the CUDA cores, or torch's: tiles of 64, with TF32 of 128, a multiprocessor for each. Of few
        rows, what reads the weight as it lies."""
        skinny = gemm_skinny.seconds(m, n, k, torch.float32, self.chip)
        if not self.library:
            return min(gemm_simt.seconds(m, n, k, self.chip), skinny)
        tile, rate = (128, self.chip.fp16 / 2 * _TF32) if self.tf32 else (64, self.chip.fp32 * _FP32)
        waves = math.ceil(math.ceil(m / tile) * math.ceil(n / tile) / self.chip.multiprocessors)
        return min(waves * 2 * tile * tile * k / (rate / self.chip.multiprocessors) + LAUNCH, skinny)


def _products(gemm: Gemm) -> int:
    """How many products of halves make one of the operands'."""
    return 3 if gemm.encoded and gemm.encoded[0].halves.planes == 2 else 1


def _stage_k(gemm: Gemm) -> int:
    return TILE_K // _TF32_STEPS if gemm.tf32 else TILE_K


def _in_registers(gemm: Gemm) -> bool:
    """Whether the right operand is rounded in registers."""
    return gemm.encoded is not None and not gemm.encoded[1].halves.planes


def _operands(gemm: Gemm) -> tuple[Operand, Operand]:
    return Operand("a", gemm.a), Operand("b", gemm.b)


def _split_operands(gemm: Gemm) -> tuple[SplitOperand, SplitOperand]:
    assert gemm.encoded is not None
    a, b = gemm.encoded
    return SplitOperand("a", gemm.a, a), SplitOperand("b", gemm.b, b)


def _pairs(gemm: Gemm, tiles: Sequence[Tile], chip: Chip) -> list[Tile]:
    """Of tiles that wait for copies when the chip is full those in clusters of two. In registers it is the left
    operand that they would share, whose lines are never the slow ones."""
    a, b = _split_operands(gemm) if gemm.encoded else _operands(gemm)
    if _in_registers(gemm):
        return []
    products, all_of = _products(gemm), chip.multiprocessors

    def waits(tile: Tile) -> bool:
        return copied(tile, products, Copies.of(a, b, tile), all_of) > multiplied(tile, products, chip)

    # Of one row of tiles the second block would have nothing to do.
    return [replace(t, cluster=2) for t in tiles if waits(t) and t.pairs(b.major) and blocks(a.extent, t.m) != 1]


def _splits(gemm: Gemm, tiles: Sequence[Tile], chip: Chip) -> list[Tile]:
    """Tiles whose K several blocks share; of a K that is not known, none."""
    k = gemm.a.shape[1]
    if not isinstance(k, int):
        return []
    a, b = _split_operands(gemm) if gemm.encoded else _operands(gemm)
    m, n = (evaluate_typical(o.extent) for o in (a, b))
    return with_shared_k(tiles, m, n, k * TILE_K // _stage_k(gemm), _products(gemm), b.major, chip)


def _copies_in_bulk(operand: Operand) -> bool:
    stride = operand.line_stride
    return stride != 0 and divides(LINE // operand.itemsize, stride) is not None


def _direct_program(family: str, region: Region, tile: Tile, chip: Chip) -> Program:
    """Operands as they lie."""
    gemm = region.gemm
    assert gemm is not None
    a, b = _operands(gemm)
    launches = [_launch(region, tile, a, b, chip)]
    if not isinstance(gemm.a.shape[1], int):  # a sum of nothing: there are no maps of empty tensors
        empty = gemm_launch(region, _PATCH)
        launches.append(replace(empty, grid=(empty.grid[0] * (1 - sympy.Min(gemm.a.shape[1], 1)), 1, 1)))
    title = tile.title(_stage_k(gemm))
    return Program(family, region, tuple(launches), cost=_region_seconds(region, tile, a, b, chip), variant=title)


def _split_program(family: str, region: Region, tile: Tile, chip: Chip) -> Program:
    """float32 operands by their halves: multiply, patch."""
    gemm = region.gemm
    assert gemm is not None
    a, b = _split_operands(gemm)
    # Of few products only float32 sums are accurate enough; of none there is nothing to split.
    least = _LEAST_K[3] if _products(gemm) == 3 else 1
    guard = patch_guard(a, b, (_PATCH.tile_m, _PATCH.tile_n), (tile.m, tile.part), least, chip)
    launches = (_launch(region, tile, a, b, chip), gemm_launch(region, _PATCH, guard=guard))
    seconds = _region_seconds(region, tile, a, b, chip) + LAUNCH
    workspaces = (lost_flags(_parts(a, b, tile)),)
    return Program(family, region, launches, workspaces, seconds, variant=tile.title(_stage_k(gemm)))


def _launch(region: Region, tile: Tile, a: Operand, b: Operand, chip: Chip, wide: bool = True) -> LaunchSpec:
    """The product itself. wide: the epilogue uses accesses of several elements, for which pointers must be aligned."""
    gemm = region.gemm
    assert gemm is not None
    vector, products = _vector(region, tile), _products(gemm)
    left, right, sizes = (b, a, "NMK") if tile.registers else (a, b, "MNK")  # as the kernel takes them
    ring = tile.ring(products, vector, right.major, chip)
    epilogue = functor(region, vector, wide=wide)
    operands = [f"const __grid_constant__ fusewright::TensorMap {o.name}" for o in (a, b)]
    operands += ["int64_t M", "int64_t N", "int64_t K"]
    args: list[Arg] = [replace(o, tf32=gemm.tf32) for o in (a.tensor_map(), b.tensor_map(tile.panel(b.major)))]
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
            _instantiation(element, tile, ring, products, vector, left, right),
            "\n".join(kernel),
        ),
        grid=(_clusters(a, b, tile, gemm.a.shape[1], chip) * tile.blocks, 1, 1),
        cluster=(tile.blocks, 1, 1),
        block=(THREADS, 1, 1),
        args=(*args, *(p.arg for p in epilogue.parameters)),
        shared_bytes=ring[1],
        early=True,
        unaligned=_unaligned(region, tile, a, b, chip, wide and epilogue.aligned),
    )


def _parts(a: Operand, b: Operand, tile: Tile) -> Size:
    """Of tiles: those that a block finishes."""
    return blocks(a.extent, tile.m) * blocks(b.extent, tile.part)


def _clusters(a: Operand, b: Operand, tile: Tile, k: Size, chip: Chip) -> Size:
    """As many as there is work for, at most as many as run at once; none where there is nothing to sum."""
    wanted = blocks(a.extent, tile.m * tile.cluster) * blocks(b.extent, tile.n)
    return smaller(wanted * (1 if isinstance(k, int) else sympy.Min(k, 1)), clusters_at_once(tile, chip))


def _unaligned(region: Region, tile: Tile, a: Operand, b: Operand, chip: Chip, epilogue: bool) -> LaunchSpec | None:
    """The launch for less aligned pointers: of the epilogue first, then of the operands, which needs the CUDA cores."""
    if epilogue:
        return _launch(region, tile, a, b, chip, wide=False)
    if tile.registers:
        return mark_lost(region.name, _parts(a, b, tile))
    return None if isinstance(a, SplitOperand) else gemm_launch(region, _PATCH, wide=False)


def _instantiation(
    element: str, tile: Tile, ring: tuple[int, int], products: int, vector: int, a: Operand, b: Operand
) -> str:
    stages, shared_bytes = ring
    promote = 32 if products == 3 else TILE_K
    kernel, m, n = ("GemmSm90Registers", tile.n, tile.m) if tile.registers else ("GemmSm90", tile.m, tile.n)
    return f"""struct Config {{
    using Element = {element};
    static constexpr int kProducts = {products}, kTileM = {m}, kTileN = {n}, kStages = {stages};
    static constexpr int kCluster = {tile.cluster}, kSplitK = {tile.split}, kGroup = 8, kVector = {vector};
    static constexpr int kPromote = {promote};
    static constexpr fusewright::Major kMajorA = fusewright::Major::{a.major}, kMajorB = fusewright::Major::{b.major};
    static constexpr bool kScaled = {boolean(isinstance(a, SplitOperand))}, kPingPong = {boolean(tile.ping_pong)};
    static constexpr bool kWhole = {boolean(tiled((a.extent, b.extent), (m, n)))};
    static constexpr bool kByLineA = {boolean(_by_line(a))}, kByLineB = {boolean(_by_line(b))};
}};
using Gemm = fusewright::{kernel}<Config>;
static_assert(Gemm::kThreads == {THREADS} && Gemm::kSharedBytes == {shared_bytes});"""


def _by_line(operand: Operand) -> bool:
    return isinstance(operand, SplitOperand) and operand.encoded.halves.by_line


def _vector(region: Region, tile: Tile) -> int:
    """Columns that a thread finishes at once: 16 bytes of a 16-bit result whose rows are multiples of that."""
    stored = [s.access.dtype.itemsize for s in region.stores if not s.access.bits]
    eight = stored and max(stored) <= 2 and divides(8, region.columns) is not None
    return 8 if eight and tile.part % 64 == 0 and not tile.registers else 4


def _region_seconds(region: Region, tile: Tile, a: Operand, b: Operand, chip: Chip) -> float:
    gemm = region.gemm
    assert gemm is not None
    m, n, k = (evaluate_typical(s) for s in (a.extent, b.extent, gemm.a.shape[1]))
    k *= TILE_K // _stage_k(gemm)
    computed = [e.op for e in walk(s.value for s in region.sinks) if isinstance(e, Apply)]
    epilogue = STORE + sum(_computed_seconds(op) for op in computed)
    return seconds(m, n, k, tile, _products(gemm), Copies.of(a, b, tile), chip, epilogue)


def _computed_seconds(op: str) -> float:
    """Of an epilogue for one primitive, by sums of a thread."""
    if op in _SIMPLE or PRIMITIVES[op].boolean:
        return _OPERATION
    return _NARROW if op in _NARROW_FUNCTIONS else _FUNCTION
