"""Pointwise operators on the simulator, several in a kernel, held to float64 eager, values and gradients.

The whole database, in every dtype, is for the GPU (tests/gpu/test_ops_gpu.py); here each dtype takes a part of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_flatten

import operator_samples as samples
from fusewright import compiler
from fusewright.fusion.plan import Fallback, FusionPlan

# dtype → every how many-th operator, from which on
PARTS = {
    torch.float32: (5, 0),
    torch.float64: (12, 1),
    torch.bfloat16: (12, 2),
    torch.float16: (12, 5),
    torch.int32: (3, 1),
    torch.uint8: (6, 2),
    torch.bool: (6, 3),
}
LENGTH, OPERATORS_A_KERNEL = 28, 16


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[FusionPlan]]:
    """The plans of what is compiled."""
    original, made = compiler.plan, []

    def plan(*args: object, **kwargs: object) -> FusionPlan:
        made.append(original(*args, **kwargs))  # type: ignore[arg-type]
        return made[-1]

    monkeypatch.setattr(compiler, "plan", plan)
    yield made


def call(name: str, function: Callable[..., torch.Tensor], *tensors: torch.Tensor) -> samples.Call:
    leaves, structure = tree_flatten((tensors, {}))
    return samples.Call(name, function, leaves, structure, tensors[0].dtype)


@pytest.mark.parametrize("dtype", PARTS, ids=str)
def test_operators_are_as_accurate_as_eager(dtype: torch.dtype, plans: list[FusionPlan]) -> None:
    step, first = PARTS[dtype]
    names = [n for n in samples.database() if n not in samples.ATEN]
    several = samples.vectors(names[first::step], dtype, LENGTH, OPERATORS_A_KERNEL)
    assert len(several) >= 8
    eager, exact = samples.evaluate(samples.together(several), several), samples.oracle(several)
    found = samples.evaluate(samples.compiled(several, simulate=True), several)
    problems = samples.problems(several, found, eager, exact)
    assert not problems, "\n".join(problems)
    left = {o.name for plan in plans for f in plan.steps if isinstance(f, Fallback) for o in f.origins}
    assert left <= samples.NOT_POINTWISE


def test_float64_keeps_its_precision_beside_float32() -> None:
    """In one kernel's sums, which are the gradients of what was broadcast."""
    dtypes = (torch.float32, torch.float64)
    rows = [(torch.randn(28, 6, dtype=d), torch.randn(6, dtype=d).requires_grad_()) for d in dtypes]
    several = [call("mul", torch.mul, *r) for r in rows]
    eager, exact = samples.evaluate(samples.together(several), several), samples.oracle(several)
    found = samples.evaluate(samples.compiled(several, simulate=True), several)
    assert samples.problems(several, found, eager, exact) == []


def test_log_ndtr_cancels_with_its_gradients_square() -> None:
    """To within one rounding of x²/2, held to the exact gradient alone."""
    x = torch.tensor([-104.0, -60.5, -31.5, -9.0, -1.5, 0.5], dtype=torch.float64, requires_grad=True)
    several = [call("special.log_ndtr", torch.special.log_ndtr, x)]
    exact = samples.oracle(several)
    found = samples.evaluate(samples.compiled(several, simulate=True), several)
    assert samples.problems(several, found, exact, exact) == []


def test_integers_are_their_own_roundings() -> None:
    """Not by way of floating point, which does not hold them all."""
    several = [
        call(f.__name__, f, x)
        for x in (torch.tensor([2**53 + 1, -(2**62) - 1, 0]), torch.tensor([255, 7, 0], dtype=torch.uint8))
        for f in (torch.floor, torch.ceil, torch.trunc, torch.round)
    ]
    found = samples.compiled(several, simulate=True)(*(c.tensors[0] for c in several))
    for each, result in zip(several, found, strict=True):
        assert torch.equal(result, each.tensors[0]), each.name


def test_float32_accuracy_is_no_measure_for_float64() -> None:
    """Of eager, whose constants have float32's precision in some kernels."""
    several = samples.vectors(["nn.functional.hardsigmoid"], torch.float64, LENGTH, 1)
    eager, exact = samples.evaluate(samples.together(several), several), samples.oracle(several)
    rounded = samples.Results([v.float().double() for v in eager.values], eager.gradients)
    assert "largest error" in str(samples.problems(several, rounded, rounded, exact))


def test_the_gate_sees_what_it_should() -> None:
    """A wrong bit, an ulp too many, a NaN that is lost, another stride."""
    several = [c for name in ("add", "exp") for c in samples.vectors([name], torch.float32, LENGTH, 1)]
    eager, exact = samples.evaluate(samples.together(several), several), samples.oracle(several)
    assert samples.problems(several, eager, eager, exact) == []
    for index, change in ((0, _one_ulp), (1, _four_ulps), (0, torch.nan_to_num), (1, torch.nan_to_num), (0, _strided)):
        values = list(eager.values)
        values[index] = change(values[index])
        assert samples.problems(several, samples.Results(values, eager.gradients), eager, exact) != [], change
    gradients = [None, *eager.gradients[1:]]
    assert samples.problems(several, samples.Results(eager.values, gradients), eager, exact) != []


def _one_ulp(t: torch.Tensor) -> torch.Tensor:
    return torch.nextafter(t, torch.full_like(t, torch.inf))


def _four_ulps(t: torch.Tensor) -> torch.Tensor:
    return _one_ulp(_one_ulp(_one_ulp(_one_ulp(t))))


def _strided(t: torch.Tensor) -> torch.Tensor:
    return t.repeat_interleave(2)[::2]


@pytest.mark.parametrize(
    "function",
    [F.mish, F.silu, F.gelu, partial(F.gelu, approximate="tanh")],
    ids=["mish", "silu", "gelu", "gelu_tanh"],
)
def test_activations_are_as_accurate_as_eager_where_they_saturate(
    function: Callable[..., torch.Tensor], nothing_compiled: None
) -> None:
    """Where the result is nearly x, and the slope nearly 1, an error that eager does not make is far above its own."""
    compiled = torch.compile(lambda x: function(x), backend="fusewright", options={"simulate": True})
    for low, high in ((-4, 4), (0, 20), (10, 30)):
        x = torch.linspace(low, high, 4001)

        def error(call: Callable[..., torch.Tensor], x: torch.Tensor = x) -> list[torch.Tensor]:
            exact, found = (_value_and_slope(f, t) for f, t in ((function, x.double()), (call, x)))
            return [(f - e).norm() / e.norm() for f, e in zip(found, exact, strict=True)]

        for ours, theirs in zip(error(compiled), error(function), strict=True):
            assert ours <= 1.25 * theirs + 1e-12, (low, high)


def _value_and_slope(function: Callable[..., torch.Tensor], x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    x = x.clone().requires_grad_()
    y = function(x)
    return y.detach().double(), torch.autograd.grad(y.sum(), x)[0].double()
