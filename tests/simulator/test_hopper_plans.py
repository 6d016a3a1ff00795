"""What `torch.compile` plans for a Hopper chip runs in the simulator: the tensor cores' products among it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.fx.experimental.proxy_tensor import make_fx

from fusewright import compiler
from fusewright.capture.fx import from_fx
from fusewright.chip import CHIPS, Chip
from fusewright.fusion.plan import Region
from fusewright.kernels.base import Program
from fusewright.kernels.choose import candidates
from fusewright.kernels.gemm_sm90 import GemmSm90, HalfProducts
from fusewright.runtime import frozen
from fusewright.runtime.executable import Executable
from fusewright.runtime.target import SimulatorTarget


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Executable]]:
    original, executables = compiler.build, []

    def build(*args: object, **kwargs: object) -> object:
        made = original(*args, **kwargs)
        executables.append(getattr(made, "executable", made))
        return made

    monkeypatch.setattr(compiler, "build", build)
    torch._dynamo.reset()
    yield executables


def families(executables: list[Executable]) -> list[str]:
    return [e.programs[region.name].family for e in executables for region in e.plan.regions]


def headline(x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return F.leaky_relu(F.linear(x, w, bias) * 2, 0.1)


def relative(call: Callable[..., torch.Tensor], m: int, n: int, k: int, dtype: torch.dtype) -> float:
    generator = torch.Generator().manual_seed(0)
    x, w, bias = (torch.randn(shape, generator=generator).to(dtype) for shape in ((m, k), (n, k), (n,)))
    expected = headline(x.double(), w.double(), bias.double())
    return float((call(x, w, bias).double() - expected).norm() / expected.norm())


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 4e-3), (torch.float16, 5e-4)], ids=str)
def test_16_bit_products_run_on_the_tensor_cores(dtype: torch.dtype, tolerance: float, built: list[Executable]) -> None:
    call = torch.compile(headline, backend="fusewright", options={"simulate": True, "arch": "sm_90a"})
    assert relative(call, 128, 256, 128, dtype) < tolerance
    assert families(built) == ["gemm_sm90"]


def test_float32_products_of_halves(built: list[Executable], monkeypatch: pytest.MonkeyPatch) -> None:
    """Split, multiplied and patched, where a plan finds that it pays; here it does whatever the size."""
    call = torch.compile(headline, backend="fusewright", options={"simulate": True, "arch": "sm_90a"})
    assert relative(call, 16, 24, 128, torch.float32) < 1e-6
    assert families(built) == ["gemm_simt"]
    torch._dynamo.reset()
    monkeypatch.setattr(HalfProducts, "gain", lambda *_: 1.0)
    assert relative(call, 136, 72, 200, torch.float32) < 6e-7
    assert families(built)[1:] == ["gemm_sm90"]


@pytest.mark.parametrize("precision", ["highest", "high"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(0, 256, 128), (64, 0, 128), (64, 256, 0)], ids=str)
def test_products_of_nothing_and_without_results(
    shape: tuple[int, int, int], dtype: torch.dtype, precision: str
) -> None:
    torch._dynamo.reset()
    call = torch.compile(headline, backend="fusewright", options={"simulate": True, "arch": "sm_90a"})
    m, n, k = shape
    x, w, bias = (torch.randn(s).to(dtype) for s in ((m, k), (n, k), (n,)))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        torch.testing.assert_close(call(x, w, bias), headline(x, w, bias))
    finally:
        torch.set_float32_matmul_precision(before)


def several(x: torch.Tensor, w: torch.Tensor, tile: torch.Tensor) -> list[torch.Tensor]:
    y = x @ w
    return [F.relu(y) + tile, y, y > 0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_ping_pong_gives_the_bits_of_cooperation(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several results of three tiles a block. Of float32, here by one product of halves, a row has lost bits, and one
    is beyond them: both are computed again, in float32."""
    monkeypatch.setattr(HalfProducts, "gain", lambda *_: 1.0)
    monkeypatch.setattr(HalfProducts, "registers", lambda *_: math.inf)
    torch.manual_seed(0)
    x, w, tile = (torch.randn(s).to(dtype) for s in ((200, 136), (200, 264), (136, 264)))
    x = x.T  # whose rows share an exponent
    x[20] *= 2.0**-24  # only the product's flags tell of it
    x[130] *= 2.0**40  # not in the sample, which would make all else too small
    chip = replace(CHIPS["sm_90a"], multiprocessors=2)
    halves = HalfProducts(chip, tf32=True, library=False) if dtype == torch.float32 else None
    plan = compiler.plan(from_fx(make_fx(several)(x, w, tile)), (), halves)
    found = candidates(plan, chip, library=False, tensor_maps=True)

    def run(variant: str) -> list[torch.Tensor]:
        programs = {n: next((p for p in ps if p.variant == variant), ps[0]) for n, ps in found.items()}
        assert any(p.variant == variant for p in programs.values())
        return Executable(plan, programs, SimulatorTarget(chip), torch.device("cpu"))(x, w, tile)

    results = run("128×128×64 ping-pong")
    for again in (run("128×128×64"), run("128×128×64 ping-pong")):
        assert all(map(torch.equal, results, again))
    exact = several(x.double(), w.double(), tile.double())[1]
    error = (results[1].double() - exact).norm(dim=1) / exact.norm(dim=1)
    assert error.max() < (4e-3 if dtype == torch.bfloat16 else 5e-4)
    assert dtype == torch.bfloat16 or error[[20, 130]].max() < 1e-6


