"""Which products the Hopper family takes, how it ranks and launches them, and that their source compiles well."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import sympy
import torch
import torch.nn.functional as F

from fusewright.chip import CHIPS
from fusewright.codegen.launch import BufferArg, LaunchSpec, TensorMapArg
from fusewright.fusion.plan import Encode, Encoded, FusionPlan, Matrix, Region
from fusewright.ir.encoding import Halves
from fusewright.ir.size import Size
from fusewright.kernels.base import Program, Refused
from fusewright.kernels.choose import candidates, contenders
from fusewright.kernels.gemm_sm90 import GemmSm90, HalfProducts
from fusewright.kernels.gemm_sm90_tiles import IN_REGISTERS, TILES, Tile
from fusewright.kernels.split_f16 import encode_program
from fusewright.runtime.nvrtc import cached_cubin, parse_resources
from fusewright.tools.host import HostPrinter, Kernels
from graphs import planned

H200 = CHIPS["sm_90a"]
HALVES = (torch.bfloat16, torch.float16)
M, N, K = 136, 264, 200


class Always(HalfProducts):
    """Reads halves wherever it can, whatever would be faster."""

    def gain(self, m: float, n: float, k: float, direct: int) -> float:
        return 1.0

    def registers(self, m: float, n: float, k: float) -> float:
        return math.inf


class Rounded(Always):
    """And rounds right operands in registers."""

    def registers(self, m: float, n: float, k: float) -> float:
        return 0.0


def plan_of(
    function: Callable[..., Any], *inputs: torch.Tensor, tf32: bool = False, kind: type[Always] = Always
) -> FusionPlan:
    call, record = planned(function, kind(H200, tf32, library=False))
    call(*inputs)
    return record.plans[0]


def operand(rows: int, columns: int, transposed: bool, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(columns, rows, dtype=dtype).T if transposed else torch.randn(rows, columns, dtype=dtype)


def product(
    dtype: torch.dtype,
    majors: str = "KK",
    m: int = M,
    n: int = N,
    k: int = K,
    tf32: bool = False,
    kind: type[Always] = Always,
) -> Region:
    """(x · wᵀ + bias) · 2 through a LeakyReLU; majors: of x and w."""
    x, w = operand(m, k, majors[0] == "M", dtype), operand(n, k, majors[1] == "M", dtype)
    bias = torch.randn(n, dtype=dtype)
    plan = plan_of(lambda x, w, b: F.leaky_relu(F.linear(x, w, b) * 2, 0.1), x, w, bias, tf32=tf32, kind=kind)
    return plan.regions[0]


def best(region: Region) -> Program:
    return GemmSm90().programs(region, H200)[0]


def check_compiles(launch: LaunchSpec) -> None:
    """Without spills, local arrays or performance warnings (which are errors); the fallbacks too."""
    resources = parse_resources(cached_cubin(launch.source, "sm_90a").log)[launch.kernel]
    assert resources.spill_bytes == resources.stack_bytes == 0, launch.kernel
    if launch.unaligned:
        check_compiles(launch.unaligned)


@pytest.mark.parametrize("majors", ["KK", "KM", "MK", "MM"])
@pytest.mark.parametrize("dtype", HALVES)
def test_16_bit_operands_are_copied_as_they_lie(dtype: torch.dtype, majors: str) -> None:
    region = product(dtype, majors)
    assert GemmSm90().supports(region, H200) is None
    program = best(region)
    (launch,) = program.launches
    a, b = (arg for arg in launch.args if isinstance(arg, TensorMapArg))
    assert a.dims == ((K, M, 1) if majors[0] == "K" else (M, K, 1))
    assert b.dims == ((K, N, 1) if majors[1] == "K" else (N, K, 1))
    assert [arg.dtype for arg in (a, b)] == [dtype, dtype] and not program.workspaces
    check_compiles(launch)


@pytest.mark.parametrize("majors", ["KK", "MM"])
@pytest.mark.parametrize("tf32", [False, True])
def test_float32_products_read_halves_and_are_patched(tf32: bool, majors: str) -> None:
    region = product(torch.float32, majors, k=203, tf32=tf32)
    program = best(region)
    assert [launch.kernel for launch in program.launches] == [region.name, f"{region.name}_patch"]
    a, b = (arg for arg in program.launches[0].args if isinstance(arg, TensorMapArg))
    planes = 1 if tf32 else 2
    assert a.dims == ((203, M, planes) if majors == "KK" else (M, 203, planes))
    assert b.dims == ((203, N, planes) if majors == "KK" else (N, 203, planes))
    assert a.strides[0] == (256 if majors == "KK" else 192)  # whole 128 bytes
    tile_m, tile_n, _ = map(int, program.variant.split("×"))
    assert [w.shape for w in program.workspaces] == [(-(-M // tile_m) * -(-N // tile_n) * 8,)]
    source = program.launches[0].source
    assert f"kProducts = {1 if tf32 else 3}" in source and "kScaled = true" in source
    for launch in program.launches:
        check_compiles(launch)


def test_sizes_known_to_be_whole_tiles_have_no_code_for_others() -> None:
    def whole(m: int, n: int, k: int) -> tuple[bool, bool]:
        launch, patch = best(product(torch.float32, m=m, n=n, k=k)).launches
        assert ("Whole*/true" in patch.source) != ("Whole*/false" in patch.source)
        return "kWhole = true" in launch.source, "Whole*/true" in patch.source

    assert whole(256, 384, 136) == (True, True)
    assert whole(256, 384, 133) == (True, False)  # bulk copies fill up K
    assert whole(256, 388, 136) == whole(250, 384, 136) == (False, False)


def test_rows_of_any_number_are_bounded() -> None:
    rows = sympy.Symbol("s0", integer=True, positive=True)
    region = product(torch.float32, m=256, n=384, k=136)
    assert region.gemm
    gemm = replace(region.gemm, a=replace(region.gemm.a, shape=(rows, 136)))
    launch, patch = best(replace(region, gemm=gemm)).launches
    assert "kWhole = false" in launch.source and "Whole*/false" in patch.source


@pytest.mark.parametrize(("majors", "tile"), [("KK", 0), ("KM", 0), ("MM", 0), ("KK", 1)])
def test_weights_that_are_rounded_in_registers(majors: str, tile: int) -> None:
    """The kernel reads the weight itself; what it has of its halves is the exponent."""
    region = product(torch.float32, majors, tf32=True, kind=Rounded)
    programs = {p.variant: p for p in GemmSm90().programs(region, H200)}
    assert programs.keys() == {"256×128×64 in registers", "128×128×64 in registers"}
    program = programs[f"{(256, 128)[tile]}×128×64 in registers"]
    launch, patch = program.launches
    a, b = (arg for arg in launch.args if isinstance(arg, TensorMapArg))
    assert (a.dtype, a.box) == (torch.float16, (64, 64, 1)) and (b.dtype, b.box) == (torch.float32, (32, 64, 1))
    assert b.dims == ((K, N, 1) if majors[1] == "K" else (N, K, 1))
    assert launch.shared_bytes <= H200.shared_bytes
    for one in (launch, patch):
        check_compiles(one)
    marked = launch.unaligned and launch.unaligned.unaligned
    assert marked and marked.kernel.endswith("_mark") and patch.unaligned


def encoded(*kinds: tuple[int, bool], lines: int = M, length: int = K) -> Program:
    """kinds: planes of each matrix, and whether it has exponents by line."""
    matrices = tuple(Matrix(f"x{i}", torch.float32, (lines, length), (length, 1)) for i in range(len(kinds)))
    results = tuple(Encoded(f"halves{i}", Halves(lines, length, *kind)) for i, kind in enumerate(kinds))
    return encode_program(Encode("encode", matrices, results), H200)


@pytest.mark.parametrize("planes", [(1,), (2,), (2, 2), (1, 0)])
def test_encodings_of_a_step_are_two_launches(planes: tuple[int, ...]) -> None:
    program = encoded(*((p, False) for p in planes))
    assert len(program.launches) == 2
    for launch in program.launches:
        check_compiles(launch)


@pytest.mark.parametrize(
    "kinds", [((2, True), (2, True)), ((1, True),), ((1, True), (0, False)), ((2, False), (2, True))]
)
def test_exponents_by_line_need_no_sample(kinds: tuple[tuple[int, bool], ...]) -> None:
    """What does is looked at while lines are split."""
    program, sampled = encoded(*kinds), [i for i, (_, by_line) in enumerate(kinds) if not by_line]
    assert len(program.launches) == 1 + bool(sampled) and len(program.workspaces) == bool(sampled)
    assert program.launches[0].grid == (2 * H200.multiprocessors, len(kinds), 1)
    if sampled:
        assert program.launches[1].args[0] == BufferArg(f"x{sampled[0]}", torch.float32)
        assert program.launches[1].kernel == f"split_f16x{kinds[sampled[0]][0]}"
    for launch in program.launches:
        check_compiles(launch)


@pytest.mark.parametrize(
    ("length", "lines"), [(1, 8), (1024, 8), (1025, 4), (2049, 2), (4096, 2), (4097, 1), (9000, 1)]
)
def test_a_block_splits_as_many_lines_as_it_holds(length: int, lines: int) -> None:
    count = 2 * H200.multiprocessors
    for rows, grid in ((3 * count * lines, 3), (3 * count * lines + 1, 4), (99 * count * lines, 16)):
        (launch,) = encoded((2, True), lines=rows, length=length).launches
        assert launch.grid == (count, grid, 1)


def test_rounding_in_registers_pays_where_few_products_read_a_weight() -> None:
    halves = HalfProducts(H200, tf32=True, library=True)
    longer, split = halves.registers(1024, 8192, 8192), halves.split(8192 * 8192)
    assert longer < split < 3 * longer  # forward alone, or with the input's gradient
    assert HalfProducts(H200, tf32=False, library=True).registers(1024, 8192, 8192) == math.inf


def test_float32_products_that_are_not_split_are_left_to_others() -> None:
    call, record = planned(lambda x, w: x @ w)
    call(torch.randn(M, K), torch.randn(K, N))
    refused = GemmSm90().supports(record.plans[0].regions[0], H200)
    assert isinstance(refused, Refused) and "not split" in refused.reason


def test_what_is_split_competes_only_among_what_reads_halves() -> None:
    plan = plan_of(lambda x, w: x @ w, torch.randn(M, K), torch.randn(K, N), tf32=True)
    found = candidates(plan, H200, library=True, tensor_maps=True)
    assert {p.family for p in found[plan.regions[0].name]} == {"gemm_sm90"}
    assert [len(found[e.name]) for e in plan.encodes] == [1]


# Those that compete most often, and the one with most sums.
PAIRS = [replace(t, cluster=2) for t in TILES[1] if (t.m, t.n) in ((128, 256), (128, 192), (256, 160))]


@pytest.mark.parametrize("tile", [*TILES[1], *PAIRS], ids=str)
def test_every_tile_compiles(tile: Tile) -> None:
    region = product(torch.bfloat16, m=264)  # which is more than one row of any
    program = next(p for p in GemmSm90().programs(region, H200) if p.variant == tile.title(64))
    check_compiles(program.launches[0])
    assert program.launches[0].shared_bytes <= H200.shared_bytes


@pytest.mark.parametrize("whole", [False, True])
def test_every_tile_of_halves_by_line_compiles(whole: bool) -> None:
    """The headline's epilogue, on tiles that are whole or not."""
    m, n = (256, 26880) if whole else (264, 520)
    found = []
    for tf32, kind in ((False, Always), (True, Always), (True, Rounded)):
        for program in GemmSm90().programs(product(torch.float32, m=m, n=n, tf32=tf32, kind=kind), H200):
            source = program.launches[0].source
            assert "kByLineB = true" in source and f"kWhole = {str(whole).lower()}" in source
            check_compiles(program.launches[0])
            found.append(program.variant)
    assert {t.title(64) for t in (*TILES[1], *IN_REGISTERS)} <= {*found}


