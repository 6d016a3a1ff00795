"""Pointwise operators on the simulator, several in a kernel, held to float64 eager, values and gradients.

The whole database, in every dtype, is for the GPU (tests/gpu/test_ops_gpu.py); here each dtype takes a part of it.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

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


@pytest.mark.parametrize("dtype", PARTS, ids=str)
def test_operators_are_as_accurate_as_eager(dtype: torch.dtype, plans: list[FusionPlan]) -> None:
    step, first = PARTS[dtype]
    names = [n for n in samples.database() if n not in samples.ATEN]
    several = samples.vectors(names[first::step], dtype, LENGTH, OPERATORS_A_KERNEL)
    assert len(several) >= 8
    eager, exact = samples.evaluate(samples.together(several), several), samples.oracle(several)
    found = samples.evaluate(samples.compiled(several, simulate=True), several)
    assert samples.problems(several, found, eager, exact) == []
    left = {o.name for plan in plans for f in plan.steps if isinstance(f, Fallback) for o in f.origins}
    assert left <= samples.NOT_POINTWISE


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
