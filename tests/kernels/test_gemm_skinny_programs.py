"""Which products of few rows the family takes, how it ranks and launches them, and that its programs are right."""

from __future__ import annotations

import pytest
import sympy
import torch
import torch.nn.functional as F
from test_programs import large

from fusewright import compiler
from fusewright.chip import chip_for
from fusewright.codegen.launch import BufferArg, LaunchSpec, evaluate
from fusewright.fusion.plan import Gemm, Matrix, Region
from fusewright.ir.size import SizeSymbol
from fusewright.kernels import gemm_skinny
from fusewright.kernels.base import Program, Refused
from fusewright.kernels.choose import PORTABLE, _programs, candidates, contenders
from fusewright.kernels.gemm_skinny import GemmSkinny, seconds
from fusewright.runtime.executable import Executable
from fusewright.runtime.nvrtc import cached_cubin, parse_resources
from fusewright.runtime.target import SimulatorTarget
from graphs import planned, planned_module

HOPPER = chip_for("sm_90a")
FAMILY = GemmSkinny()


def region_of(m: int, n: int, k: int, dtype: torch.dtype = torch.float32) -> Region:
    (region,) = large(m, n, k, dtype).regions
    return region


def with_operands(a: tuple[tuple[object, object], ...], b: tuple[tuple[object, object], ...]) -> Region:
    """The region of a 16 × 4096 × 4096 product with operands of other (shape, stride)."""
    matrices = (Matrix(name, torch.float32, *m) for name, m in (("x", a), ("w", b)))  # type: ignore[arg-type]
    region = region_of(16, 4096, 4096)
    return Region(region.name, (a[0][0],), b[0][1], region.sinks, (), Gemm(*matrices, torch.float32))  # type: ignore[arg-type]


X, W = ((16, 4096), (4096, 1)), ((4096, 4096), (1, 4096))


