"""Roundings that only model a store go where no store is, and nowhere else."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from fusewright import compiler
from fusewright.fusion import reference as plan_reference
from fusewright.fusion.expression import Apply, ColumnSum, Expression, walk
from fusewright.fusion.plan import FusionPlan
from fusewright.ir import reference
from fusewright.ir.graph import Builder, Graph, Node, TensorType, contiguous
from fusewright.ir.value import Value, where

CPU = torch.device("cpu")
SIZE = 6
NARROW = torch.bfloat16


def matrix(builder: Builder, index: int) -> Node:
    return builder.node("input", (), contiguous((SIZE, SIZE), NARROW, CPU), index=index)


def widened(x: Node, builder: Builder) -> Value:
    return Value(builder, builder.cast(x, torch.float32, implicit=True))


def rounded(x: Value, *, implicit: bool = True) -> Value:
    """A float32 value as a 16-bit model's next operator gets it."""
    return widened(x.builder.cast(x.node, NARROW, implicit=implicit), x.builder)


def product(a: Node, b: Node, builder: Builder) -> Value:
    return Value(builder, builder.node("matmul", (a, b), contiguous((SIZE, SIZE), torch.float32, CPU)))


def fused(make: Callable[[Builder, list[Node]], Value]) -> FusionPlan:
    """The plan of a 16-bit model of three matrices; it gives what the graph does, but for roundings."""
    builder = Builder()
    inputs = [matrix(builder, i) for i in range(3)]
    graph = Graph(tuple(inputs), (builder.cast(make(builder, inputs).node, NARROW, implicit=True),))
    plan = compiler.plan(graph)
    values = [torch.randn(SIZE, SIZE).to(NARROW) for _ in inputs]
    found, expected = plan_reference.run(plan, values, widen=False), reference.run(graph, values)
    torch.testing.assert_close(found, expected, rtol=3e-2, atol=3e-2)
    return plan


def applied(plan: FusionPlan, op: str) -> list[Apply]:
    found: list[Expression] = [e for r in plan.regions for e in walk(s.value for s in r.sinks)]
    return [e for e in found if isinstance(e, Apply) and e.op == op]


def roundings(plan: FusionPlan) -> int:
    return sum(e.dtype == NARROW for e in applied(plan, "cast"))


def between(plan: FusionPlan) -> list[torch.dtype]:
    """Of what lies in memory between kernels."""
    return [b.dtype for name, b in plan.buffers.items() if plan.temporary(name)]


def test_an_epilogue_reads_its_product_and_itself_before_they_are_rounded() -> None:
    plan = fused(lambda b, x: rounded(rounded(product(x[0], x[1], b)) * 3) + 1)
    assert len(plan.steps) == 1 and roundings(plan) == 1  # the result's own


