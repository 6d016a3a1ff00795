"""Roundings that only model a store go where no store is, and nowhere else."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from fusewright.ir import reference, rules
from fusewright.ir.graph import Builder, Graph, Node, contiguous
from fusewright.ir.value import Value
from fusewright.passes.rounding import keep_wide

CPU = torch.device("cpu")
SIZE = 6


def matrix(builder: Builder, index: int) -> Node:
    return builder.node("input", (), contiguous((SIZE, SIZE), torch.bfloat16, CPU), index=index)


def rounded(x: Value, *, implicit: bool = True) -> Value:
    """A float32 value as a 16-bit model's next operator gets it."""
    narrow = x.builder.cast(x.node, torch.bfloat16, implicit=implicit)
    return Value(x.builder, x.builder.cast(narrow, torch.float32, implicit=True))


def narrow(x: Value) -> Node:
    return x.builder.cast(x.node, torch.bfloat16, implicit=True)


def product(a: Node, b: Node, builder: Builder) -> Value:
    return Value(builder, builder.node("matmul", (a, b), contiguous((SIZE, SIZE), torch.float32, CPU)))


def casts(graph: Graph) -> int:
    return sum(n.op == "cast" for n in graph.nodes())


def after(make: Callable[[Builder, list[Node]], Value]) -> tuple[Graph, Graph]:
    builder = Builder()
    inputs = [matrix(builder, i) for i in range(3)]
    before = Graph(tuple(inputs), (narrow(make(builder, inputs)),))
    found = keep_wide(before)
    rules.check(found)
    return before, found


def same_bits(before: Graph, found: Graph) -> bool:
    values = [torch.randn(SIZE, SIZE, dtype=torch.bfloat16) for _ in before.inputs]
    return torch.equal(*(reference.run(g, values)[0] for g in (before, found)))


def test_an_epilogue_reads_its_product_and_itself_before_they_are_rounded() -> None:
    before, found = after(lambda b, x: rounded(rounded(product(x[0], x[1], b)) * 3) + 1)
    assert casts(before) == 5 and casts(found) == 1  # the result's own


def test_a_view_between_stays() -> None:
    def viewed(b: Builder, x: list[Node]) -> Value:
        low = b.cast((product(x[0], x[1], b) * 3).node, torch.bfloat16, implicit=True)
        turned = b.permute(b.reshape(low, (SIZE * 2, SIZE // 2)), (1, 0))
        return Value(b, b.cast(turned, torch.float32, implicit=True)) + 1

    _, found = after(viewed)
    assert casts(found) == 1
    assert [n.op for n in found.nodes() if n.op in ("reshape", "permute")] == ["reshape", "permute"]


def test_what_another_products_epilogue_reads_is_read_rounded() -> None:
    """It lies in memory between the two: with 16 bits, as eager has it there."""

    def gate(b: Builder, x: list[Node]) -> Value:
        first = product(x[0], x[1], b) * 3
        doubled = rounded(first) * 2  # with the first product
        return rounded(doubled) + rounded(first) * product(x[0], x[2], b)

    before, found = after(gate)
    kept = [n for n in found.nodes() if n.op == "cast" and n.tensor.dtype == torch.bfloat16]
    assert len(kept) == 3 and casts(before) - casts(found) == 0
    (double,) = (n for n in found.nodes() if n.op == "mul" and dict(n.inputs[1].attributes).get("value") == 2)
    assert double.inputs[0].op == "mul", "read before it is rounded"
    values = [torch.randn(SIZE, SIZE, dtype=torch.bfloat16) for _ in before.inputs]
    a, b = (reference.run(g, values)[0].double() for g in (before, found))
    torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)


def test_who_reads_a_view_decides() -> None:
    """Of a column that scales another product, and the product that it came from."""

    def scale(b: Builder, x: list[Node]) -> Value:
        first = product(x[0], x[1], b)
        turned = Value(b, b.permute(rounded(first * 3).node, (1, 0)))
        return rounded(turned * 2) * product(x[0], x[2], b) + turned

    _, found = after(scale)
    (double,) = (n for n in found.nodes() if n.op == "mul" and dict(n.inputs[1].attributes).get("value") == 2)
    assert double.inputs[0].op == "permute" and double.inputs[0].inputs[0].op == "mul"
    (last,) = (n for n in found.nodes() if n.op == "add")
    assert last.inputs[1].op == "permute" and last.inputs[1].inputs[0].op == "cast"


def test_a_sum_reads_a_product_rounded_and_anything_else_as_it_is() -> None:
    def total(x: Value) -> Value:
        summed = x.builder.node("sum", (rounded(x).node,), contiguous((SIZE,), torch.float32, CPU), dims=(0,))
        return Value(x.builder, x.builder.expand(summed, (SIZE, SIZE)))

    before, found = after(lambda b, x: total(product(x[0], x[1], b) * 3))
    assert casts(found) == casts(before) == 3 and same_bits(before, found)
    _, found = after(lambda b, x: total(Value(b, b.cast(x[0], torch.float32, implicit=True)) * 3))
    assert casts(found) == 2  # the input widened, the result rounded


@pytest.mark.parametrize("implicit", [True, False])
def test_a_rounding_that_the_user_wrote_stays(implicit: bool) -> None:
    before, found = after(lambda b, x: rounded(product(x[0], x[1], b) * 3, implicit=implicit) + 1)
    assert casts(before) - casts(found) == (2 if implicit else 0)


def test_what_reads_inputs_alone_is_computed_where_it_is_read() -> None:
    def scaled(b: Builder, x: list[Node]) -> Value:
        scale = Value(b, b.cast(x[2], torch.float32, implicit=True)) * 3
        return product(x[0], x[1], b) * rounded(scale)

    before, found = after(scaled)
    assert casts(before) - casts(found) == 2
