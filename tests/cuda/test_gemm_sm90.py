"""gemm_sm90.cuh: what the compiler makes of it, and what it computes, here and on a Hopper GPU."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from device import each_device, same_bits
from sm90_host import F16X3, SHARED_LIMIT, GemmConfig, Operand, SimulatedKernel, multiply

from fusewright.runtime.nvrtc import compile_cubin

pytestmark = pytest.mark.usefixtures("need_hopper")

BF16 = GemmConfig(element="__nv_bfloat16", out="__nv_bfloat16", vector=8)
F16 = GemmConfig(out="__half", vector=8)
F16X1 = GemmConfig(scaled=True)
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
