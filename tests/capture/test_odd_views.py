"""Views that no kernel can follow, of something and of nothing, and sizes that only the backward uses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

VIEWS: dict[str, tuple[Callable[..., Tensor], list[tuple[int, ...]]]] = {
    "of an input": (lambda x: x[:14].reshape(6, 7)[::2].flatten() * 2, [(15, 3)]),
    "of a result": (lambda x: (x * 2)[:14].reshape(6, 7)[::2].flatten(), [(15, 3)]),
    "of a product": (lambda x, w: F.linear(x, w)[:14].reshape(6, 7)[::2].flatten(), [(15, 8), (3, 8)]),
    "masked, of nothing": (lambda x, w: F.relu(F.linear(x, w)), [(0, 4, 8), (24, 8)]),
    "turned, of nothing": (lambda x, w: x.transpose(1, 2) @ w, [(0, 3, 4), (3, 5)]),
    "sliced, of nothing": (lambda x, w: F.linear(x, w)[:, :4].flatten(0, 1), [(0, 3), (8, 3)]),
}


def compiled(function: Any) -> Any:
    torch._dynamo.reset()
    return torch.compile(function, backend="fusewright", options={"simulate": True})


@pytest.mark.parametrize("name", VIEWS)
def test_planning_ends(name: str) -> None:
    function, shapes = VIEWS[name]
    inputs = [torch.randn(s, requires_grad=True) for s in shapes]
    found, expected = compiled(function)(*inputs), function(*inputs)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert found.stride() == expected.stride()
    ours, theirs = (torch.autograd.grad(y.sum(), inputs) for y in (found, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


W = torch.randn(4, 8)


@pytest.mark.parametrize(
    "function",
    [lambda x: x.sum([0, 1]), lambda x: (x * 2).sum(), lambda x: x.sum(0), lambda x: F.linear(x, W).mean(0)],
    ids=["all", "scaled", "rows", "frozen"],
)
def test_a_size_that_nothing_saved_has(function: Any) -> None:
    run = compiled(function)
    for batch in (7, 5):
        x = torch.randn(batch, 8, requires_grad=True)
        torch._dynamo.mark_dynamic(x, 0)
        ours, theirs = (torch.autograd.grad(call(x).sum(), x)[0] for call in (run, function))
        torch.testing.assert_close(ours, theirs)


def test_what_the_backward_computes_again_knows_its_sizes() -> None:
    """The rows of a strided operand, which are laid out anew for both products."""

    def model(x: Tensor, w: Tensor) -> Tensor:
        return F.linear(x, w)

    run, w = compiled(model), torch.randn(6, 5, requires_grad=True)
    for batch in (7, 3):
        x = torch.randn(batch, 4, 10)[..., ::2]
        torch._dynamo.mark_dynamic(x, 0)
        ours, theirs = (torch.autograd.grad(call(x, w).sum(), w)[0] for call in (run, model))
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("requires_grad", [False, True])
def test_halves_whose_sizes_torch_alone_knows_to_be_equal(requires_grad: bool) -> None:
    """n - (n + 1) // 2 is (n + 1) // 2 by a guard: such an operator runs as ATen."""

    def gated(x: Tensor) -> Tensor:
        gate, y = x.chunk(2, -1)
        return F.silu(gate) * y

    torch._dynamo.reset()
    x = torch.randn(4, 6, requires_grad=requires_grad)
    run = torch.compile(gated, backend="fusewright", options={"simulate": True}, dynamic=True)
    y, expected = run(x), gated(x)
    torch.testing.assert_close(y, expected)
    if requires_grad:
        found, wanted = (torch.autograd.grad(r.square().sum(), x) for r in (y, expected))
        torch.testing.assert_close(found, wanted)


def test_a_product_whose_sizes_torch_alone_knows_to_be_equal() -> None:
    """3 - (3 + 1) // 2 is 1 by a guard: the product runs as ATen."""

    def model(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return F.linear(x.chunk(2, -1)[1], w, b)

    torch._dynamo.reset()
    run = torch.compile(model, backend="fusewright", options={"simulate": True}, dynamic=True)
    x, w, b = torch.randn(4, 3), torch.randn(1, 1, requires_grad=True), torch.randn(1)
    ours, theirs = (torch.autograd.grad(call(x, w, b).sum(), w)[0] for call in (run, model))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("requires_grad", [False, True])
def test_a_view_that_torch_alone_can_take_is_one_of_the_argument(requires_grad: bool) -> None:
    """AOTAutograd takes it again, of the argument, by the strides of what the graph returns."""

    def pairs(x: Tensor) -> Tensor:
        return x.reshape(x.shape[0], -1, 2).transpose(1, 2)

    torch._dynamo.reset()
    run = torch.compile(pairs, backend="fusewright", options={"simulate": True}, dynamic=True)
    for rows in (19, 5):
        x = torch.randn(rows, 24)[:, ::2].requires_grad_(requires_grad)
        assert torch.equal(run(x), pairs(x)) and run(x).stride() == pairs(x).stride()