def test_several_results_residuals_and_masks() -> None:
    def function(x: torch.Tensor, w: torch.Tensor, row: torch.Tensor, tile: torch.Tensor) -> Any:
        y = x @ w
        return F.gelu(y + row), torch.relu(y) * tile, y > 0

    for dtype in (torch.float32, torch.bfloat16):
        shapes = [(M, K), (K, N), (N,), (M, N)]
        plan = plan_of(function, *(torch.randn(s, dtype=dtype) for s in shapes))
        for launch in best(plan.regions[0]).launches:
            check_compiles(launch)


def gelu(x: torch.Tensor, w: torch.Tensor, row: torch.Tensor, tile: torch.Tensor) -> Any:
    return F.gelu(x @ w + row)


def silu_and_residual(x: torch.Tensor, w: torch.Tensor, row: torch.Tensor, tile: torch.Tensor) -> Any:
    return F.silu(x @ w + row) + tile


def several(x: torch.Tensor, w: torch.Tensor, row: torch.Tensor, tile: torch.Tensor) -> Any:
    y = x @ w
    return F.gelu(y + row, approximate="tanh"), torch.sigmoid(y) * tile, y > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("function", [gelu, silu_and_residual, several])
def test_heavy_epilogues_compile_in_ping_pong(function: Callable[..., Any], dtype: torch.dtype) -> None:
    shapes = [(M, K), (K, N), (N,), (M, N)]
    (region,) = plan_of(function, *(torch.randn(s, dtype=dtype) for s in shapes), tf32=True).regions
    program = next(p for p in GemmSm90().programs(region, H200) if p.variant == "128×128×64 ping-pong")
    check_compiles(program.launches[0])


