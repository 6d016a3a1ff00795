"""Leaves out the roundings of 16-bit models that only tell where eager stores a value, and fusion does not.

What one kernel computes and reads is read before its rounding. What lies in memory between two kernels is rounded
there, as in eager, and takes half of the bytes.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from fusewright.ir.graph import VIEWS, Builder, Graph, Node, Origin
from fusewright.ir.order import products_last
from fusewright.passes.rewrite import outputs_of

# What no epilogue goes beyond: readers of such a result begin after it.
_OPENS = ("matmul", "aten", "sum", "encode")


def keep_wide(graph: Graph) -> Graph:
    """Replaces widen(views(round(x))) by views(x), for every reader that a kernel can compute together with x."""
    after = _last_opened(graph)
    builder = Builder()
    new: dict[Node, Node] = {}
    wide: dict[Node, Node] = {}  # of a value that is widened, and its views: what it was before it was rounded
    origins: dict[Node, frozenset[Origin]] = {}
    for node in graph.nodes():
        attributes = dict(node.attributes)
        inputs = [wide[i] if i in wide and _together(i, node, after) else new[i] for i in node.inputs]
        new[node] = builder.node(node.op, inputs, node.type, **attributes)
        if node.op in VIEWS and node.inputs[0] in wide:
            wide[node] = builder.node(node.op, [wide[node.inputs[0]]], node.type, **attributes)
        elif (unrounded := _unrounded(builder, node, new)) is not None:
            wide[node] = unrounded
        if node in graph.origins:
            origins[new[node]] = origins.get(new[node], frozenset()) | graph.origins[node]
    return Graph(tuple(new[i] for i in graph.inputs), outputs_of(builder, graph, {**new, **wide}), origins)


def _last_opened(graph: Graph) -> Mapping[Node, Node | None]:
    """For every value the latest of what opens a kernel that it depends on; of inputs alone, none."""
    order: dict[Node | None, int] = {None: -1}
    after: dict[Node, Node | None] = {}
    for node in products_last(graph.nodes()):
        if node.op in _OPENS:
            order[node] = len(order)
            after[node] = node
        else:
            after[node] = max((after[i] for i in node.inputs), key=order.__getitem__, default=None)
    return after


def _together(source: Node, reader: Node, after: Mapping[Node, Node | None]) -> bool:
    """Whether one kernel computes both, and reads no memory between. What depends on inputs alone is computed in every
    kernel that reads it; sums are computed where their operands are, but over the rows of a product."""
    if reader.op in VIEWS:
        return False  # who reads the view decides
    opened = after[source]
    if reader.op == "sum":
        return opened is None or opened.op != "matmul"
    return opened is None or opened is after[reader]


def _unrounded(builder: Builder, node: Node, new: Mapping[Node, Node]) -> Node | None:
    """x for widen(views(round(x))), viewed so."""
    if node.op != "cast":
        return None
    views = []
    source = node.inputs[0]
    while source.op in VIEWS:
        views.append(source)
        source = source.inputs[0]
    if source.op != "cast" or not source.attribute("implicit"):
        return None
    wide = source.inputs[0]
    if wide.tensor.dtype != node.tensor.dtype or source.tensor.dtype not in (torch.float16, torch.bfloat16):
        return None
    found = new[source].inputs[0]
    for view in reversed(views):
        t = view.tensor
        retyped = type(t)(t.shape, t.stride, wide.tensor.dtype, t.device)
        found = builder.view(view.op, found, retyped, **dict(view.attributes))
    return found
