"""Rules change how values are computed, and nothing that a caller could see."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from graphs import check

EQUAL_TO_SOMETHING_ELSE: dict[str, Callable[[torch.Tensor], Any]] = {
    "the input": lambda x: x * 1,
    "the input twice": lambda x: (x - 0, x / 1),
    "the input, by two signs": lambda x: x.neg().neg(),
    "the input, by a choice": lambda x: torch.where(x > 0, x, x),
    "a view of the input": lambda x: x.t() * 1,
    "a view of what equals the input": lambda x: (x * 1).t().expand(2, 4, 3),
    "two views of what equals the input": lambda x: (y := x * 1, y.t()),
    "another result": lambda x: (y := x.relu(), y * 1),
    "a broadcast": lambda x: x.relu().expand(2, 3, 4) * 1,
    "a broadcast, by a choice": lambda x: torch.where(x > 0, x.relu().expand(2, 3, 4), x.relu()),
}


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("function", EQUAL_TO_SOMETHING_ELSE.values(), ids=EQUAL_TO_SOMETHING_ELSE)
def test_a_result_that_equals_something_else_has_memory_of_its_own(
    function: Callable[[torch.Tensor], Any], grad: bool
) -> None:
    check(function, torch.randn(3, 4, dtype=torch.float64, requires_grad=grad))
