"""`fusewright.linear` on a GPU: one kernel, right values and gradients, alone and inside torch.compile."""

from __future__ import annotations

import time
from typing import Any

import gpu_support as support
import pytest
import torch
import torch.nn.functional as F
from gpu_support import building, random
from torch import Tensor, nn

import fusewright
from fusewright.capture import epilogues
from fusewright.errors import CannotFuse

pytestmark = pytest.mark.gpu

B, K, N = support.SMALL
TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}


@pytest.fixture(autouse=True)
def no_door_used() -> None:
    epilogues._kept.clear()


def leaves(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """x, weight, bias, residual, scale."""
    shapes = ((B, K), (N, K), (N,), (B, N), (N,))
    return [random(*shape, dtype=dtype).requires_grad_() for shape in shapes]


def epilogue(y: Tensor, residual: Tensor, scale: Tensor) -> Tensor:
    return F.gelu(y) * scale + residual


@pytest.mark.parametrize("dtype", support.DTYPES, ids=str)
def test_values_and_gradients(dtype: torch.dtype) -> None:
    x, weight, bias, residual, scale = inputs = leaves(dtype)
    g = random(B, N, dtype=dtype)
    with building() as built:
        y = fusewright.linear(x, weight, bias, epilogue, (residual, scale))
        found = torch.autograd.grad(y, inputs, g)
    assert len(built[0].plan.regions) == 1
    assert not any(b.plan.fallbacks for b in built)
    exact = [t.detach().double().requires_grad_() for t in inputs]
    expected = epilogue(F.linear(*exact[:3]), *exact[3:])
    for f, e in zip((y, *found), (expected, *torch.autograd.grad(expected, exact, g.double())), strict=True):
        assert support.distance(f, e) <= TOLERANCE[dtype]


def test_numbers_that_change_do_not_break_the_kernel_up() -> None:
    x, weight, *_ = leaves()
    with building() as built, torch.no_grad():
        for factor in (0.5, 1.5, 2.5, -3.0):
            found = fusewright.linear(x, weight, epilogue=lambda y: torch.relu(y * factor))  # noqa: B023
            assert support.distance(found, torch.relu(F.linear(x, weight) * factor)) <= 1e-4
    assert len(built) == 2  # one number, then any


def test_the_second_call_costs_little() -> None:
    x, weight, bias, residual, scale = leaves()

    def call() -> None:
        fusewright.linear(x, weight, bias, epilogue, (residual, scale))

    with torch.no_grad():
        for _ in range(20):
            call()
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(100):
            call()
        spent = (time.perf_counter() - start) / 100
    print(f"fusewright.linear: {spent * 1e6:.0f} µs a call on the host")
    assert spent < 5e-4


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(K, N)
        self.scale = nn.Parameter(torch.randn(N))

    def forward(self, x: Tensor) -> Tensor:
        return fusewright.linear(x, self.inner.weight, self.inner.bias, lambda y: F.silu(y) * self.scale)


@pytest.mark.parametrize("options", [{}, {"cuda_graphs": True}], ids=str)
@pytest.mark.parametrize("backend", ["eager", "inductor", "fusewright"])
def test_inside_torch_compile(backend: str, options: dict[str, Any]) -> None:
    if options and backend != "fusewright":
        pytest.skip("an option of ours")
    layer = Layer().to(support.DEVICE)
    call = torch.compile(layer, backend=backend, fullgraph=True, options=options or None)
    for _ in range(4):
        x, g = random(B, K), random(B, N)
        found = support.gradients(call, layer, x, g)
        expected = F.silu(layer.inner(x)) * layer.scale
        assert support.distance(found["output"], expected) <= 1e-4


def test_with_cuda_graphs_alone() -> None:
    x, weight, bias, residual, scale = leaves()
    for _ in range(6):
        found = fusewright.linear(x, weight, bias, epilogue, (residual, scale), cuda_graphs=True)
        assert support.distance(found, epilogue(F.linear(x, weight, bias), residual, scale)) <= 1e-4
        found.sum().backward()
    assert support.distance(residual.grad, torch.full_like(residual, 6.0)) <= 1e-6


def test_under_autocast() -> None:
    x, weight, bias, *_ = leaves()
    with torch.autocast("cuda", torch.bfloat16):
        found = fusewright.linear(x, weight, bias, torch.relu)
    assert found.dtype == torch.bfloat16
    assert support.distance(found, F.linear(x, weight, bias).relu()) <= 3e-2


def test_an_operator_that_does_not_fit_is_named() -> None:
    x, weight, *_ = leaves()
    with pytest.raises(CannotFuse, match="cumsum"):
        fusewright.linear(x, weight, epilogue=lambda y: y.cumsum(0))