def test_a_view_between_stays() -> None:
    def viewed(b: Builder, x: list[Node]) -> Value:
        low = b.cast((product(x[0], x[1], b) * 3).node, NARROW, implicit=True)
        return widened(b.permute(b.reshape(low, (SIZE * 2, SIZE // 2)), (1, 0)), b) + 1

    plan = fused(viewed)
    assert len(plan.steps) == 1 and roundings(plan) == 1


def test_what_another_products_epilogue_reads_is_read_rounded() -> None:
    """It lies in memory between the two: with 16 bits, as eager has it there."""

    def gate(b: Builder, x: list[Node]) -> Value:
        first = product(x[0], x[1], b) * 3
        doubled = rounded(first) * 2  # with the first product
        return rounded(doubled) + rounded(first) * product(x[0], x[2], b)

    plan = fused(gate)
    assert len(plan.steps) == 2 and between(plan) == [NARROW] * 2
    (double,) = (e for e in applied(plan, "mul") if getattr(e.operands[1], "value", None) == 2)
    assert isinstance(double.operands[0], Apply) and double.operands[0].op == "mul", "read before it is rounded"


def halves(b: Builder, x: Node) -> list[Node]:
    kept = TensorType((SIZE, SIZE // 2), x.tensor.stride, x.tensor.dtype, CPU)
    return [b.view("slice", x, kept, dim=1, start=start, step=1) for start in (0, SIZE // 2)]


VIEWS: dict[str, Callable[[Builder, Node], list[Node]]] = {
    "its halves": halves,
    "turned": lambda b, x: [x, b.permute(x, (1, 0))],
}


@pytest.mark.parametrize("name", VIEWS)
def test_what_a_view_takes_apart_lies_between_two_kernels(name: str) -> None:
    """No epilogue reads it: not a float32 one, although it depends on one product alone."""

    def gated(b: Builder, x: list[Node]) -> Value:
        low = b.cast((product(x[0], x[1], b) * 3).node, NARROW, implicit=True)
        left, right = VIEWS[name](b, low)
        return widened(left, b) * rounded(widened(right, b) * 2)

    plan = fused(gated)
    assert len(plan.steps) == 2 and set(between(plan)) == {NARROW}


def test_a_sum_reads_a_product_rounded_and_anything_else_as_it_is() -> None:
    def total(x: Value) -> Value:
        summed = x.builder.node("sum", (rounded(x).node,), contiguous((SIZE,), torch.float32, CPU), dims=(0,))
        return Value(x.builder, x.builder.expand(summed, (SIZE, SIZE)))

    plan = fused(lambda b, x: total(product(x[0], x[1], b) * 3))
    assert between(plan) == [NARROW, torch.float32]
    plan = fused(lambda b, x: total(widened(x[0], b) * 3))
    (summed,) = (s for r in plan.regions for s in r.sinks if isinstance(s, ColumnSum))
    assert isinstance(summed.value, Apply) and summed.value.op == "mul"


def test_a_sum_of_a_view_is_computed_where_its_operand_is() -> None:
    """Of a column sum's operand only its place in memory is turned."""

    def both(b: Builder, x: list[Node]) -> Value:
        low = b.cast((widened(x[0], b) * 3).node, NARROW, implicit=True)
        turned = widened(b.permute(low, (1, 0)), b).node
        summed = b.node("sum", (turned,), contiguous((SIZE,), torch.float32, CPU), dims=(1,))
        return product(low, x[1], b) + Value(b, b.expand(summed, (SIZE, SIZE)))

    plan = fused(both)
    assert len(plan.steps) == 2 and len(plan.steps[0].writes()) == 2


@pytest.mark.parametrize("implicit", [True, False])
def test_a_rounding_that_the_user_wrote_stays(implicit: bool) -> None:
    plan = fused(lambda b, x: rounded(product(x[0], x[1], b) * 3, implicit=implicit) + 1)
    assert roundings(plan) == (1 if implicit else 2)


def test_what_reads_inputs_alone_is_computed_where_it_is_read() -> None:
    plan = fused(lambda b, x: product(x[0], x[1], b) * rounded(widened(x[2], b) * 3))
    assert len(plan.steps) == 1 and roundings(plan) == 1


def test_what_is_rounded_again_needs_no_memory_beside_what_it_was() -> None:
    """Another kernel tells by the rounded product whether it is the largest of its row."""

    def largest(b: Builder, x: list[Node]) -> Value:
        low = widened(b.cast(product(x[0], x[1], b).node, NARROW, implicit=True), b)
        again = rounded(low, implicit=False)
        other = rounded(product(x[0], x[2], b))
        return where(again > other, low, other)

    plan = fused(largest)
    assert len(plan.steps) == 2 and between(plan) == [NARROW]


def test_a_sum_that_runs_as_aten_reads_16_bits() -> None:
    def middle(b: Builder, x: list[Node]) -> Value:
        tripled = b.cast((widened(x[0], b) * 3).node, NARROW, implicit=True)
        cube = widened(b.reshape(tripled, (2, 3, SIZE)), b)
        summed = b.node("sum", (cube.node,), contiguous((2, SIZE), torch.float32, CPU), dims=(1,))
        repeated = b.expand(b.reshape(summed, (2, 1, SIZE)), (2, 3, SIZE))
        return Value(b, b.reshape((cube + Value(b, repeated)).node, (SIZE, SIZE)))

    plan = fused(middle)
    assert [f.name for f in plan.fallbacks] == ["sum"] and between(plan) == [NARROW, torch.float32]


@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside an input"])
def test_another_kernel_computes_what_would_take_more_memory_than_what_it_is_computed_of(beside: bool) -> None:
    """The squares of a product's rounded elements, say, which are summed over its rows: a float32 each."""

    def squared(b: Builder, x: list[Node]) -> Value:
        low = rounded(product(x[0], x[1], b))
        difference = low - widened(x[2], b) if beside else low
        summed = b.node("sum", ((difference * difference).node,), contiguous((SIZE,), torch.float32, CPU), dims=(0,))
        return Value(b, b.expand(summed, (SIZE, SIZE))) * 0.1

    plan = fused(squared)
    assert between(plan) == [NARROW, torch.float32]
    assert len(plan.steps) == 3


def test_a_reshape_that_mixes_dimensions_reads_16_bits_in_memory() -> None:
    """It has an index map there alone: nothing is converted for it, and nothing runs as ATen."""

    def mixed(b: Builder, x: list[Node]) -> Value:
        low = b.cast(product(x[0], x[1], b).node, NARROW, implicit=True)
        doubled = widened(b.reshape(low, (4, 9)), b) * 2
        again = b.reshape(b.cast(doubled.node, NARROW, implicit=True), (SIZE, SIZE))
        return widened(again, b) + 1

    plan = fused(mixed)
    assert len(plan.regions) == len(plan.steps) == 3 and between(plan) == [NARROW] * 2
