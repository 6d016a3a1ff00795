"""Whatever a compiled graph is called with, its kernels read what it says."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.testing._internal.two_tensor import TwoTensor

from fusewright.errors import UnexpectedTensor

STEPS = 2  # the second runs without AOTAutograd's wrappers


pytestmark = pytest.mark.usefixtures("nothing_compiled")


def compiled(function: Any, dynamic: bool | None = None) -> Any:
    return torch.compile(function, backend="fusewright", options={"simulate": True}, dynamic=dynamic)


def product(x: Tensor, w: Tensor) -> Tensor:
    return torch.tanh(x @ w) * 2


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("hooks", ["contiguous", "doubled strides"])
def test_what_was_saved_comes_back_in_another_layout(hooks: str, dynamic: bool) -> None:
    """As torch.autograd.graph.save_on_cpu(pin_memory=True) does."""

    def unpack(t: Tensor) -> Tensor:
        return t.contiguous() if hooks == "contiguous" else torch.stack((t, t), -1)[..., 0]

    run, w = compiled(product, dynamic), torch.randn(8, 6, requires_grad=True)
    for _ in range(STEPS):
        x = torch.randn(8, 4, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), unpack):
            y = run(x.t(), w)
        found = torch.autograd.grad(y.sum(), (x, w))
        expected = torch.autograd.grad(product(x.t(), w).sum(), (x, w))
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(
    "pack", [Tensor.double, lambda t: t[:2], lambda t: torch.stack((t, t)), lambda t: t.to("meta")],
    ids=["dtype", "shape", "dimensions", "device"],
)  # fmt: skip
def test_what_was_saved_comes_back_as_something_else(pack: Any, dynamic: bool) -> None:
    run, w = compiled(product, dynamic), torch.randn(8, 6, requires_grad=True)
    for _ in range(STEPS):
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            y = run(torch.randn(4, 8), w)
        with pytest.raises(UnexpectedTensor, match="a hook on saved tensors, or on a gradient, must keep"):
            y.sum().backward()


@pytest.mark.parametrize(
    "gradient",
    [torch._neg_view(torch.ones(4, 6)), torch._efficientzerotensor((4, 6)), torch.ones(6, 4).t(), torch.ones(1, 6)],
    ids=["negated", "zeros without memory", "transposed", "expanded"],
)
def test_gradients_of_every_kind(gradient: Tensor) -> None:
    run, w = compiled(product), torch.randn(8, 6, requires_grad=True)
    for _ in range(STEPS):
        x = torch.randn(4, 8)
        found, expected = (torch.autograd.grad(f(x, w), w, gradient.expand(4, 6)) for f in (run, product))
        torch.testing.assert_close(found, expected)


def test_gradients_of_another_class_are_refused() -> None:
    run, w = compiled(product), torch.randn(8, 6, requires_grad=True)
    run(torch.randn(4, 8), w).sum().backward()  # the wrappers have an error of their own
    for _ in range(STEPS):
        y = run(torch.randn(4, 8), w)
        with pytest.raises(UnexpectedTensor, match="TwoTensor"):
            (y * TwoTensor(torch.ones(4, 6), torch.ones(4, 6))).sum().backward()


@pytest.mark.parametrize("model", [torch.sin, lambda x: (torch.sin(x), x.view(-1))], ids=["plain", "wrapped"])
def test_forward_mode_is_refused(model: Any) -> None:
    run = compiled(model)
    run(torch.randn(4))
    with forward_ad.dual_level(), pytest.raises(UnexpectedTensor, match="reverse mode only"):
        run(forward_ad.make_dual(torch.randn(4), torch.ones(4)))


def test_an_input_that_is_lazily_negated() -> None:
    x = torch.complex(torch.randn(5), torch.randn(5)).conj().imag
    assert x.is_neg()
    run = compiled(lambda x: x * 2)
    for _ in range(STEPS):
        torch.testing.assert_close(run(x), x * 2)


def test_operators_of_torch_keep_nothing_alive() -> None:
    run = compiled(lambda x: F.layer_norm(x, (8,)))
    gc.collect()
    gc.disable()
    try:
        for _ in range(STEPS):
            x = torch.randn(4, 8)
            seen = weakref.ref(x)
            with torch.no_grad():
                run(x)
            del x
            assert seen() is None
    finally:
        gc.enable()


def test_operators_with_effects() -> None:
    """torch orders them by a token, for which it passes nothing."""
    run = compiled(lambda x: torch.linalg.inv(x) * 2)
    x = torch.eye(3) * 2 + torch.rand(3, 3)
    for _ in range(STEPS):
        y = x.clone().requires_grad_()
        torch.testing.assert_close(run(y), torch.linalg.inv(x) * 2)
        (found,) = torch.autograd.grad(run(y).sum(), y)
        torch.testing.assert_close(
            found, torch.autograd.grad(torch.linalg.inv(y).sum() * 2, y)[0], rtol=1e-4, atol=1e-4
        )


class Statistics(torch.autograd.Function):
    """Notes the largest gradient in a buffer."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, largest: Tensor) -> Tensor:
        ctx.largest = largest
        return torch.sin(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        ctx.largest.copy_(gradient.abs().amax().reshape(1))
        return gradient, None


def test_a_backward_that_overwrites_something_is_refused() -> None:
    def model(x: Tensor, largest: Tensor) -> Tensor:
        return Statistics.apply(x, largest) * 2

    with pytest.raises(Exception, match=r"overwrites one of the model's tensors.*torch\._dynamo\.disable"):
        compiled(model)(torch.randn(3, requires_grad=True), torch.zeros(1))
