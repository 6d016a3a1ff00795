"""The rewrite rules, in named sets."""

from __future__ import annotations

import torch

from fusewright.ir.graph import Builder, Node, contiguous
from fusewright.ir.primitives import PRIMITIVES
from fusewright.ir.size import matching_groups, same
from fusewright.passes.rewrite import Bindings, Pattern, Rule, RuleSet


def _number(value: float) -> Pattern:
    return Pattern("constant", attributes={"value": value})


def _keep(builder: Builder, node: Node, bound: Bindings) -> Node | None:
    """Replaces by what `x` is bound to, where that has the node's shape and dtype."""
    x = bound["x"]
    return x if x.tensor.shape == node.tensor.shape and x.tensor.dtype == node.tensor.dtype else None


def _fold(builder: Builder, node: Node, bound: Bindings) -> Node | None:
    values = [i.attribute("value") for i in node.inputs]
    if not all(isinstance(v, (bool, int, float)) for v in values) or node.op == "copy":
        return None
    operands = [torch.tensor(v, dtype=i.tensor.dtype) for v, i in zip(values, node.inputs, strict=True)]
    result = PRIMITIVES[node.op].reference(*operands).to(node.tensor.dtype).item()
    folded = builder.constant(result, node.tensor.dtype, node.tensor.device)
    return builder.expand(folded, node.tensor.shape)


def _merge_reshapes(builder: Builder, node: Node, bound: Bindings) -> Node | None:
    return builder.view("reshape", bound["x"], node.tensor, shape=node.tensor.shape)


def _merge_permutes(builder: Builder, node: Node, bound: Bindings) -> Node | None:
    inner = node.inputs[0].attribute("dims")
    dims = tuple(inner[d] for d in node.attribute("dims"))
    return builder.view("permute", bound["x"], node.tensor, dims=dims)


def _sum_by_columns(builder: Builder, node: Node, bound: Bindings) -> Node | None:
    """sum of all of x → the sum of its column sums: the first is wide enough to run fast, the second small."""
    x = bound["x"]
    wide = [i for i, size in enumerate(x.tensor.shape) if not same(size, 1)]
    if len(wide) < 2 or set(wide) - set(node.attribute("dims")):
        return None
    kept = x.tensor.shape[wide[-1]]
    dims = tuple(i for i in range(len(x.tensor.shape)) if i != wide[-1])
    columns = builder.node("sum", (x,), contiguous([kept], node.tensor.dtype, node.tensor.device), dims=dims)
    total = builder.node("sum", (columns,), contiguous((), node.tensor.dtype, node.tensor.device), dims=(0,))
    return builder.view("reshape", total, node.tensor, shape=node.tensor.shape)


def _sum_before_reshape(builder: Builder, node: Node, bound: Bindings) -> Node | None:
    """sum(reshape(x)) → reshape(sum(x)), where each dimension of x lies within summed or within kept ones."""
    x, dims = bound["x"], node.attribute("dims")
    groups = matching_groups(x.tensor.shape, node.inputs[0].tensor.shape)
    if groups is None:
        return None
    summed: list[int] = []
    for before, after in groups:
        hit = [d in dims for d in after if not same(node.inputs[0].tensor.shape[d], 1)]
        if any(hit) and not all(hit):
            return None
        summed += before if any(hit) else []
    kept = [s for i, s in enumerate(x.tensor.shape) if i not in summed]
    total = builder.node(
        "sum", (x,), contiguous(kept, node.tensor.dtype, node.tensor.device), dims=tuple(sorted(summed))
    )
    return builder.view("reshape", total, node.tensor, shape=node.tensor.shape)


def _cast_before_reshape(builder: Builder, node: Node, bound: Bindings) -> Node | None:
    """cast(reshape(x)) → reshape(cast(x)), so that a sum and its rounding stand side by side."""
    converted = builder.cast(bound["x"], node.tensor.dtype, implicit=node.attribute("implicit"))
    return builder.view("reshape", converted, node.tensor, shape=node.tensor.shape)


ALGEBRA = RuleSet(
    "algebra",
    (
        Rule("x * 1 = x", Pattern("mul", ("x", _number(1))), _keep),
        Rule("1 * x = x", Pattern("mul", (_number(1), "x")), _keep),
        Rule("x / 1 = x", Pattern("div", ("x", _number(1))), _keep),
        Rule("x / 1 = x, narrow", Pattern("div_narrow", ("x", _number(1))), _keep),
        Rule("x - 0 = x", Pattern("sub", ("x", _number(0))), _keep),
        Rule("-(-x) = x", Pattern("neg", (Pattern("neg", ("x",)),)), _keep),
        Rule("not not x = x", Pattern("not", (Pattern("not", ("x",)),)), _keep),
        Rule("where(c, x, x) = x", Pattern("where", ("c", "x", "x")), _keep),
        *(
            Rule(f"fold {name}", Pattern(name, (Pattern("constant"),) * row.arity), _fold)
            for name, row in PRIMITIVES.items()
        ),
    ),
)

VIEW_RULES = RuleSet(
    "views",
    (
        Rule("reshape of reshape", Pattern("reshape", (Pattern("reshape", ("x",)),)), _merge_reshapes),
        Rule("cast before reshape", Pattern("cast", (Pattern("reshape", ("x",)),)), _cast_before_reshape),
        Rule("sum everything by columns first", Pattern("sum", ("x",)), _sum_by_columns),
        Rule("sum before reshape", Pattern("sum", (Pattern("reshape", ("x",)),)), _sum_before_reshape),
        Rule("permute of permute", Pattern("permute", (Pattern("permute", ("x",)),)), _merge_permutes),
    ),
)