def test_halves_with_exponents_by_line_and_others_are_kept_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """One graph reads the frozen weight along its lines alone, another across them too."""
    monkeypatch.setattr(HalfProducts, "gain", lambda *_: 1.0)
    monkeypatch.setattr(HalfProducts, "split", lambda *_: 0.0)
    torch.manual_seed(0)
    x, w = torch.randn(24, 136), torch.randn(136, 136)
    chip = CHIPS["sm_90a"]
    halves = HalfProducts(chip, tf32=False, library=False)

    def along(x: torch.Tensor, w: torch.Tensor) -> list[torch.Tensor]:
        return [x @ w.T]

    def both(x: torch.Tensor, w: torch.Tensor) -> list[torch.Tensor]:
        return [x @ w.T, x @ w]

    kinds = []
    for _ in range(2):
        for function in (along, both):
            plan = compiler.plan(from_fx(make_fx(function)(x, w)), (), halves, kept=(1,))
            kinds += [r.halves.by_line for e in plan.encodes if e.kept for r in e.results]
            programs = {n: ps[0] for n, ps in candidates(plan, chip, library=False, tensor_maps=True).items()}
            results = Executable(plan, programs, SimulatorTarget(chip), torch.device("cpu"))(x, w)
            for result, expected in zip(results, function(x.double(), w.double()), strict=True):
                assert (result.double() - expected).norm() < 6e-7 * expected.norm()
    assert kinds == [True, False] * 2
    frozen.thaw()


