"""gemm_sm90.cuh and split_f16.cuh: what the compiler makes of them, and what they compute, here and on a Hopper GPU."""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import cache

import pytest
import torch
from device import each_device, same_bits
from sm90_host import PATCH, SHARED_LIMIT, SPLIT, Gemm, GemmConfig, Kernel, SimulatedKernel, Split

from fusewright.runtime.nvrtc import compile_cubin

BF16 = GemmConfig(element="__nv_bfloat16", out="__nv_bfloat16", vector=8)
F16 = GemmConfig(out="__half", vector=8)
F16X1 = GemmConfig(scaled=True)
F16X3 = GemmConfig(products=3, tile=(128, 128), stages=3, promote=32, scaled=True)
REGISTERS = GemmConfig(scaled=True, registers=True, stages=3)  # a is rounded in registers
PING_PONG = replace(BF16, tile=(128, 128), stages=6, ping_pong=True)
F16X1_PING_PONG = replace(F16X1, tile=(128, 128), stages=6, ping_pong=True)
KINDS = {
    "bf16": BF16,
    "f16": F16,
    "f16x1": F16X1,
    "f16x3": F16X3,
    "registers": REGISTERS,
    "bf16 ping-pong": PING_PONG,
    "f16x1 ping-pong": F16X1_PING_PONG,
}
# Relative Frobenius.
TOLERANCE = {"bf16": 4e-3, "f16": 5e-4, "f16x1": 5e-4, "f16x3": 6e-7, "registers": 5e-4}
TOLERANCE |= {f"{kind} ping-pong": TOLERANCE[kind] for kind in ("bf16", "f16x1")}
MAJORS = [("K", "K"), ("K", "MN"), ("MN", "K"), ("MN", "MN")]
# Smaller than a step; ragged everywhere; several rounds of the ring; more tiles than multiprocessors, an odd number.
SHAPES = [(8, 8, 8), (304, 520, 1000), (1000, 3000, 72), (4104, 2056, 136)]

# For the simulator: smaller than a step; ragged around a full tile, with several rounds of a ring of two stages.
SMALL = [(8, 8, 8), (136, 264, 200)]


@pytest.fixture(autouse=True)
def need_hopper(request: pytest.FixtureRequest) -> None:
    """GPU tests need the one whose instructions these are."""
    if request.node.get_closest_marker("gpu") and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a Hopper GPU")


@cache
def compiled(source: str) -> bytes:
    return compile_cubin(source, "sm_90a").code


def cubin(source: str, device: str) -> bytes | None:
    """None for the simulator, which compiles by itself."""
    return compiled(source) if device == "cuda" else None


@pytest.mark.parametrize("majors", [("K", "K"), ("MN", "MN")])
@pytest.mark.parametrize("kind", KINDS)
def test_compiles_without_spills_or_warnings(kind: str, majors: tuple[str, str]) -> None:
    config = replace(KINDS[kind], major_a=majors[0], major_b=majors[1])
    resources = compile_cubin(config.source(), "sm_90a").resources["gemm"]
    assert resources.spill_bytes == resources.stack_bytes == 0
    assert resources.registers == 168  # 65536 for 384 threads, which setmaxnreg then moves between the roles
    assert config.shared_bytes <= SHARED_LIMIT


BY_LINE = {
    "f16x1": (True, True),
    "f16x3": (True, True),
    "registers": (False, True),
    "f16x1 ping-pong": (True, True),
    "f16x1 256": (True, True),
    "registers 256": (False, True),
    "f16x3 a": (True, False),
    "f16x3 b": (False, True),
}
# With tiles of their own.
OTHER_KINDS = {
    "f16x1 256": replace(F16X1, tile=(256, 128)),
    "registers 256": replace(REGISTERS, tile=(128, 256), stages=2),
    "f16x3 a": replace(F16X3, tile=(128, 96)),
    "f16x3 b": replace(F16X3, tile=(128, 64)),
}


def by_line(kind: str) -> GemmConfig:
    return replace({**KINDS, **OTHER_KINDS}[kind], by_line=BY_LINE[kind])


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("kind", BY_LINE)
def test_exponents_by_line_compile_without_spills_or_warnings(kind: str, whole: bool) -> None:
    resources = compile_cubin(replace(by_line(kind), whole=whole).source(), "sm_90a").resources["gemm"]
    assert resources.spill_bytes == resources.stack_bytes == 0 and resources.registers == 168