def test_ping_pong_is_predicted_to_hide_epilogues() -> None:
    measured: list[list[str]] = []

    def ranks(function: Callable[..., Any], m: int, n: int, k: int) -> list[str]:
        shapes = [(m, k), (k, n), (n,), (m, n)]
        tensors = (torch.empty(s, dtype=torch.bfloat16, device="meta") for s in shapes)
        (region,) = plan_of(function, *tensors).regions
        found = GemmSm90().programs(region, H200)
        measured.append([p.variant for p in contenders(found)])
        return [p.variant for p in found]

    def bare(x: torch.Tensor, w: torch.Tensor, row: torch.Tensor, tile: torch.Tensor) -> Any:
        return x @ w

    assert ranks(gelu, 4096, 4096, 4096)[0] == "128×128×64 ping-pong"
    assert ranks(bare, 8192, 8192, 1024)[0] == "128×128×64 ping-pong"
    assert ranks(bare, 4096, 4096, 4096)[0] == "128×256×64"
    assert all({"128×128×64 ping-pong", "128×256×64"} <= set(variants) for variants in measured)
    of_one_tile = ranks(gelu, 1024, 1024, 1024)
    assert of_one_tile.index("128×128×64") < of_one_tile.index("128×128×64 ping-pong")


def programs(dtype: torch.dtype, m: int, n: int, k: int) -> Sequence[Program]:
    """Those of y = x · wᵀ, best first."""
    x, w = (torch.empty(rows, k, dtype=dtype, device="meta") for rows in (m, n))
    (region,) = plan_of(lambda x, w: x @ w.T, x, w).regions
    return GemmSm90().programs(region, H200)


