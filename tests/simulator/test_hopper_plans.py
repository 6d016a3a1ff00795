"""What `torch.compile` plans for a Hopper chip runs in the simulator: the tensor cores' products among it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F

from fusewright import compiler
from fusewright.kernels.gemm_sm90 import HalfProducts
from fusewright.runtime.executable import Executable


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


def test_other_chips_have_no_such_kernels(built: list[Executable]) -> None:
    call = torch.compile(headline, backend="fusewright", options={"simulate": True, "arch": "sm_80"})
    assert relative(call, 32, 64, 128, torch.bfloat16) < 4e-3
    assert families(built) == ["gemm_simt"]