@pytest.mark.parametrize("planes", [1, 2])
def test_split_compiles_without_spills(planes: int) -> None:
    for resources in compile_cubin(SPLIT.format(planes=planes), "sm_90a").resources.values():
        assert resources.spill_bytes == resources.stack_bytes == 0


class Operand:
    """A float32 matrix [rows, k] as a product wants it stored: in K-major or MN-major order, split or rounded.

    values: as stored; random numbers if there are none.
    """

    def __init__(
        self,
        config: GemmConfig,
        rows: int,
        k: int,
        major: str,
        device: str,
        values: torch.Tensor | None = None,
        by_line: bool = False,
    ) -> None:
        shape = (rows, k) if major == "K" else (k, rows)
        stored = torch.randn(shape, generator=torch.Generator().manual_seed(rows)) if values is None else values
        stored = stored.to(device)
        self.device, self.exponent = device, None
        if config.scaled:
            planes = config.products // 2 + 1
            self.split = Split(cubin(SPLIT.format(planes=planes), device), planes, by_line)
            self.halved = self.split.buffers(stored)
            self.split.run(stored, self.halved)
            self.data, self.exponent, self.stored = self.halved.data, self.halved.given, stored
        else:
            dtypes = {"__nv_bfloat16": torch.bfloat16, "__half": torch.float16, "float": torch.float32}
            stored = stored.to(dtypes[config.element])
            self.data = self.stored = stored
        self.values = stored if major == "K" else stored.T


def multiply(
    config: GemmConfig, a: Operand, b: Operand, bias: torch.Tensor, factor: float, slope: float
) -> torch.Tensor:
    dtype = {"float": torch.float32, "__half": torch.float16, "__nv_bfloat16": torch.bfloat16}[config.out]
    rows, columns = (b, a) if config.registers else (a, b)
    out = torch.full((rows.values.shape[0], columns.values.shape[0]), float("nan"), dtype=dtype, device=a.device)
    gemm = Gemm(config, cubin(config.source(), a.device))
    read = a.stored if config.registers else a.data
    gemm.prepare(read, b.data, out, bias, factor, slope, (a.exponent, b.exponent), a.values.shape[1])()
    return out


def relative(result: torch.Tensor, reference: torch.Tensor) -> float:
    return ((result.double() - reference).norm() / reference.norm()).item()


def bias_of(n: int, device: str) -> torch.Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(5)).to(device)


ALL = [*itertools.product(KINDS, MAJORS, [1, 2])]
# Each kind with both clusters, and every pair of majors.
SIMULATED = [(kind, MAJORS[(i + 3 * j) % 4], j + 1) for i, kind in enumerate(KINDS) for j in (0, 1)]


@pytest.mark.parametrize(("device", "kind", "majors", "cluster"), each_device(SIMULATED, ALL))
def test_product_with_epilogue(kind: str, majors: tuple[str, str], cluster: int, device: str) -> None:
    config = replace(KINDS[kind], major_a=majors[0], major_b=majors[1], cluster=cluster)
    if device == "cpu":
        config = replace(config, stages=2)
    for m, n, k in SHAPES if device == "cuda" else SMALL:
        a, b = Operand(config, m, k, majors[0], device), Operand(config, n, k, majors[1], device)
        bias = bias_of(m if config.registers else n, device)
        result = multiply(config, a, b, bias, 2.0, 0.1)
        products = a.values.double() @ b.values.double().T
        reference = ((products.T if config.registers else products) + bias.double()) * 2
        reference = torch.where(reference > 0, reference, reference * 0.1)
        assert relative(result, reference) < TOLERANCE[kind], (m, n, k)
        if device == "cuda":
            assert torch.equal(result, multiply(config, a, b, bias, 2.0, 0.1))