def variants(dtype: torch.dtype, m: int, n: int, k: int) -> list[str]:
    """The ones that are measured."""
    return [p.variant for p in contenders(programs(dtype, m, n, k))]


@pytest.mark.parametrize(
    ("dtype", "sizes", "best"),
    [
        (torch.bfloat16, (1024, 8192, 8192), "128×256×64"),  # measured
        (torch.float32, (1024, 8192, 8192), "128×128×64"),  # measured
        (torch.bfloat16, (3328, 1600, 2048), "256×160×64"),  # 130 tiles: one wave, where 128×128 takes three
        (torch.bfloat16, (1152, 4480, 3072), "128×160×64"),  # 252 tiles, two waves
        (torch.float32, (768, 1280, 512), "128×64×64"),  # 120 tiles, where 128×128 has 60
        (torch.float32, (768, 696, 4096), "128×64×64 split-K 2"),  # 66 tiles
        (torch.bfloat16, (768, 696, 4096), "128×64×64 split-K 2"),
    ],
)
def test_tiles_that_fill_waves_come_first(dtype: torch.dtype, sizes: tuple[int, int, int], best: str) -> None:
    found = variants(dtype, *sizes)
    assert found[0] == best and len(found) <= 3


def test_blocks_share_k_that_is_known_and_long() -> None:
    x, w = (torch.empty(rows, 4096, dtype=torch.bfloat16, device="meta") for rows in (768, 696))
    (region,) = plan_of(lambda x, w: x @ w.T, x, w).regions
    assert region.gemm is not None
    a, b = region.gemm.a, region.gemm.b

    def splits(k: Size) -> set[str]:
        gemm = replace(region.gemm, a=replace(a, shape=(768, k)), b=replace(b, shape=(k, 696)))
        found = GemmSm90().programs(replace(region, gemm=gemm), H200)
        return {p.variant for p in found if "split-K" in p.variant}

    assert splits(4096) == {"128×64×64 split-K 2", "128×128×64 split-K 2"}
    assert not splits(512) and not splits(sympy.Symbol("k", positive=True, integer=True))


