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
from fusewright.chip import CHIPS
from fusewright.kernels.choose import candidates
from fusewright.kernels.gemm_sm90 import HalfProducts
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
    x, w, tile = (torch.randn(s).to(dtype) for s in ((136, 200), (200, 264), (136, 264)))
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


def test_other_chips_have_no_such_kernels(built: list[Executable]) -> None:
    call = torch.compile(headline, backend="fusewright", options={"simulate": True, "arch": "sm_80"})
    assert relative(call, 32, 64, 128, torch.bfloat16) < 4e-3
    assert families(built) == ["gemm_simt"]