@pytest.mark.parametrize(
    ("kind", "cluster", "ways", "columns"), [("bf16", 2, 1, 72), ("bf16", 1, 2, 264), ("bf16 ping-pong", 1, 1, 264)]
)
def test_any_order_of_threads_gives_the_same(
    kind: str, cluster: int, ways: int, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SimulatedKernel, "schedules", 3)
    config = replace(KINDS[kind], major_b="MN", stages=2, cluster=cluster, split_k=ways)  # compiled above too
    config = replace(config, tile=(128, 128)) if ways > 1 else config
    a, b = Operand(config, 136, 200, "K", "cpu"), Operand(config, columns, 200, "MN", "cpu")
    result = multiply(config, a, b, bias_of(columns, "cpu"), 1.0, 1.0)
    reference = a.values.double() @ b.values.double().T + bias_of(columns, "cpu").double()
    assert relative(result, reference) < TOLERANCE["bf16"]


def tf32(x: torch.Tensor) -> torch.Tensor:
    """Rounded to nearest, ties to even."""
    bits = x.view(torch.int32)
    return (bits + 0xFFF + (bits >> 13 & 1) & ~0x1FFF).view(torch.float32)


TF32 = GemmConfig(element="float")
TF32_KINDS = {
    "128×256": TF32,
    "128×256 in pairs": replace(TF32, cluster=2),
    "128×128 ping-pong": replace(TF32, tile=(128, 128), stages=6, ping_pong=True),
    "128×64 split-K 2": replace(TF32, tile=(128, 64), stages=6, split_k=2),
}


@pytest.mark.parametrize("kind", TF32_KINDS)
def test_tf32_compiles_without_spills_or_warnings(kind: str) -> None:
    resources = compile_cubin(TF32_KINDS[kind].source(), "sm_90a").resources["gemm"]
    assert resources.spill_bytes == resources.stack_bytes == 0 and resources.registers == 168


@pytest.mark.parametrize("kind", TF32_KINDS)
def test_tf32_products_of_floats_as_they_lie(kind: str, device: str) -> None:
    """By the error that summing what is rounded to TF32 leaves: far below that of another rounding, or of none."""
    config = TF32_KINDS[kind] if device == "cuda" else replace(TF32_KINDS[kind], stages=2)
    for m, n, k in [(304, 520, 1000), (4104, 2056, 136)] if device == "cuda" else [(136, 264, 100)]:
        a, b = Operand(config, m, k, "K", device), Operand(config, n, k, "K", device)
        result = multiply(config, a, b, bias_of(n, device), 1.0, 1.0)
        reference = tf32(a.values).double() @ tf32(b.values).double().T + bias_of(n, device).double()
        assert relative(result, reference) < 5e-6, (m, n, k)


# The simulator's two blocks, or its one pair, have one to five tiles each, an odd number too, some with rows to spare.
# K: less than a stage, and several rounds of the ring. On the GPU likewise.
IN_TURNS = [
    ("bf16", ("K", "K"), 1, (136, 264, 200)),
    ("f16x1", ("K", "MN"), 2, (264, 264, 72)),
    ("f16x1", ("MN", "K"), 1, (640, 104, 40)),
    ("bf16", ("MN", "MN"), 2, (136, 600, 264)),
]
IN_TURNS_GPU = [
    (kind, majors, cluster, shape)
    for kind, majors, cluster in itertools.product(("bf16", "f16x1"), MAJORS, (1, 2))
    for shape in ((120, 104, 40), (1000, 3000, 72), (2824, 2056, 2056))
]


@pytest.mark.parametrize(("device", "kind", "majors", "cluster", "shape"), each_device(IN_TURNS, IN_TURNS_GPU))
def test_ping_pong_gives_the_bits_of_cooperation(
    kind: str, majors: tuple[str, str], cluster: int, shape: tuple[int, int, int], device: str
) -> None:
    config, (m, n, k) = replace(KINDS[f"{kind} ping-pong"], major_a=majors[0], major_b=majors[1]), shape
    config = replace(config, cluster=cluster, stages=3 if device == "cpu" else 6)
    a, b = Operand(config, m, k, majors[0], device), Operand(config, n, k, majors[1], device)
    together = replace(config, ping_pong=False, cluster=1, stages=2)
    found, expected = (multiply(c, a, b, bias_of(n, device), 2.0, 0.1) for c in (config, together))
    assert same_bits(found, expected)