class AsTheyLie(Always):
    """No product reads halves."""

    def gain(self, m: float, n: float, k: float, direct: int) -> float:
        return -1.0


def test_floats_that_copies_round_to_tf32() -> None:
    """One launch, with nothing beside it; what lies badly is left to the CUDA cores."""
    region = product(torch.float32, tf32=True, kind=AsTheyLie)
    program = best(region)
    (launch,) = program.launches
    a, b = (arg for arg in launch.args if isinstance(arg, TensorMapArg))
    assert (a.dtype, a.box[0], a.tf32, b.tf32) == (torch.float32, 32, True, True) and not program.workspaces
    assert "using Element = float;" in launch.source and "×32" in program.variant
    check_compiles(launch)
    fallbacks = launch.unaligned, launch.unaligned and launch.unaligned.unaligned
    assert fallbacks[1] is not None and "gemm_simt" in fallbacks[1].source
    refused = GemmSm90().supports(product(torch.float32, tf32=False, kind=AsTheyLie), H200)
    assert refused is not None and "not split" in refused.reason


def test_halves_are_worth_it_where_k_is_long() -> None:
    halves = HalfProducts(H200, tf32=True, library=False)
    for m, n, k, worth in ((1024, 8192, 8192, True), (768, 696, 4096, False), (715, 2304, 512, False)):
        assert (halves.gain(m, n, k, 128) > halves.split(m * k)) == worth


def test_the_headline_measures_no_further_tiles() -> None:
    """Whose compilation its first call would wait for."""
    assert variants(torch.bfloat16, 1024, 8192, 8192) == ["128×256×64", "256×128×64", "128×128×64 ping-pong"]
    assert variants(torch.float32, 1024, 8192, 8192) == ["128×128×64"]


@pytest.mark.parametrize(
    ("dtype", "sizes", "best"),
    [
        (torch.bfloat16, (4096, 4096, 4096), "128×256×64"),
        (torch.bfloat16, (4096, 4096, 4104), "128×256×64 in pairs"),  # measured
        (torch.bfloat16, (7296, 648, 3848), "128×192×64 in pairs"),
        (torch.bfloat16, (7296, 648, 3840), "128×192×64"),  # measured
        (torch.float32, (4096, 4096, 4104), "128×128×64"),  # whose halves are padded
    ],
)
def test_where_copies_are_the_limit_pairs_of_blocks_share_them(
    dtype: torch.dtype, sizes: tuple[int, int, int], best: str
) -> None:
    """Lines that are no multiples of 128 bytes; others have no such programs to measure."""
    found = variants(dtype, *sizes)
    assert found[0] == best and "128×128×64 ping-pong in pairs" not in found
    assert any("pairs" in variant for variant in found) == ("pairs" in best)


@pytest.mark.parametrize(("m", "n", "grid"), [(640, 256, 6), (256, 256, 2), (9999, 4096, 132)])
def test_grids_of_pairs(m: int, n: int, grid: int) -> None:
    """Whole clusters, also of an odd number of row tiles. A single one has none."""
    launch = next(p.launches[0] for p in programs(torch.bfloat16, m, n, 200) if p.variant == "128×256×64 in pairs")
    assert (launch.grid, launch.cluster) == ((grid, 1, 1), (2, 1, 1)) and "kCluster = 2" in launch.source
    printed = HostPrinter("f", plan_of(torch.relu, torch.randn(8)), {}, Kernels()).launch(launch, {})
    assert f"{{{grid}, 1, 1, 384, {launch.shared_bytes}, true, 2}}" in "".join(printed)
    assert not any("pairs" in p.variant for p in programs(torch.bfloat16, 128, n, 200) if p.variant[:3] == "128")