@pytest.mark.parametrize(
    ("a", "b", "reason"),
    [
        (X, W, None),
        (X, (W[0], (4096, 1)), None),
        (((16, 4096), (0, 1)), W, None),
        (((32, 4096), (4096, 1)), W, None),
        (((33, 4096), (4096, 1)), W, "more than 32 rows"),
        (((sympy.Symbol("s0", integer=True, positive=True), 4096), (4096, 1)), W, "more than 32 rows"),
        (((16, 4096), (1, 16)), W, "operand a are not contiguous"),
        (X, (W[0], (2, 8192)), "no contiguous dimension"),
        (((16, 4096), (4098, 1)), W, "not 16-byte aligned"),
        (X, (W[0], (1, 4097)), "not 16-byte aligned"),
        (X, (W[0], (4097, 1)), None),
        (((16, 64), (64, 1)), ((64, 4096), (1, 64)), None),
    ],
)
def test_supports(a: tuple[object, ...], b: tuple[object, ...], reason: str | None) -> None:
    found = FAMILY.supports(with_operands(a, b), HOPPER)  # type: ignore[arg-type]
    if reason is None:
        assert found is None
    else:
        assert isinstance(found, Refused) and reason in found.reason


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(1, 4096, 4096), (16, 4096, 4096), (16, 11008, 4096), (32, 8192, 8192)], ids=str)
def test_chosen_for_few_rows_and_a_large_weight(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    found = candidates(large(*shape, dtype), HOPPER, library=True)["fused_addmm_relu"]
    assert found[0].family == "gemm_skinny"
    measured = contenders(found)
    assert {p.family for p in measured} >= {"gemm_skinny", "library"}
    blocks = found[0].launches[0].grid[0]
    assert 0.45 * HOPPER.multiprocessors < blocks <= 4 * HOPPER.multiprocessors


@pytest.mark.parametrize("shape", [(1024, 8192, 8192), (128, 4096, 4096), (16, 64, 64)], ids=str)
def test_not_chosen_otherwise(shape: tuple[int, int, int]) -> None:
    for found in candidates(large(*shape), HOPPER, library=False).values():
        assert found[0].family == "gemm_simt"
        assert all(p.family != "gemm_skinny" for p in contenders(found))


def test_small_sizes_stand_for_large_ones() -> None:
    """A check at small sizes asks for the variant of the large ones."""
    for shape in ((16, 4096, 4096), (5, 4096, 4096)):
        variant = FAMILY.programs(region_of(*shape), HOPPER)[0].variant
        assert variant in [p.variant for p in FAMILY.programs(region_of(shape[0], 136, 200), HOPPER)]


def test_the_best_tile_comes_first() -> None:
    region = region_of(16, 4096, 4096)
    found = FAMILY.programs(region, HOPPER)
    assert len(found) == 3 and [p.cost for p in found] == sorted(p.cost for p in found)
    # Never less than the weight's bytes take, and not twice it.
    floor = 4 * 4096 * 4096 / HOPPER.bandwidth
    assert floor < found[0].cost < 2 * floor
    assert found[0].cost == seconds(16, 4096, 4096, torch.float32, HOPPER)
    assert seconds(33, 4096, 4096, torch.float32, HOPPER) == float("inf")


def test_narrow_lines_are_copied_in_narrow_pieces() -> None:
    """A weight whose columns are contiguous, at odd distances: pieces of 4 bytes alone fit."""
    found = FAMILY.programs(with_operands(X, (W[0], (4097, 1))), HOPPER)
    assert [p.variant for p in found] == ["16×8"]


def epilogue(x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Several results, one of booleans, one transposed."""
    h = F.linear(x, w, bias)
    return F.leaky_relu(h * 2.0, 0.1), h > 0, torch.sigmoid(h).t()


def product(x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return ((x @ w) * bias,)


def operands(function: object, m: int, n: int, k: int, dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    w = torch.randn((n, k) if function is epilogue else (k, n), generator=generator)
    return [t.to(dtype) for t in (torch.randn(m, k, generator=generator), w, torch.randn(n, generator=generator))]


def programs_of(region: Region) -> dict[str, Program]:
    """By variant."""
    return {p.variant: p for p in FAMILY.programs(region, HOPPER)}


def unaligned(program: Program) -> LaunchSpec:
    (launch,) = program.launches
    assert launch.unaligned is not None
    return launch.unaligned


CASES = [
    (epilogue, (5, 72, 640), torch.float32, "16×8"),
    (epilogue, (9, 33, 72), torch.bfloat16, "16×32"),
    (epilogue, (18, 136, 200), torch.float16, "32×16"),
    (product, (3, 136, 1104), torch.bfloat16, "16×16"),
]


@pytest.mark.parametrize(("function", "shape", "dtype", "variant"), CASES)
def test_programs_in_the_simulator(
    function: object, shape: tuple[int, int, int], dtype: torch.dtype, variant: str
) -> None:
    """Aligned, and (some) with operands that start at odd places, where gemm_simt takes over."""
    inputs = operands(function, *shape, dtype)
    run, record = planned(function)  # type: ignore[arg-type]
    run(*inputs)
    (plan,) = record.plans
    assert all(FAMILY.supports(region, HOPPER) is None for region in plan.regions)
    programs = {region.name: programs_of(region)[variant] for region in plan.regions}
    executable = Executable(plan, programs, SimulatorTarget(HOPPER), torch.device("cpu"))
    exact = function(*(t.double() for t in inputs))  # type: ignore[operator]
    moved = [torch.empty(t.numel() + 1, dtype=dtype)[1:].view(t.shape).copy_(t) for t in inputs]
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    for arguments in (inputs, moved) if function is epilogue else (inputs,):
        for found, expected in zip(executable(*arguments), exact, strict=True):
            if found.dtype == torch.bool:
                assert (found != expected).float().mean() < 0.01
            else:
                torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=10 * tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_launches_compile_without_spills(dtype: torch.dtype) -> None:
    run, record = planned(epilogue)
    run(*operands(epilogue, 16, 264, 2048, dtype))
    (launch,) = programs_of(record.plans[0].regions[0])["16×32"].launches
    resources = parse_resources(cached_cubin(launch.source, "sm_90a").log)[launch.kernel]
    assert (resources.spill_bytes, resources.stack_bytes) == (0, 0)


def test_arguments_follow_the_parameters_of_the_kernel() -> None:
    run, record = planned(epilogue)
    run(*operands(epilogue, 16, 264, 2048, torch.float32))
    program = programs_of(record.plans[0].regions[0])["16×8"]
    for spec in (*program.launches, unaligned(program)):
        signature = spec.source.split(f"\n{spec.kernel}(")[1].split(") {")[0]
        parameters = [p.strip() for p in signature.replace("\n", " ").split(",")]
        assert len(parameters) == len(spec.args)
        for parameter, arg in zip(parameters, spec.args, strict=True):
            assert ("*" in parameter) == isinstance(arg, BufferArg)


def test_any_number_of_rows_at_run_time() -> None:
    """One program serves every batch size: what depends on it are grids and sizes."""
    s = sympy.Symbol("s0", integer=True, positive=True)
    region = with_operands(((s, 4096), (4096, 1)), W)
    (launch,) = programs_of(region)["32×32"].launches
    for m, blocks in ((1, 1), (32, 1), (33, 2), (1000, 32)):
        assert [evaluate(g, {s: m}) for g in launch.grid] == [blocks * 128, 1, 1]
    assert "s0" not in launch.source.split("run(")[0]


def test_where_rows_may_be_many_another_program_is_there_for_them() -> None:
    """It is the one for many rows, although the example has few; at every size one launch has a grid."""
    s = SizeSymbol("s0", 16, integer=True, positive=True)
    few = _programs(with_operands(((s, 4096), (4096, 1)), W), HOPPER, PORTABLE, False)[0]
    many = _programs(region_of(1024, 4096, 4096), HOPPER, PORTABLE, False)[0]
    assert few.family == "gemm_skinny"
    for m in (0, 1, 16, 17, 64, 65, 1000):
        grids = [evaluate(launch.grid[0], {s: m}) for launch in few.launches]
        alone = many.launches[0].grid[0] * -(-m // 256) // 4
        assert grids == ([-(-m // 16) * 128, 0] if m <= 64 else [0, alone])


def test_one_compilation_serves_small_and_large_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose example is small: the size symbol knows that."""
    monkeypatch.setattr(gemm_skinny, "LEAST_BYTES", 0)
    model = torch.nn.Linear(64, 24)
    built: list[Executable] = []
    original = compiler.build
    monkeypatch.setattr(compiler, "build", lambda *a, **k: built.append(original(*a, **k)) or built[-1])  # type: ignore[func-returns-value]
    compiled = torch.compile(model, backend="fusewright", options={"simulate": True}, dynamic=True)
    with torch.no_grad():
        for n in (16, 3, 70):
            x = torch.randn(n, 64)
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-5)
    assert [[p.family for p in executable.programs.values()] for executable in built] == [["gemm_skinny"]]


def tower(x: torch.Tensor, w: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Three products: of inputs of the call, and of what the call made."""
    y = F.relu(F.linear(x, w))
    return (F.linear(F.linear(y, v), y),)


def test_only_weights_from_before_the_call_are_read_ahead() -> None:
    """The first launch waits for what ran before the call, and the last weight is made by the call."""
    run, record = planned(tower)
    run(torch.randn(4, 64), torch.randn(64, 64), torch.randn(64, 64))
    (plan,) = record.plans
    found = candidates(plan, HOPPER, library=False)
    ahead = {
        p.region.gemm.b.buffer: p.launches[0].ahead  # type: ignore[union-attr]
        for programs in found.values()
        for p in programs
        if p.family == "gemm_skinny"
    }
    first, second, made = ahead
    assert ahead == {first: (), second: (second,), made: ()}


@pytest.mark.parametrize(("changing", "ahead"), [("", True), ("xy", False), ("y", True), ("x", False)])
def test_nothing_is_read_ahead_beside_a_launch_that_may_have_nothing_to_do(changing: str, ahead: bool) -> None:
    """An empty batch launches nothing, and what ran before the call may still write the weight."""
    x, y, w, v = torch.randn(4, 64), torch.randn(5, 64), torch.randn(64, 64), torch.randn(64, 64)
    for name, tensor in (("x", x), ("y", y)):
        if name in changing:
            torch._dynamo.mark_dynamic(tensor, 0)
    run, record = planned_module(lambda x, y, w, v: (F.linear(x, w), F.linear(y, v)))
    run(x, y, w, v)
    (plan,) = record.plans
    first, second = (
        next(p for p in programs if p.family == "gemm_skinny")
        for programs in candidates(plan, HOPPER, library=False).values()
    )
    assert not first.launches[0].ahead and bool(second.launches[0].ahead) is ahead


def test_vectors_that_all_rows_read_are_prefetched() -> None:
    run, record = planned(product)
    run(*operands(product, 16, 264, 512, torch.float32))
    (launch,) = programs_of(record.plans[0].regions[0])["16×8"].launches
    bias = launch.args[-2].buffer  # type: ignore[union-attr]
    assert f"fusewright::prefetch({bias} + n);" in launch.source


def test_no_rows_launch_nothing() -> None:
    program = FAMILY.programs(region_of(0, 4096, 4096), HOPPER)[0]
    assert all(0 in launch.grid for launch in program.launches)