# Besides those of KINDS, by kind.
TILES = {
    "bf16": [(128, 128), (256, 128), (128, 64), (128, 96), (128, 160), (128, 192), (128, 224), (256, 160)],
    "f16x1": [(128, 96), (256, 160)],
    "f16x3": [(128, 64), (128, 96)],
}
OTHER_TILES = [(kind, tile) for kind, tiles in TILES.items() for tile in tiles]


def other(kind: str, tile: tuple[int, int], majors: tuple[str, str], stages: int) -> GemmConfig:
    config = replace(KINDS[kind], tile=tile, stages=stages, major_a=majors[0], major_b=majors[1])
    return config if tile[1] % (8 * config.vector) == 0 else replace(config, vector=4)


# Each with one pair of majors, of the four in turn.
SOME_MAJORS = [(*tile, MAJORS[i % 4]) for i, tile in enumerate(OTHER_TILES)]


@pytest.mark.parametrize(("kind", "tile", "majors"), SOME_MAJORS)
def test_other_tiles_compile_without_spills_or_warnings(
    kind: str, tile: tuple[int, int], majors: tuple[str, str]
) -> None:
    resources = compile_cubin(other(kind, tile, majors, 3).source(), "sm_90a").resources["gemm"]
    assert resources.spill_bytes == resources.stack_bytes == 0 and resources.registers == 168


@pytest.mark.parametrize(
    ("device", "kind", "tile", "majors"),
    each_device(SOME_MAJORS, [(*tile, majors) for tile, majors in itertools.product(OTHER_TILES, MAJORS)]),
)
def test_other_tiles(kind: str, tile: tuple[int, int], majors: tuple[str, str], device: str) -> None:
    config = other(kind, tile, majors, 3 if device == "cuda" else 2)
    shapes = [(600, 392, 520), (2824, 2056, 136)] if device == "cuda" else [(tile[0], tile[1] + 8, 136)]
    for m, n, k in shapes:
        a, b = Operand(config, m, k, majors[0], device), Operand(config, n, k, majors[1], device)
        result = multiply(config, a, b, bias_of(n, device), 1.0, 1.0)
        reference = a.values.double() @ b.values.double().T + bias_of(n, device).double()
        assert relative(result, reference) < TOLERANCE[kind], (m, n, k)


# Tile, blocks that share B, blocks that share K, stages; and the majors, of which each has one pair, in turn.
SPLIT_K = [
    ("bf16", (128, 128), 1, 2, 6),
    ("bf16", (128, 128), 2, 2, 6),
    ("f16", (128, 64), 1, 2, 8),
    ("f16x1", (128, 128), 2, 2, 6),
    ("f16x3", (128, 128), 1, 2, 3),
    ("f16x3", (128, 128), 1, 4, 3),
    ("f16x3", (128, 64), 1, 2, 4),
    ("f16x3", (128, 96), 1, 3, 3),
]
SPLIT_K_MAJORS = [(*case, MAJORS[i % 4]) for i, case in enumerate(SPLIT_K)]


def split_k(kind: str, tile: tuple[int, int], cluster: int, ways: int, majors: tuple[str, str]) -> GemmConfig:
    return replace(other(kind, tile, majors, 2), cluster=cluster, split_k=ways, vector=4)


@pytest.mark.parametrize(("kind", "tile", "cluster", "ways", "stages", "majors"), SPLIT_K_MAJORS)
def test_split_k_compiles_without_spills_or_warnings(
    kind: str, tile: tuple[int, int], cluster: int, ways: int, stages: int, majors: tuple[str, str]
) -> None:
    config = replace(split_k(kind, tile, cluster, ways, majors), stages=stages)
    resources = compile_cubin(config.source(), "sm_90a").resources["gemm"]
    assert resources.spill_bytes == resources.stack_bytes == 0 and resources.registers == 168
    assert config.shared_bytes <= SHARED_LIMIT