@pytest.mark.parametrize("majors", ["KK", "KM"])
def test_pairs_fetch_equal_parts(majors: str) -> None:
    """Of a K-major right operand in narrower boxes; of another where a tile has an even number of them."""
    found = {p.variant: p.launches[0] for p in GemmSm90().programs(product(torch.bfloat16, majors, n=520), H200)}
    boxes = {
        variant.split("×")[1]: launch.args[1].box[1]
        for variant, launch in found.items()
        if variant.startswith("128") and variant.endswith("×64 in pairs") and isinstance(launch.args[1], TensorMapArg)
    }
    narrow = {"128": 64, "256": 64, "192": 32, "64": 32, "96": 16, "160": 16, "224": 16}
    assert boxes == (narrow if majors == "KK" else {"128": 64, "256": 64, "96": 64, "224": 64})


def test_small_float32_products_go_to_the_tensor_cores() -> None:
    halves = HalfProducts(H200, tf32=False, library=False)
    for m, n, k in ((672, 640, 1920), (632, 880, 544)):
        assert halves.gain(m, n, k, direct=128) > halves.split(m * k) + halves.split(n * k)
    assert halves.gain(256, 256, 256, direct=128) < 2 * halves.split(256 * 256)


def test_the_saved_mask_of_a_training_forward() -> None:
    x, w = torch.randn(M, K), torch.randn(N, K, requires_grad=True)
    region = plan_of(lambda x, w: F.leaky_relu(F.linear(x, w), 0.1), x, w).regions[0]
    assert any(s.access.bits for s in region.stores)
    for launch in best(region).launches:
        check_compiles(launch)


@pytest.mark.parametrize(
    ("region", "reason"),
    [
        (lambda: product(torch.bfloat16, k=32), "fewer than 64"),
        (lambda: product(torch.bfloat16, k=203), "not 16-byte aligned"),
        (lambda: product(torch.float64), "torch.float64"),
    ],
)
def test_refusals_say_why(region: Callable[[], Region], reason: str) -> None:
    refused = GemmSm90().supports(region(), H200)
    assert isinstance(refused, Refused) and reason in refused.reason


def test_other_chips_are_refused() -> None:
    refused = GemmSm90().supports(product(torch.bfloat16), CHIPS["sm_80"])
    assert isinstance(refused, Refused) and "sm_90a" in refused.reason


def test_an_operand_without_a_contiguous_dimension() -> None:
    x = torch.randn(M, 2 * K, dtype=torch.bfloat16)[:, ::2]
    (region,) = plan_of(lambda x, w: x @ w, x, torch.randn(K, N, dtype=torch.bfloat16)).regions
    refused = GemmSm90().supports(region, H200)
    assert isinstance(refused, Refused) and "contiguous" in refused.reason


def test_only_where_launches_may_take_tensor_maps() -> None:
    call, record = planned(lambda x, w: x @ w)
    call(*(torch.randn(s, dtype=torch.bfloat16) for s in ((M, K), (K, N))))
    (plan,) = record.plans
    for tensor_maps in (False, True):
        (found,) = candidates(plan, H200, library=True, tensor_maps=tensor_maps).values()
        assert any(p.family == "gemm_sm90" for p in found) == tensor_maps
        assert found[-1].library and not any(p.library for p in found[:-1])
        assert [p.cost for p in found[:-1]] == sorted(p.cost for p in found[:-1])


def test_what_is_predicted_to_be_far_slower_is_not_measured() -> None:
    (region,) = plan_of(lambda x, w: x @ w, torch.randn(M, K), torch.randn(K, N)).regions
    fast, slow = (Program("a", region, (), cost=1.0), Program("b", region, (), cost=9.0))
    again = Program("a", region, (), cost=2.0)
    assert contenders([fast, again, slow]) == [fast]
    assert contenders([fast, Program("b", region, (), cost=2.0)])[1].family == "b"


def test_the_best_few_tiles_of_a_family_are_measured() -> None:
    found = GemmSm90().programs(product(torch.bfloat16, m=4096, n=4096, k=4096), H200)
    assert len(contenders(found)) > 1
