"""The tiles of `gemm_sm90`, and what they are predicted to take: for ranking, as docs/lab/gemm.md measured it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from fusewright.chip import Chip
from fusewright.ir.size import divides
from fusewright.kernels.split_f16 import PANEL, Operand

TILE_K = 64  # k of a stage, of 16-bit operands
LINE = 16  # bytes: bulk copies want lines at multiples of it
_SLAB = 32  # columns that a warp finishes at once, at least
# Of multiprocessors, those that clusters of so many blocks use at once: what an H200 answers, which has 132 of them.
_CLUSTERED = {1: 1.0, 2: 1.0, 3: 117 / 132, 4: 120 / 132}
# Where K is shared: steps of it for each block, at least; tiles a multiprocessor, at most.
_LEAST_SHARE, _FEW_TILES = 6, 2

# Seconds: what a launch adds, and what an epilogue that overlaps with nothing does, by sums of a thread: with nothing
# but a store to do, and where tiles end beyond the result; and what the exchange between blocks that share K does.
LAUNCH, STORE, _BOUNDED, _EXCHANGED = 3e-6, 1e-6 / 128, 6e-6 / 128, 2e-6 / 128


@dataclass(frozen=True)
class Tile:
    """What one block computes. efficiency: share of the peak rate when the chip is full and copies keep up.

    registers: the right operand is rounded in registers. ping_pong: each warpgroup computes whole tiles, in turn.
    cluster: blocks that lie below each other, of which each fetches a part of the right operand for all. split: blocks
    that share a tile's K.
    """

    m: int
    n: int
    efficiency: float
    registers: bool = False
    ping_pong: bool = False
    cluster: int = 1
    split: int = 1

    def title(self, k: int) -> str:
        """k: of a stage."""
        how = " in registers" if self.registers else " ping-pong" if self.ping_pong else ""
        pairs, split = " in pairs" if self.cluster == 2 else "", f" split-K {self.split}" if self.split > 1 else ""
        return f"{self.m}×{self.n}×{k}{how}{pairs}{split}"

    @property
    def blocks(self) -> int:
        """Of a cluster."""
        return self.cluster * self.split

    @property
    def part(self) -> int:
        """Columns that a block finishes."""
        return self.n // self.split

    @property
    def sums(self) -> int:
        """How many a thread holds."""
        return self.m * self.n // (128 if self.ping_pong else 256)

    def panel(self, major: str) -> int:
        """Lines of a right operand of `major` that one bulk copy brings."""
        return math.gcd(PANEL, self.n // self.cluster) if major == "K" else PANEL

    def pairs(self, major: str) -> bool:
        """Whether two blocks can fetch equal parts of a right operand of `major`."""
        return major == "K" or -(-self.n // PANEL) % 2 == 0

    def splits(self, products: int, major: str) -> list[int]:
        """Among how many blocks it can share its K: each finishes whole slabs, and what it gets from the others fits a
        stage."""
        if self.registers or self.ping_pong:
            return []
        room = sum(self.stage(products, major))
        wanted = (s for s in (2, 3, 4) if self.n % (s * _SLAB) == 0 and s * self.cluster in _CLUSTERED)
        return [s for s in wanted if (s - 1) * self.m * self.n // s * 4 <= room]

    def stage(self, products: int, major: str) -> tuple[int, int]:
        """Bytes of the left and of the right operand, of `major`, in a stage of the ring: whole panels."""
        columns = self.n if major == "K" else -(-self.n // PANEL) * PANEL
        line = TILE_K * 2 * (2 if products == 3 else 1)
        return self.m * line, columns * line * (2 if self.registers else 1)

    def ring(self, products: int, vector: int, major: str, chip: Chip) -> tuple[int, int]:
        """How many stages fit, and `kSharedBytes` of the kernels: the ring, the warps' slabs, the barriers, and room to
        align."""
        rest, stage = 8 * 16 * 8 * vector * 4 + 2 * 8 + 1024, sum(self.stage(products, major)) + 2 * 8
        stages = (chip.shared_bytes - rest) // stage
        return stages, rest + stages * stage


# By number of products. Efficiencies as measured (docs/lab/gemm.md, step 27). 256×192 would spill.
TILES = {
    1: (
        Tile(128, 256, 0.81),
        Tile(256, 128, 0.80),
        Tile(128, 128, 0.77, ping_pong=True),
        Tile(128, 128, 0.77),
        Tile(256, 160, 0.81),
        Tile(128, 224, 0.79),
        Tile(128, 192, 0.79),
        Tile(128, 160, 0.77),
        Tile(128, 96, 0.70),
        Tile(128, 64, 0.48),
    ),
    3: (Tile(128, 128, 0.80), Tile(128, 96, 0.74), Tile(128, 64, 0.64)),
}
IN_REGISTERS = (Tile(256, 128, 0.67, registers=True), Tile(128, 128, 0.50, registers=True))

# Bytes a second that bulk copies bring to one multiprocessor, and to all, by what lines of an operand lie at multiples
# of, in bytes (step 27). Where that is 128 copies are seldom the limit.
_COPIES, ALL_COPIES = 100e9, ((128, 13.2e12), (64, 10.6e12), (32, 9.3e12), (LINE, 5.6e12))


def with_shared_k(
    tiles: Sequence[Tile], m: float, n: float, k: float, products: int, major: str, chip: Chip
) -> list[Tile]:
    """Tiles whose K is shared, where they are few and each block gets steps enough."""

    def pays(tile: Tile) -> bool:
        wanted = -(-m // (tile.m * tile.cluster)) * -(-n // tile.n)
        return wanted <= _FEW_TILES * chip.multiprocessors and k >= tile.split * _LEAST_SHARE * TILE_K

    ways = (replace(tile, split=s) for tile in tiles for s in tile.splits(products, major))
    return [tile for tile in ways if pays(tile)]


def clusters_at_once(tile: Tile, chip: Chip) -> int:
    """Larger clusters than pairs do not use the chip up: each lies within one of its parts."""
    return max(1, int(chip.multiprocessors * _CLUSTERED[tile.blocks]) // tile.blocks)


@dataclass(frozen=True)
class Copies:
    """Of a product's operands: the right one's major, and bytes of each that all multiprocessors get in a second."""

    major: str
    left: float
    right: float

    @classmethod
    def of(cls, a: Operand, b: Operand, tile: Tile) -> Copies:
        return cls(b.major, _copy_rate(a, PANEL), _copy_rate(b, tile.n))

    def seconds(self, left: int, right: int, active: float, cluster: int) -> float:
        """To bring so much of each operand to as many multiprocessors as are active, the right one once a cluster."""
        return left / min(_COPIES, self.left / active) + right / min(_COPIES, self.right * cluster / active)


def _copy_rate(operand: Operand, width: int) -> float:
    """width: of the tile; where lines run across K copies begin at multiples of it. What cannot be copied in bulk
    counts as the slowest."""
    line, known = operand.line_stride * operand.itemsize, operand.major == "K"
    rates = (r for s, r in ALL_COPIES if divides(s, line) is not None and (known or width * operand.itemsize % s == 0))
    return next(rates, ALL_COPIES[-1][1])


def multiplied(tile: Tile, products: int, chip: Chip) -> float:
    """Of the tensor cores, for one step of the ring."""
    flops = 2 * tile.m * tile.n * products * TILE_K
    return flops / (chip.fp16 / chip.multiprocessors * tile.efficiency)


def copied(tile: Tile, products: int, copies: Copies, active: float) -> float:
    """Of the copies that bring a step's operands to so many multiprocessors."""
    return copies.seconds(*tile.stage(products, copies.major), active, tile.cluster)


