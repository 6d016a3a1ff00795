"""Random pointwise graphs after a Linear: one kernel forward, and no ATen compute forward or backward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import gpu_support as support
import pytest
import torch
import torch.nn.functional as F
from gpu_support import AtenSeen, building, compiled, random
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

pytestmark = pytest.mark.gpu

B, K, N = 48, 40, 72

Tensors = list[Tensor]

# Bounded, or growing no faster than their operands, so that rounding stays comparable.
UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "leaky_relu": lambda t: F.leaky_relu(t, 0.1),
    "leaky_relu, negative slope": lambda t: F.leaky_relu(t, -0.3),
    "gelu": F.gelu,
    "gelu, tanh": lambda t: F.gelu(t, approximate="tanh"),
    "silu": F.silu,
    "mish": F.mish,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "clamp": lambda t: t.clamp(-0.7, 0.9),
    "hardswish": F.hardswish,
    "hardtanh": F.hardtanh,
    "elu": F.elu,
    "softplus": F.softplus,
    "hardsigmoid": F.hardsigmoid,
    "softshrink": F.softshrink,
    "exp": lambda t: torch.exp(-t.abs()),
    "log": lambda t: torch.log(1 + t.abs()),
    "sqrt": lambda t: torch.sqrt(1 + t.abs()),
    "sin": torch.sin,
    "neg": torch.neg,
    "scale": lambda t: t * -1.5 + 0.25,
    "reciprocal": lambda t: 1 / (2 + t.abs()),
    "logsigmoid": F.logsigmoid,
}
BINARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": lambda a, b: a * torch.tanh(b),
    "div": lambda a, b: a / (1 + b.abs()),
    "maximum": torch.maximum,
    "minimum": torch.minimum,
    "where": lambda a, b: torch.where(a > b, a, 0.5 * b),
    "lerp": lambda a, b: torch.lerp(a, b, 0.3),
}


@dataclass(frozen=True)
class Step:
    """One operator, applied to earlier values; places count back from the newest."""

    operator: str
    first: int
    second: int


STEPS = st.lists(
    st.builds(
        Step,
        st.sampled_from([*UNARY, *BINARY]),
        st.integers(0, 3),
        st.integers(0, 6),
    ),
    min_size=1,
    max_size=7,
)


class Dag(nn.Module):
    """A Linear, then the steps, each over an earlier value and another one, a row or column vector or a whole tile."""

    def __init__(self, steps: list[Step], outputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(K, N)
        self.row = nn.Parameter(torch.randn(N))
        self.steps, self.outputs = steps, outputs

    def forward(self, x: Tensor, column: Tensor, tile: Tensor) -> tuple[Tensor, ...]:
        y = self.linear(x)
        values = [y - tile, y + column, y * self.row, y]
        for step in self.steps:
            operands = [tile, self.row, column, *values]
            first, second = values[-1 - step.first], operands[-1 - step.second % len(operands)]
            operator = UNARY.get(step.operator)
            values.append(operator(first) if operator else BINARY[step.operator](first, second))
        return tuple(y + v for v in values[-self.outputs :])


def _run(
    call: Callable[..., tuple[Tensor, ...]], model: Dag, inputs: list[Tensor], grads: list[Tensor]
) -> list[Tensor]:
    model.zero_grad()
    for tensor in inputs:
        tensor.grad = None
    results = call(*inputs)
    torch.autograd.backward(results, grads)
    return [*results, *(t.grad for t in [*inputs, *model.parameters()] if t.grad is not None)]


def _off(found: Tensors, exact: Tensors) -> float:
    """The largest relative error of a tensor, in the Frobenius norm."""
    pairs = zip(found, exact, strict=True)
    return max(float((a.detach().double() - b.detach()).norm() / b.detach().norm().clamp(min=1e-30)) for a, b in pairs)


@settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.explicit, Phase.generate],  # each example compiles: to shrink one would take minutes
)
@given(steps=STEPS, outputs=st.integers(1, 2), seed=st.integers(0, 1000))
def test_any_pointwise_graph_after_a_linear_is_one_kernel(steps: list[Step], outputs: int, seed: int) -> None:
    torch._dynamo.reset()
    torch.manual_seed(seed)
    model = Dag(steps, outputs).to(support.DEVICE)
    # The column vector is data: its gradient would be a sum along rows, which is no pointwise kernel's business.
    inputs = [random(B, K).requires_grad_(), random(B, 1), random(B, N).requires_grad_()]
    grads = [random(B, N) for _ in range(min(outputs, 4 + len(steps)))]
    call = compiled(model, library=False, dynamic=False)
    with building() as built:
        found = _run(call, model, inputs, grads)
    forward, backward = built
    assert len(forward.plan.regions) == 1
    assert not forward.plan.fallbacks and not backward.plan.fallbacks
    with AtenSeen() as seen:
        again = _run(call, model, inputs, grads)
    assert seen.compute == [], steps
    assert seen.every  # it sees something
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))

    eager = _run(model, model, inputs, grads)
    exact_model = Dag(steps, outputs).to(support.DEVICE).double()
    exact_model.load_state_dict(model.state_dict())
    exact_inputs = [t.detach().double().requires_grad_(t.requires_grad) for t in inputs]
    exact = _run(exact_model, exact_model, exact_inputs, [g.double() for g in grads])
    assert _off(found, exact) <= max(2e-5, 4 * _off(eager, exact)), steps
