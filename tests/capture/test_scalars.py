"""Numbers beside tensors of 16 bits: what compares rounds them, as ATen does; what computes does not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

CASES: dict[str, Callable[[Tensor], Tensor]] = {
    "gt": lambda v: v > 0.3,
    "le": lambda v: v <= 0.3,
    "eq": lambda v: v == 0.3,
    "where": lambda v: torch.where(v > 0.3, v, v * 5),
    "hardshrink": lambda v: F.hardshrink(v, 0.3),
    "mul": lambda v: v * 0.3,
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_numbers_at_the_bound(dtype: torch.dtype) -> None:
    def model(v: Tensor) -> list[Tensor]:
        return [function(v) for function in CASES.values()]

    v = torch.tensor([0.3, -0.3, 0.1, 0.5], dtype=dtype)
    found = torch.compile(model, backend="fusewright", options={"simulate": True})(v)
    for name, ours, theirs in zip(CASES, found, model(v), strict=True):
        assert torch.equal(ours, theirs), name


def test_gradients_at_the_bound() -> None:
    def model(v: Tensor) -> Tensor:
        return v.clamp(max=0.3).sum() + F.hardshrink(v, 0.3).sum()

    v = torch.tensor([0.3, -0.3, 0.1, 0.5], dtype=torch.bfloat16, requires_grad=True)
    run = torch.compile(model, backend="fusewright", options={"simulate": True})
    assert torch.equal(*(torch.autograd.grad(call(v), v)[0] for call in (run, model)))