def seconds(
    m: float, n: float, k: float, tile: Tile, products: int, copies: Copies, chip: Chip, epilogue: float = STORE
) -> float:
    """Predicted: waves of whole tiles, the last of what is left over; and each wave's epilogue, of so many seconds a
    sum. In ping-pong all epilogues but the last run beside products, as far as these last. Tiles that end beyond the
    result finish late. Blocks that share K take their steps of it each, and their share of the epilogue."""
    steps, at_once = -(-k // (TILE_K * tile.split)), clusters_at_once(tile, chip) * tile.blocks
    full, rest = divmod(-(-m // (tile.m * tile.cluster)) * tile.blocks * -(-n // tile.n), at_once)

    def wave(tiles: float) -> float:
        return steps * max(multiplied(tile, products, chip), copied(tile, products, copies, tiles)) if tiles else 0.0

    waves, main = max(1, full + (rest > 0)), full * wave(at_once) + wave(rest)
    finish = tile.sums / tile.split * epilogue + (tile.sums * _EXCHANGED if tile.split > 1 else 0.0)
    late = tile.sums / tile.split * _BOUNDED if m % tile.m or n % tile.n else 0.0
    if tile.ping_pong:
        return LAUNCH + main + max(0.0, (finish - main / waves) / 2) * (waves - 1) + finish + late
    return LAUNCH + main + waves * finish + late
