"""Programs of a set of plans: they compile for every generation without spills, and launch what their sizes need."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import pytest
import sympy
import torch
import torch.nn.functional as F

from fusewright.chip import Chip, chip_for
from fusewright.codegen.launch import BufferArg, LaunchSpec, evaluate
from fusewright.fusion.plan import FusionPlan
from fusewright.kernels.base import Program
from fusewright.kernels.choose import candidates
from fusewright.runtime.nvrtc import compile_all
from graphs import gradients, planned, planned_module

HOPPER = chip_for("sm_90a")


def leaf(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, dtype=dtype).requires_grad_()


def plans_of(function: Callable[..., Any], *inputs: torch.Tensor) -> list[FusionPlan]:
    run, record = planned(function)
    gradients(run(*inputs), inputs)
    return record.plans


def headline(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return F.leaky_relu(F.linear(x, w, b) * 2.0, 0.1)


def gated(x: torch.Tensor, w: torch.Tensor, v: torch.Tensor, s: torch.Tensor) -> Any:
    h = F.mish(F.linear(x, w)) * F.gelu(F.linear(x, v), approximate="tanh") + s
    return h.transpose(0, 1).contiguous(), torch.where(h > 0, torch.log1p(h.abs()), F.softplus(h)).sum(0)


def plain(x: torch.Tensor, y: torch.Tensor) -> Any:
    return F.elu(x * torch.sigmoid(y)).t() + torch.pow(x.abs(), 1.7).t(), torch.remainder(x, 0.7), x > y


def masked(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor, y: torch.Tensor) -> Any:
    """The mask of a sum that is laid out in another way than the product."""
    return torch.relu(y + F.linear(x, w, b).t()), torch.relu(F.linear(x, w, b).view(-1, 2, 12).transpose(0, 1))


CASES: dict[str, Callable[[], list[FusionPlan]]] = {
    **{
        f"headline {str(d).removeprefix('torch.')}": lambda d=d: plans_of(
            headline, leaf(100, 65, dtype=d), leaf(72, 65, dtype=d), leaf(72, dtype=d)
        )
        for d in (torch.float32, torch.float16, torch.bfloat16, torch.float64)
    },
    "gated": lambda: plans_of(gated, leaf(33, 40), leaf(24, 40), leaf(24, 40), leaf(33, 1)),
    "masked": lambda: plans_of(masked, leaf(33, 40), leaf(24, 40), leaf(24), leaf(24, 33)),
    "plain": lambda: plans_of(plain, leaf(33, 40), leaf(33, 40)),
}


@lru_cache
def plans(name: str) -> list[FusionPlan]:
    return CASES[name]()


def programs(plan: FusionPlan, chip: Chip = HOPPER) -> Iterator[Program]:
    for found in candidates(plan, chip, library=False).values():
        yield found[0]


def launches(plan: FusionPlan, chip: Chip = HOPPER) -> list[LaunchSpec]:
    found = [launch for p in programs(plan, chip) for launch in p.launches]
    return found + [launch.unaligned for launch in found if launch.unaligned]


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
@pytest.mark.parametrize("name", CASES)
def test_every_kernel_compiles_without_spills(name: str, arch: str) -> None:
    specs = [launch for plan in plans(name) for launch in launches(plan, chip_for(arch))]
    for spec, cubin in zip(specs, compile_all([s.source for s in specs], arch), strict=True):
        resources = cubin.resources[spec.kernel]
        if spec.unaligned is None and resources.spill_bytes <= 16:
            continue  # ptxas trades a register for occupancy where pointers are unaligned; nothing that time shows
        assert resources.spill_bytes == 0, f"{spec.kernel} spills"
        # Powers and remainders call functions of their own, which have frames.
        if "pow" not in spec.kernel and "remainder" not in spec.kernel:
            assert resources.stack_bytes == 0, f"{spec.kernel} uses local memory"


@pytest.mark.parametrize("name", CASES)
def test_arguments_follow_the_parameters_of_the_kernel(name: str) -> None:
    for plan in plans(name):
        for spec in launches(plan):
            signature = spec.source.split(f"\n{spec.kernel}(")[1].split(") {")[0]
            parameters = [p.strip() for p in signature.replace("\n", " ").split(",")]
            assert len(parameters) == len(spec.args)
            for parameter, arg in zip(parameters, spec.args, strict=True):
                assert ("*" in parameter) == isinstance(arg, BufferArg)
                if isinstance(arg, BufferArg):
                    assert arg.written == (not parameter.startswith("const "))


def large(m: Any, n: int, k: int, dtype: torch.dtype = torch.float32) -> FusionPlan:
    """A plan for sizes too large to run here."""
    from torch._subclasses import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx

    from fusewright import compiler
    from fusewright.capture.fx import from_fx

    with FakeTensorMode() as mode:
        inputs = [torch.empty(s, dtype=dtype) for s in ((m, k), (n, k), (n,))]
    with mode:
        module = make_fx(lambda x, w, b: [torch.addmm(b, x, w.t()).relu()], tracing_mode="real")(*inputs)
    return compiler.plan(from_fx(module))


def test_the_cost_model_prefers_large_tiles_for_large_products_alone() -> None:
    def tile(m: int, n: int, k: int) -> int:
        (program,) = programs(large(m, n, k))
        (launch,) = program.launches
        # Output elements of a block.
        blocks = launch.grid[0] * launch.grid[1]
        return m * n // blocks

    assert tile(4096, 4096, 4096) >= 4 * tile(256, 256, 256)
    assert tile(1024, 8192, 8192) >= 64 * 64


def test_ranked_best_first() -> None:
    found = next(iter(candidates(large(512, 512, 512), HOPPER, library=True).values()))
    own = [p.cost for p in found if p.library is None]
    assert own == sorted(own)
    assert len(own) > 1
    assert found[-1].library is not None


@pytest.mark.parametrize("shape", [(1, 1), (7, 3), (100, 72), (129, 257)])
def test_a_grid_covers_every_element(shape: tuple[int, int]) -> None:
    m, n = shape
    plan = large(m, n, 8)
    found = candidates(plan, HOPPER, library=False)["fused_addmm_relu"]
    for program in (p for p in found if p.family == "gemm_simt"):
        (launch,) = program.launches
        numbers = launch.source.split("GemmSimt<")[1].split(",")[2:4]
        tile_m, tile_n = (int(x) for x in numbers)
        assert launch.grid[0] * launch.grid[1] * launch.grid[2] == -(-m // tile_m) * -(-n // tile_n)
        assert launch.block[0] * launch.block[1] * launch.block[2] <= 1024
        assert launch.shared_bytes <= HOPPER.shared_bytes


def test_empty_sizes_launch_nothing_or_nothing_wrong() -> None:
    for plan in plans_of(headline, leaf(0, 8), leaf(5, 8), leaf(5)):
        for spec in launches(plan):
            assert all(int(g) >= 0 for g in spec.grid)


def test_dynamic_sizes_are_arguments_not_text() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(8, 24), torch.nn.ReLU())
    run, record = planned_module(model)
    x = torch.randn(6, 8)
    torch._dynamo.mark_dynamic(x, 0)
    run(x).sum().backward()
    for plan in record.plans:
        for spec in launches(plan):
            symbols = set(spec.symbols())
            if spec.kernel.endswith("_splits"):  # adds a number of partial sums that is fixed
                assert not symbols
                continue
            (symbol,) = symbols
            assert isinstance(symbol, sympy.Symbol)
            for size in (1, 6, 1000):
                grid = [int(evaluate(g, {symbol: size})) for g in spec.grid]
                assert all(g > 0 for g in grid)


def test_column_sums_split_the_rows_of_tall_tensors() -> None:
    tall = leaf(8192, 32, dtype=torch.float64).detach()
    run, record = planned(lambda x: (x * 2).sum(0))
    run(tall)
    (program,) = programs(record.plans[0])
    assert len(program.launches) == 2
    assert len(program.workspaces) == 1
    assert program.launches[0].grid[1] == program.workspaces[0].shape[0]


def test_library_keeps_the_precision_of_the_region() -> None:
    """A 16-bit product in the library rounds before the epilogue: it is taken in float32, or with the bias."""
    plan = plans("headline bfloat16")[0]
    found = next(iter(candidates(plan, HOPPER, library=True).values()))[-1]
    assert found.library is not None
    (workspace,) = found.workspaces
    assert workspace.dtype == torch.float32 or found.library.bias is not None


@pytest.mark.parametrize(
    ("rows", "columns", "sums", "threads"),
    [(1024, 512, 1, 512), (64, 512, 1, 256), (512, 1 << 15, 1, 256), (512, 64, 6, 256)],
)
def test_column_sums_keep_loads_under_way(rows: int, columns: int, sums: int, threads: int) -> None:
    """Blocks have more threads where there are few of them; not of short columns, nor for many sums."""
    run, record = planned(lambda x: [(x * (i + 2)).sum(0) for i in range(sums)])
    run(torch.zeros(rows, columns))
    (program,) = programs(record.plans[0])
    assert program.launches[0].block == (threads, 1, 1)
    assert f"ColumnSum<Epilogue, {threads}, " in program.launches[0].source
