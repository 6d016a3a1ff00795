"""Plain graphs run without AOTAutograd's wrappers from their second step on, and behave as with them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusewright.capture import backend, direct

SIMULATE = {"simulate": True}


pytestmark = pytest.mark.usefixtures("nothing_compiled")


@pytest.fixture
def wrapped_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each call that went through the wrappers."""
    calls: list[int] = []
    around = direct.Direct.around

    def counted(self: direct.Direct, wrapped: Callable[..., Any], *rest: Any) -> Any:
        def call(*arguments: Any) -> Any:
            calls.append(1)
            return wrapped(*arguments)

        return around(self, call, *rest)

    monkeypatch.setattr(backend.Direct, "around", counted)
    return calls


class Two(nn.Module):
    """Two results with gradients and one that has none."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(9, 10)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y = F.leaky_relu(self.linear(x) * 2.0, 0.1)
        return y, torch.tanh(x), y > 0


def steps(model: nn.Module, count: int, loss: Callable[..., Tensor], **options: Any) -> list[list[Tensor]]:
    """The gradients of several steps by fusewright, then by eager."""
    run = torch.compile(model, backend="fusewright", options=SIMULATE, **options)
    found = []
    for call in (run, model):
        gradients = []
        for seed in range(count):
            x = torch.randn(5, 9, generator=torch.Generator().manual_seed(seed), requires_grad=True)
            gradients += torch.autograd.grad(loss(*call(x)), [x, *model.parameters()], allow_unused=True)
        found.append(gradients)
    return found


@pytest.mark.parametrize(
    "loss",
    [
        lambda y, z, mask: (y * y).sum() + z.sum(),
        lambda y, z, mask: y.sum(),  # nothing comes back for z; the gradient of y has strides of 0
        lambda y, z, mask: (z * z).sum(),  # nor for y
        lambda y, z, mask: (y.t() @ torch.arange(50.0).view(10, 5).t() @ torch.ones(10)).sum() + z.std(),
    ],
)
def test_gradients_of_every_step(loss: Callable[..., Tensor], wrapped_calls: list[int]) -> None:
    ours, theirs = steps(Two(), 3, loss)
    for a, e in zip(ours, theirs, strict=True):
        if e is None:
            assert a is None or not a.any()
        else:
            torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-4)
    assert len(wrapped_calls) == 1  # whose backward was compiled then


def test_sizes_that_change(wrapped_calls: list[int]) -> None:
    """One compilation; what the forward saves has sizes among it."""
    model = Two()
    run = torch.compile(model, backend="fusewright", options=SIMULATE)
    for batch in (5, 7, 2, 11):
        x = torch.randn(batch, 9)
        torch._dynamo.mark_dynamic(x, 0)
        x.requires_grad_()
        weight = torch.randn(10, batch).t()
        found, expected = (
            torch.autograd.grad((call(x)[0] * weight).sum() + call(x)[1].sum(), [x, *model.parameters()])
            for call in (run, model)
        )
        for a, e in zip(found, expected, strict=True):
            torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-4)
    assert len(wrapped_calls) <= 1  # the first step, if its backward was not compiled before
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_what_follows_knows_which_sizes_change() -> None:
    """A second graph takes them for symbols at once, as it does behind the wrappers."""
    x = torch.randn(5, 9)
    torch._dynamo.mark_dynamic(x, 0)
    found = {}
    for name, options in (("fusewright", SIMULATE), ("aot_eager", None)):
        with torch.no_grad():
            y = torch.compile(Two(), backend=name, options=options)(x)[0]
        found[name] = {k: v for k, v in vars(y).items() if "dynamic" in k}
    assert found["fusewright"] == found["aot_eager"] != {}


def second(model: nn.Module, x: Tensor) -> Any:
    """A compiled model after its first step."""
    run = torch.compile(model, backend="fusewright", options=SIMULATE)
    run(x)[0].sum().backward()
    return run


def test_inference_is_never_wrapped(wrapped_calls: list[int]) -> None:
    model, x = Two(), torch.randn(5, 9)
    with torch.no_grad():
        for a, e in zip(torch.compile(model, backend="fusewright", options=SIMULATE)(x), model(x), strict=True):
            torch.testing.assert_close(a, e)
    assert not wrapped_calls


def test_operators_of_torch_make_no_gradients_of_their_own(wrapped_calls: list[int]) -> None:
    """Gradients are on, and a parameter has some, but no result does."""
    x = torch.randn(5, 9, requires_grad=True)
    y = torch.compile(lambda x: torch.sort(x.detach())[0], backend="fusewright", options=SIMULATE)(x)
    assert not y.requires_grad and torch.equal(y, x.detach().sort()[0]) and not wrapped_calls


def test_the_history_of_what_is_detached_is_left_alone() -> None:
    """As in the step of a discriminator, after which the generator's graph is still needed."""
    run = torch.compile(lambda x, w: torch.relu(x.detach() @ w), backend="fusewright", options=SIMULATE)
    w = torch.randn(9, 4, requires_grad=True)
    for _ in range(2):
        x = torch.randn(5, 9, requires_grad=True)
        made = torch.exp(x)
        run(made, w).sum().backward()
        assert x.grad is None and w.grad is not None
        made.sum().backward()


