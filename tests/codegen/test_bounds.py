"""What is known of denominators, and which divisions are printed without a branch."""

from __future__ import annotations

import re
import time
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from fusewright.chip import CHIPS
from fusewright.codegen.bounds import UNKNOWN, lower_bounds
from fusewright.fusion.expression import Accumulator, Apply, Constant, Expression
from fusewright.kernels.pointwise import Pointwise
from graphs import planned

X = Accumulator(torch.float32)


def number(value: float) -> Constant:
    return Constant(value, torch.float32)


def apply(op: str, *operands: Expression, dtype: torch.dtype = torch.float32) -> Apply:
    return Apply(op, operands, dtype)


EXP = apply("exp", X)
FROM_ONE = apply("add", number(1), EXP)
LESS = apply("lt", X, number(0), dtype=torch.bool)


@pytest.mark.parametrize(
    "expression, bound",
    [
        (X, UNKNOWN),
        (number(0.5), 0),
        (number(1), 1),
        (number(-1), UNKNOWN),
        (number(torch.nan), UNKNOWN),
        (EXP, 0),
        (FROM_ONE, 1),
        (apply("abs", X), 0),
        (apply("sqrt", X), 0),
        (apply("sqrt", FROM_ONE), 1),
        (apply("add", number(1), X), UNKNOWN),
        (apply("sub", FROM_ONE, number(1)), UNKNOWN),
        (apply("mul", X, X), 0),
        (apply("mul", X, EXP), UNKNOWN),
        (apply("mul", FROM_ONE, EXP), 0),
        (apply("mul", FROM_ONE, FROM_ONE), 1),
        (apply("div", EXP, FROM_ONE), 0),
        (apply("div", FROM_ONE, EXP), UNKNOWN),  # EXP may be -0 as far as is known
        (apply("minimum", FROM_ONE, EXP), 0),
        (apply("maximum", X, FROM_ONE), 1),
        (apply("fmax", X, FROM_ONE), UNKNOWN),  # of NaN and X it gives X
        (apply("where", LESS, FROM_ONE, number(2)), 1),
        (apply("where", LESS, FROM_ONE, X), UNKNOWN),
        (apply("cast", apply("cast", FROM_ONE, dtype=torch.bfloat16)), 1),
        (apply("cast", apply("cast", FROM_ONE, dtype=torch.int32)), UNKNOWN),  # NaN becomes some integer
    ],
    ids=str,
)
def test_bounds(expression: Expression, bound: float) -> None:
    assert lower_bounds([expression])[expression] == bound


def test_shared_operands_are_looked_at_once() -> None:
    expression: Expression = FROM_ONE
    for _ in range(2000):
        expression = apply("mul", expression, expression)
    begin = time.perf_counter()
    assert lower_bounds([expression])[expression] == 1
    assert time.perf_counter() - begin < 5


def printed(function: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> str:
    call, record = planned(function)
    call(*inputs)
    (region,) = record.plans[0].regions
    return Pointwise().programs(region, CHIPS["sm_90a"])[0].launches[0].source


@pytest.mark.parametrize(
    "function, reciprocals, quotients",
    [
        (torch.sigmoid, 1, 0),
        (F.glu, 1, 0),
        (F.silu, 0, 1),
        (F.mish, 0, 1),
        (lambda x: torch.ops.aten.silu_backward(x, x * 2), 1, 0),
        (lambda x: torch.ops.aten.mish_backward(x, x * 2), 0, 2),
        (lambda x: torch.ops.aten.softplus_backward(x, x * 2, 1, 20), 0, 1),
        (lambda x: x / (1 + x * x), 0, 1),
    ],
    ids=["sigmoid", "glu", "silu", "mish", "silu_backward", "mish_backward", "softplus_backward", "square"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_no_division_is_left(
    function: Callable[..., torch.Tensor], reciprocals: int, quotients: int, dtype: torch.dtype
) -> None:
    text = printed(function, torch.randn(8, 8, dtype=dtype))
    namespace = r"fusewright::(?:from_one|narrow)::"
    assert len(re.findall(namespace + r"reciprocal\(", text)) == reciprocals
    assert len(re.findall(namespace + r"quotient\(", text)) == quotients
    assert " / " not in text[text.index("struct Epilogue") : text.index("using ")]


@pytest.mark.parametrize("function", [lambda x: x / (1 + x), lambda x: 1 / torch.exp(x), lambda x: 1 / (x * x)])
def test_other_divisions_stay(function: Callable[..., torch.Tensor]) -> None:
    text = printed(function, torch.randn(8, 8))
    assert " / " in text and "from_one" not in text


def test_narrow_functions_are_for_results_of_sixteen_bits() -> None:
    """The result's dtype decides, for autocast's and for every other call; an exponential alone keeps its own."""
    half, single = torch.randn(8, 8, dtype=torch.float16), torch.randn(8, 8)
    assert "narrow::" in printed(F.silu, half) and "narrow::" in printed(lambda x: F.gelu(x.half()), single)
    for function, x in ((F.silu, single), (torch.exp, half), (lambda x: F.silu(x.float()), half)):
        assert "narrow::" not in printed(function, x)


def test_float64_divides_as_ever() -> None:
    text = printed(torch.sigmoid, torch.randn(8, 8, dtype=torch.float64))
    assert "1.0 / " in text and "from_one" not in text