def prefer(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes this the first choice."""
    programs = GemmSm90.programs

    def chosen(self: GemmSm90, region: Region, chip: Chip) -> list[Program]:
        return [replace(p, cost=0.0 if p.variant == variant else 1.0) for p in programs(self, region, chip)]

    monkeypatch.setattr(GemmSm90, "programs", chosen)


def silu_and_residual(x: torch.Tensor, w: torch.Tensor, tile: torch.Tensor) -> torch.Tensor:
    return F.silu(x @ w.T) + tile


def test_pairs_take_any_number_of_rows(built: list[Executable], monkeypatch: pytest.MonkeyPatch) -> None:
    """An odd number of row tiles, less than one, whole ones: the second block of a pair may have nothing to do."""
    prefer("128×192×64 in pairs", monkeypatch)
    call = torch.compile(silu_and_residual, backend="fusewright", options={"simulate": True, "arch": "sm_90a"})
    torch.manual_seed(0)
    w = torch.randn(136, 72, dtype=torch.bfloat16)
    for rows in (264, 72, 256):
        x, tile = torch.randn(rows, 72).bfloat16(), torch.randn(rows, 136).bfloat16()
        for one in (x, tile):
            torch._dynamo.mark_dynamic(one, 0)
        expected = silu_and_residual(x.double(), w.double(), tile.double())
        assert (call(x, w, tile).double() - expected).norm() < 4e-3 * expected.norm()
    (executable,) = built
    (program,) = executable.programs.values()
    assert [(p.cluster, p.early) for p in program.launches] == [((2, 1, 1), True)]


def test_floats_are_rounded_to_tf32_as_they_are_copied(
    built: list[Executable], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the flags allow it: to nearest, which cutting off would miss by twice the error."""
    prefer("128×64×32", monkeypatch)
    monkeypatch.setattr(HalfProducts, "gain", lambda *_: -1.0)
    call = torch.compile(headline, backend="fusewright", options={"simulate": True, "arch": "sm_90a"})
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        assert 1e-4 < relative(call, 136, 72, 200, torch.float32) < 4e-4
    finally:
        torch.set_float32_matmul_precision(before)
    assert families(built) == ["gemm_sm90"] and not built[0].plan.encodes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_blocks_share_k(dtype: torch.dtype, built: list[Executable], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of float32 by halves a column has lost bits, of which only the flags of its part of a tile tell. Columns of the
    patch's other tile are not computed again: their error is below that of float32 sums."""
    prefer("128×64×64 split-K 2", monkeypatch)
    monkeypatch.setattr(HalfProducts, "gain", lambda *_: 1.0)
    call = torch.compile(
        lambda x, w: torch.relu(x @ w.T), backend="fusewright", options={"simulate": True, "arch": "sm_90a"}
    )
    torch.manual_seed(0)
    x, w, powers = torch.randn(136, 800), torch.randn(168, 800), torch.exp2(torch.randint(0, 41, (800,)).float())
    x *= powers
    w[140] /= powers
    x, w = x.to(dtype), w.to(dtype)
    result, exact = call(x, w).double(), torch.relu(x.double() @ w.double().T)
    error = (result - exact).abs() / (x.double().abs() @ w.double().abs().T)
    assert error.max() < (4e-3 if dtype == torch.bfloat16 else 1e-6)
    assert dtype == torch.bfloat16 or error[:, :128].max() < 1.5e-7
    (program,) = (p for p in built[0].programs.values() if p.family == "gemm_sm90")
    assert program.launches[0].cluster == (2, 1, 1)


@pytest.mark.parametrize(
    ("dtype", "sizes", "variant"),
    [
        # Both operands MN-major, of lines at multiples of 16 bytes; three row tiles.
        (torch.bfloat16, (264, 136, 72), "128×128×64 ping-pong"),
        # By one product of halves, in three whole row tiles; a row has lost bits.
        (torch.float32, (384, 192, 72), "128×96×64"),
    ],
    ids=str,
)
def test_pairs_give_the_bits_of_blocks_alone(
    dtype: torch.dtype, sizes: tuple[int, int, int], variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(HalfProducts, "gain", lambda *_: 1.0)
    monkeypatch.setattr(HalfProducts, "registers", lambda *_: math.inf)
    torch.manual_seed(0)
    m, n, k = sizes
    x, w, tile = torch.randn(k, m).to(dtype).T, torch.randn(k, n).to(dtype), torch.randn(m, n).to(dtype)
    x[20] *= 2.0**-24
    chip = CHIPS["sm_90a"]
    halves = HalfProducts(chip, tf32=True, library=False) if dtype == torch.float32 else None
    plan = compiler.plan(from_fx(make_fx(several)(x, w, tile)), (), halves)
    found = candidates(plan, chip, library=False, tensor_maps=True)

    def run(variant: str) -> list[torch.Tensor]:
        programs = {name: next((p for p in ps if p.variant == variant), ps[0]) for name, ps in found.items()}
        assert any(p.variant == variant for p in programs.values())
        return Executable(plan, programs, SimulatorTarget(chip), torch.device("cpu"))(x, w, tile)

    results = run(f"{variant} in pairs")
    assert all(map(torch.equal, results, run(variant)))
    exact = several(x.double(), w.double(), tile.double())[1]
    error = (results[1].double() - exact).norm(dim=1) / exact.norm(dim=1)
    assert error.max() < (4e-3 if dtype == torch.bfloat16 else 5e-4)


def test_other_chips_have_no_such_kernels(built: list[Executable]) -> None:
    call = torch.compile(headline, backend="fusewright", options={"simulate": True, "arch": "sm_80"})
    assert relative(call, 32, 64, 128, torch.bfloat16) < 4e-3
    assert families(built) == ["gemm_simt"]