def test_a_model_may_switch_gradients_on_itself() -> None:
    def model(x: Tensor) -> Tensor:
        with torch.enable_grad():
            return torch.sin(x) * 2

    run = torch.compile(model, backend="fusewright", options=SIMULATE)
    x = torch.randn(5, 9, requires_grad=True)
    for _ in range(2):
        with torch.no_grad():
            y = run(x)
        torch.testing.assert_close(torch.autograd.grad(y.sum(), x)[0], 2 * torch.cos(x))


def test_a_model_that_leaves_gradients_switched_off() -> None:
    def model(x: Tensor) -> Tensor:
        y = torch.sin(x)
        torch.set_grad_enabled(False)
        return y

    run = torch.compile(model, backend="fusewright", options=SIMULATE)
    for _ in range(2):
        try:
            y = run(torch.randn(3, requires_grad=True))
            assert not torch.is_grad_enabled()
        finally:
            torch.set_grad_enabled(True)
        y.sum().backward()


def test_results_are_like_eagers() -> None:
    x = torch.randn(5, 9, requires_grad=True)
    y, z, mask = second(Two(), x)(x)
    assert y.requires_grad and z.requires_grad and not mask.requires_grad
    assert mask.dtype == torch.bool


def test_a_graph_that_is_kept_runs_twice() -> None:
    x = torch.randn(5, 9, requires_grad=True)
    y = second(Two(), x)(x)[0]
    once, twice = (torch.autograd.grad(y.sum(), x, retain_graph=keep)[0] for keep in (True, False))
    torch.testing.assert_close(once, twice, rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(y.sum(), x)


def test_a_second_derivative_is_refused() -> None:
    x = torch.randn(5, 9, requires_grad=True)
    y = second(Two(), x)(x)[0]
    (gradient,) = torch.autograd.grad((y * y).sum(), x, create_graph=True)
    assert gradient.requires_grad
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        gradient.sum().backward()


def test_what_is_saved_must_not_be_overwritten() -> None:
    x = torch.randn(5, 9, requires_grad=True)
    model = Two()
    y = second(model, x)(x)[0]
    with torch.no_grad():
        model.linear.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_hooks_see_what_is_saved() -> None:
    x = torch.randn(5, 9, requires_grad=True)
    model = Two()
    run = second(model, x)
    packed: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        packed.append(tensor)
        return tensor.clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = run(x)[0]
    (found,) = torch.autograd.grad(y.sum(), x)
    assert packed
    torch.testing.assert_close(found, torch.autograd.grad(model(x)[0].sum(), x)[0])


class Overwrites(nn.Module):
    def forward(self, x: Tensor, seen: Tensor) -> Tensor:
        seen.add_(1)
        return torch.tanh(x) * seen


class Aliases(nn.Module):
    def forward(self, x: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
        return torch.tanh(x) * seen, x.view(-1)


@pytest.mark.parametrize("model", [Overwrites(), Aliases()])
def test_wrappers_stay_where_they_are_needed(model: nn.Module, wrapped_calls: list[int]) -> None:
    run = torch.compile(model, backend="fusewright", options=SIMULATE)
    x = torch.randn(3, 4, requires_grad=True)
    ours, theirs = torch.ones(3, 4), torch.ones(3, 4)
    for _ in range(3):
        found, expected = run(x, ours), model(x, theirs)
        found, expected = (r if isinstance(r, tuple) else (r,) for r in (found, expected))
        for a, e in zip(found, expected, strict=True):
            torch.testing.assert_close(a, e)
            assert a._is_view() == e._is_view()
        found[0].sum().backward()
    torch.testing.assert_close(ours, theirs)
    assert len(wrapped_calls) == 3


def test_under_autocast_the_wrappers_switch_it_off(wrapped_calls: list[int]) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        run = torch.compile(nn.Linear(9, 10), backend="fusewright", options=SIMULATE)
        for _ in range(2):
            y = run(torch.randn(5, 9, requires_grad=True))
            y.sum().backward()
    assert y.dtype == torch.bfloat16 and len(wrapped_calls) == 2