@pytest.mark.parametrize(
    ("device", "kind", "tile", "cluster", "ways", "stages", "majors"),
    each_device(SPLIT_K_MAJORS, [(*case, majors) for case, majors in itertools.product(SPLIT_K, MAJORS)]),
)
def test_blocks_that_share_k(
    kind: str, tile: tuple[int, int], cluster: int, ways: int, stages: int, majors: tuple[str, str], device: str
) -> None:
    """Parts of K with and without tiles of it; columns that end within the first part of a tile; several tiles a block,
    so that what is exchanged lies in one stage after another; and so few k that the ring holds several tiles."""
    config = split_k(kind, tile, cluster, ways, majors)
    config = replace(config, stages=stages if device == "cuda" else 3)
    shapes = [(136, 8, 72), (136, 2 * tile[1] + 24, 72), (136, tile[1] + 24, 328)]
    if device == "cuda":
        shapes += [(600, 392, 4096), (2824, 2056, 1160), (1000, 3000, 72)]
    for m, n, k in shapes:
        a, b = Operand(config, m, k, majors[0], device), Operand(config, n, k, majors[1], device)
        result = multiply(config, a, b, bias_of(n, device), 2.0, 0.1)
        reference = (a.values.double() @ b.values.double().T + bias_of(n, device).double()) * 2
        reference = torch.where(reference > 0, reference, reference * 0.1)
        assert relative(result, reference) < TOLERANCE[kind], (m, n, k)
        if device == "cuda":
            assert torch.equal(result, multiply(config, a, b, bias_of(n, device), 2.0, 0.1))


@pytest.mark.parametrize(
    ("device", "kind", "shape"),
    each_device([("bf16", (133, 101, 72))], [("bf16", (333, 1001, 1000)), ("f16x3", (333, 1001, 1000))]),
)
def test_rows_of_any_length(kind: str, shape: tuple[int, int, int], device: str) -> None:
    """The result's rows need no alignment, and nothing past them is written."""
    config, (m, n, k) = replace(KINDS[kind], aligned=False), shape
    a, b = Operand(config, m, k, "K", device), Operand(config, n, k, "K", device)
    result = multiply(config, a, b, torch.zeros(n, device=device), 1.0, 1.0)
    assert relative(result, a.values.double() @ b.values.double().T) < TOLERANCE[kind]


@pytest.mark.parametrize("kind", ["f16x3", "registers", "bf16 ping-pong"])
def test_whole_tiles_need_no_bounds(kind: str, device: str) -> None:
    bounded = replace(KINDS[kind], stages=2)
    (m, n), k = (2 * size for size in bounded.tile), 72
    a, b = Operand(bounded, m, k, "K", device), Operand(bounded, n, k, "K", device)
    bias = bias_of(m if bounded.registers else n, device)
    results = [multiply(config, a, b, bias, 2.0, 0.1) for config in (bounded, replace(bounded, whole=True))]
    assert same_bits(*results)


@pytest.mark.gpu
@pytest.mark.parametrize("case", SIMULATED, ids=str)
def test_simulator_gives_the_bits_of_the_gpu(case: tuple[str, tuple[str, str], int]) -> None:
    kind, majors, cluster = case
    config = replace(KINDS[kind], major_a=majors[0], major_b=majors[1], cluster=cluster)
    m, n, k = 136, 264, 392
    results = []
    for device in ("cpu", "cuda"):
        a, b = Operand(config, m, k, majors[0], device), Operand(config, n, k, majors[1], device)
        results.append(multiply(config, a, b, bias_of(m if config.registers else n, device), 2.0, 0.1))
    assert same_bits(*results)


@pytest.mark.gpu
@pytest.mark.parametrize("k", [128, 512, 4096])
@pytest.mark.parametrize("draw", [torch.randn, torch.rand])
def test_three_products_are_more_accurate_than_sgemm(draw: object, k: int) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    a = Operand(F16X3, 2048, k, "K", "cuda", draw(2048, k, device="cuda"))  # type: ignore[operator]
    b = Operand(F16X3, 2048, k, "K", "cuda", draw(2048, k, device="cuda"))  # type: ignore[operator]
    reference = a.values.double() @ b.values.double().T
    ours = relative(multiply(F16X3, a, b, torch.zeros(2048, device="cuda"), 1.0, 1.0), reference)
    theirs = relative(a.values @ b.values.T, reference)
    assert ours < theirs * (1.0 if k < 512 else 0.5)


