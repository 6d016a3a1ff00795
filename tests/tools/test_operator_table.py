"""docs/operators.md says what the operator table is today, and what it promises is at least what it promised."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fusewright.ir.ops import ROWS
from fusewright.tools import operator_table
from fusewright.tools.operator_table import ATEN, REASONS, gradients, operators, page

PAGE = Path(__file__).resolve().parents[2] / "docs" / "operators.md"


def test_page_is_current() -> None:
    written = PAGE.read_text()
    if f"with torch {operator_table._version()};" not in written:
        pytest.skip(f"written with another torch than {torch.__version__}, whose operators differ")
    assert written == page(), "write it again with `python -m fusewright.tools.operator_table docs/operators.md`"


def test_at_least_ninety_of_what_inductor_leaves_are_fused() -> None:
    left = [o for o in operators() if o.left]
    assert sum(o.status != ATEN for o in left) >= 90


def test_nothing_has_a_reason_and_a_formula() -> None:
    assert not REASONS.keys() & ROWS.keys()
    assert {o.name for o in operators() if o.status == ATEN} == REASONS.keys()


def test_every_gradient_is_that_of_an_operator() -> None:
    for name in gradients():
        assert hasattr(torch.ops.aten, name.removesuffix("_backward"))
