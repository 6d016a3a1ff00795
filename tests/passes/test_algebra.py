"""Each rewrite rule fires where it should, and what it leaves is the same to the bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fusewright.ir import reference, rules
from fusewright.ir.graph import Builder, Graph, Node, TensorType, contiguous
from fusewright.ir.ops import ROWS
from fusewright.ir.value import Value, where
from fusewright.passes import pipeline
from fusewright.passes.algebra import ALGEBRA, VIEW_RULES
from fusewright.passes.rewrite import RuleSet, rewrite

CPU = torch.device("cpu")
SPECIAL = torch.tensor([0.0, -0.0, float("nan"), float("inf"), -float("inf"), 1.5, -2.5, 1e-310, 5e-324, 1e308])
SPECIAL = torch.cat([SPECIAL.double(), torch.tensor([1e-310, -5e-324], dtype=torch.float64)])


def source(builder: Builder, dtype: torch.dtype = torch.float64, shape: tuple[int, ...] = (12,)) -> Value:
    return Value(builder, builder.node("input", (), contiguous(shape, dtype, CPU), index=0))


def rewritten(
    make: Callable[[Value], Value], rule_set: RuleSet, dtype: torch.dtype = torch.float64
) -> tuple[Graph, Graph]:
    x = source(Builder(), dtype)
    before = Graph((x.node,), (make(x).node,))
    after = rewrite(before, rule_set)
    rules.check(after)
    return before, after


def operations(graph: Graph) -> list[str]:
    return [n.op for n in graph.nodes() if n.op not in ("input", "constant")]


def assert_same_bits(before: Graph, after: Graph, x: torch.Tensor) -> None:
    (a,), (b,) = reference.run(before, [x]), reference.run(after, [x])
    assert (a.dtype, a.shape) == (b.dtype, b.shape)
    if a.is_floating_point():
        assert torch.equal(a.isnan(), b.isnan())
        a, b = a.nan_to_num(nan=0.0), b.nan_to_num(nan=0.0)
        assert torch.equal(a.signbit(), b.signbit())
    assert torch.equal(a, b)


VANISH: dict[str, Callable[[Value], Value]] = {
    "x * 1": lambda x: x * 1,
    "1 * x": lambda x: 1 * x,
    "x * 1.0": lambda x: x * 1.0,
    "x / 1": lambda x: x / 1,
    "x / 1, narrow": lambda x: x.apply("div_narrow", x, 1),
    "x - 0": lambda x: x - 0,
    "-(-x)": lambda x: x.apply("neg", -x),
    "where(c, x, x)": lambda x: where(x > 0, x, x),
}
STAY: dict[str, Callable[[Value], Value]] = {
    "x + 0": lambda x: x + 0,  # -0 + 0 is 0
    "x * 0": lambda x: x * 0,  # NaN, infinities, -0
    "x - -0": lambda x: x - -0.0,  # -0 - -0 is 0
    "0 - x": lambda x: 0 - x,  # 0 - 0 is 0, not -0
    "x - x": lambda x: x - x,
    "x / x": lambda x: x / x,
    "x * 2 / 2": lambda x: x * 2 / 2,
    "(x + 1) - 1": lambda x: (x + 1) - 1,
    "where(c, x, -x)": lambda x: where(x > 0, x, -x),
}


@pytest.mark.parametrize("name", VANISH)
def test_vanishes(name: str) -> None:
    before, after = rewritten(VANISH[name], ALGEBRA)
    assert operations(after) == ["copy"]  # a result has memory of its own
    assert_same_bits(before, after, SPECIAL)


@pytest.mark.parametrize("name", STAY)
def test_is_kept_or_is_exact(name: str) -> None:
    before, after = rewritten(STAY[name], ALGEBRA)
    assert operations(after) == operations(before)
    assert_same_bits(before, after, SPECIAL)


def test_not_not() -> None:
    before, after = rewritten(lambda x: ~(~(x > 0)), ALGEBRA)
    assert operations(after) == ["gt"]
    assert_same_bits(before, after, SPECIAL)


def test_constants_fold_to_what_the_primitive_gives() -> None:
    def make(x: Value) -> Value:
        builder = x.builder
        number = Value(builder, builder.constant(0.1, torch.float32, CPU))
        return x + number.apply("exp", number.apply("mul", number, 3.0))

    before, after = rewritten(make, ALGEBRA, torch.float32)
    assert operations(after) == ["add"]
    assert_same_bits(before, after, torch.linspace(-1, 1, 12))


def test_views_merge() -> None:
    builder = Builder()
    x = source(builder, shape=(2, 3, 2)).node
    once = builder.reshape(builder.reshape(x, (6, 2)), (3, 4))
    twice = builder.permute(builder.permute(builder.permute(once, (1, 0)), (1, 0)), (1, 0))
    graph = Graph((x,), (twice,))
    after = rewrite(graph, VIEW_RULES)
    assert operations(after) == ["reshape", "permute"]
    back = Graph((x,), (builder.reshape(builder.reshape(x, (12,)), (2, 3, 2)),))
    assert operations(rewrite(back, VIEW_RULES)) == []
    value = torch.randn(2, 3, 2, dtype=torch.float64)
    assert_same_bits(graph, after, value)


@pytest.mark.parametrize(
    ("before", "after", "dims", "moves"),
    [((2, 3, 4), (6, 4), (0,), True), ((6, 4), (2, 3, 4), (0, 1), True), ((6, 4), (2, 3, 4), (0,), False)],
)
def test_sums_move_before_reshapes_where_they_can(before: Any, after: Any, dims: Any, moves: bool) -> None:
    builder = Builder()
    x = source(builder, shape=before).node
    reshaped = builder.reshape(x, after)
    kept = [n for i, n in enumerate(after) if i not in dims]
    total = builder.node("sum", (reshaped,), contiguous(kept, torch.float64, CPU), dims=dims)
    graph = Graph((x,), (total,))
    result = rewrite(graph, VIEW_RULES)
    rules.check(result)
    sum_node = next(n for n in result.nodes() if n.op == "sum")
    assert (sum_node.inputs[0].op == "input") == moves
    value = torch.arange(24.0, dtype=torch.float64).reshape(before)
    assert torch.equal(*(reference.run(g, [value])[0] for g in (graph, result)))


def test_the_sum_of_a_16_bit_model_is_stored_rounded() -> None:
    """sum → reshape → cast becomes sum → cast → reshape, so that the sum's kernel stores the 16-bit result."""
    builder = Builder()
    x = source(builder, torch.float32, (4, 3)).node
    total = builder.node("sum", (x,), contiguous((3,), torch.float32, CPU), dims=(0,))
    narrow = builder.cast(builder.reshape(total, (1, 3)), torch.bfloat16, implicit=True)
    after = pipeline.run(Graph((x,), (narrow,)))
    assert operations(after) == ["sum", "cast", "reshape"]


@pytest.mark.parametrize("name", [n for n in ROWS if n in ("relu", "gelu", "silu", "mish", "leaky_relu", "abs", "neg")])
def test_the_pipeline_keeps_every_bit_of_a_row(name: str) -> None:
    x = source(Builder())
    graph = Graph((x.node,), (ROWS[name].formula(ROWS[name].formula(x)).node,))
    assert_same_bits(graph, pipeline.run(graph), SPECIAL)


def test_an_illegal_replacement_is_found() -> None:
    from fusewright.passes.rewrite import Pattern, Rule

    def wrong(builder: Builder, node: Node, bound: Any) -> Node:
        return builder.node("neg", node.inputs, TensorType((5,), (1,), torch.float64, CPU))

    x = source(Builder())
    bad = RuleSet("bad", (Rule("exp", Pattern("exp", ("x",)), wrong),))
    with pytest.raises(AssertionError, match="shape"):
        pipeline.run(Graph((x.node,), (x.apply("exp", x).node,)), (bad,))