@pytest.mark.parametrize("power", [-100, 0, 100])
def test_scales_are_undone(power: int, device: str) -> None:
    n, k = 128, 256 if device == "cuda" else 64
    a = Operand(F16X3, n, k, "K", device, torch.randn(n, k) * 2.0**power)
    b = Operand(F16X3, n, k, "K", device, torch.randn(n, k) * 2.0**-power)
    reference = a.values.double() @ b.values.double().T
    assert relative(multiply(F16X3, a, b, torch.zeros(n, device=device), 1.0, 1.0), reference) < TOLERANCE["f16x3"]


def test_split_keeps_22_bits_and_finds_magnitudes(device: str) -> None:
    for shape in ((300, 1004), (33, 7), (2, 3000)) if device == "cuda" else ((20, 1004), (33, 7)):
        x = torch.randn(shape, device=device) * torch.exp2(torch.randint(-10, 1, shape, device=device))
        x = x.clamp(-3.9, 3.9)  # the largest that a sample may see
        x[0] = 2
        halved = Operand(F16X3, *shape, "K", device, x).halved
        scaled = torch.ldexp(x.double(), halved.exponent)
        assert 2.0**12 <= scaled[0].abs().max() <= scaled.abs().max() < 2.0**16
        residue = (scaled - halved.data[0].double() - halved.data[1].double() * 2.0**-11).abs()
        assert (residue <= scaled.abs() * 2.0**-22 + 2.0**-35).all()
        assert torch.equal(halved.lines.view(torch.float32), x.abs().amax(1))
        assert torch.equal(halved.columns.view(torch.float32), x.abs().amax(0))


# One element; less than a vector; ragged; of as many warps as there are; of more than a block holds, ragged too.
LENGTHS = [1, 3, 65, 1000, 1025, 3000, 4097, 8192, 8200, 17001]


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("planes", [1, 2])
def test_lines_are_split_by_their_own_exponents(planes: int, length: int, device: str) -> None:
    split = Split(cubin(SPLIT.format(planes=planes), device), planes, by_line=True)
    generator = torch.Generator().manual_seed(length)
    for lines, stride in ((21, length), (3, length + 5), (1, length)):
        whole = torch.randn(lines, stride, generator=generator)
        whole *= torch.exp2(torch.randint(-60, 60, (lines, 1), generator=generator).float())
        if lines > 3:
            whole[3], whole[5], whole[6, 0], whole[7, length - 1] = 0, 2.0**-140, float("inf"), float("nan")
            whole[8], whole[9] = 3e38, whole[9] * 2.0**-135
        x = whole.to(device)[:, :length]
        halved = split.buffers(x)
        split.run(x, halved)
        found, sound = halved.lines.view(torch.float32), x.isfinite().all(1)
        own = (14 + 127 - (x.abs().amax(1, keepdim=True).view(torch.int32) >> 23)).clamp(max=126)
        lose = (torch.ldexp(x.double(), own).abs() < 2.0**-14) & (x != 0)
        most = lose.sum(1) > (~lose & (x != 0)).sum(1)
        expected = x.abs().amax(1).where(~(most & sound), torch.inf)
        assert torch.equal(found.nan_to_num(-1), expected.nan_to_num(-1))
        sound &= ~most
        scaled = torch.ldexp(x.double(), halved.exponents)[sound]
        largest = scaled.abs().amax(1)
        normal = x[sound].abs().amax(1) >= 2.0**-112  # below, the exponent is the largest that there is
        assert ((largest >= 2.0**14) & (largest < 2.0**15) | ~normal).all() and (largest < 2.0**15).all()
        hi = scaled.float().half()
        assert same_bits(halved.data[0][sound], hi)
        if planes == 2:
            assert same_bits(halved.data[1][sound], ((scaled.float() - hi.float()) * 2.0**11).half())
            residue = (scaled - halved.data[0][sound].double() - halved.data[1][sound].double() * 2.0**-11).abs()
            assert (residue <= scaled.abs() * 2.0**-22 + 2.0**-35).all()


@pytest.mark.parametrize("kind", BY_LINE)
def test_rows_and_columns_of_any_magnitude_need_no_patch(kind: str, device: str) -> None:
    """Here there is none."""
    config = replace(by_line(kind), stages=2) if device == "cpu" else by_line(kind)
    generator = torch.Generator().manual_seed(1)
    m, n, k = (136, 264, 200) if device == "cpu" else (1000, 3000, 520)
    operands = []
    for rows, lines in ((m, config.by_line[0]), (n, config.by_line[1])):
        powers = torch.randint(-60, 61, (rows, 1), generator=generator).float() * lines
        values = torch.randn(rows, k, generator=generator) * torch.exp2(powers)
        operands.append(Operand(config, rows, k, "K", device, values, lines))
    a, b = operands
    result = multiply(config, a, b, torch.zeros(m if config.registers else n, device=device), 1.0, 1.0)
    exact = a.values.double() @ b.values.double().T
    norms = a.values.double().norm(dim=1)[:, None] * b.values.double().norm(dim=1)
    error = ((result.T if config.registers else result).double() - exact).abs() / norms
    assert error.max() < (1e-3 if config.products == 1 else 3e-7)


@pytest.mark.parametrize(("row", "column"), [(119, -120), (-120, 119), (119, -126), (60, 58), (-70, -60), (-90, -60)])
def test_nothing_is_out_of_range_on_the_way_to_a_result(row: int, column: int, device: str) -> None:
    config = replace(by_line("f16x3"), stages=2)
    generator = torch.Generator().manual_seed(2)
    x, w = (torch.rand(128, 64, generator=generator) + 0.5 for _ in range(2))
    x[5], w[9] = torch.ldexp(x[5], torch.tensor(row)), torch.ldexp(w[9], torch.tensor(column))
    a, b = (Operand(config, 128, 64, "K", device, values, True) for values in (x, w))
    result = multiply(config, a, b, torch.zeros(128, device=device), 1.0, 1.0)
    exact = a.values.double() @ b.values.double().T
    assert result.isfinite().all()
    assert ((result.double() - exact).abs() <= exact.abs() * 1e-6 + 2.0**-148).all()


def test_nothing_vanishes_on_the_way_to_a_result(device: str) -> None:
    """The row's factor alone, 2^-126, would take this sum below all numbers; the column's brings it back."""
    config = replace(by_line("f16x3"), stages=2)
    x, w = torch.zeros(128, 64), torch.zeros(128, 64)
    x[5, 0], x[5, 1] = 2.0**-112, 2.0**-140
    w[9, 1], w[9, 2] = 2.0**99, 2.0**127
    a, b = (Operand(config, 128, 64, "K", device, values, True) for values in (x, w))
    assert multiply(config, a, b, torch.zeros(128, device=device), 1.0, 1.0)[5, 9] == 2.0**-41


@pytest.mark.gpu
def test_patch_recomputes_what_the_halves_cannot_hold() -> None:
    m, n, k = 1024, 768, 512
    x, w = torch.randn(m, k, device="cuda"), torch.randn(n, k, device="cuda")
    a, b = Operand(F16X3, m, k, "K", "cuda", x), Operand(F16X3, n, k, "K", "cuda", w)
    x[3, 7], x[200, 100], x[512] = float("inf"), float("nan"), x[512] * 2.0**40
    x[900] *= 2.0**-40
    w[700, 0] = float("-inf")
    for operand, values in ((a, x), (b, w)):  # the exponents are those of a call before
        operand.halved.lines.zero_(), operand.halved.columns.zero_()
        operand.split.run(values, operand.halved, look=False)
    bias = torch.zeros(n, device="cuda")
    out = multiply(F16X3, a, b, bias, 1.0, 1.0)
    source, threads, shared = PATCH
    patch = Kernel(compiled(source), "patch", shared)
    tiles = -(-m // 128) * -(-n // 128)
    lost = torch.zeros(tiles * 8, dtype=torch.uint8, device="cuda")
    arguments = [x, k, w, k, m, n, k, a.halved.words, b.halved.words, lost, bias, out, 1.0, 1.0]
    patch.launch((tiles, 1), threads, arguments)
    reference = x.double() @ w.double().T
    assert torch.equal(out.isnan(), reference.isnan()) and torch.equal(out.isinf(), reference.isinf())
    finite = reference.isfinite()
    error = (out.double() - reference).abs() / (x.double().abs() @ w.double().abs().T)
    assert error[finite].max() < 2e-6
