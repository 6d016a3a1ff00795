"""Splits a joint graph: decides which values the forward saves for the backward, and in which form.

A minimum cut (after "Training Deep Nets with Sublinear Memory Cost" and functorch's min-cut partitioner): every value
that does not depend on a gradient costs what it takes to keep, and pointwise values can be recomputed from what is
kept: for nothing where a kernel computes with them, by a pass over memory where a product reads them. Booleans cost one
bit an element, because they are kept packed, so the gradient of a piecewise-linear activation keeps a mask and never
the pre-activation. The roundings of 16-bit models are still in the graph, so that what is kept of a 16-bit model is
16-bit. What lies within an activation checkpoint is never kept, and its products are computed again too; a checkpoint's
result never is, nor are random numbers, which would be others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import networkx
import torch

from fusewright.ir.graph import VIEWS, Builder, Graph, Node, Origin, base_of, contiguous, is_implicit, same_layout
from fusewright.ir.primitives import PRIMITIVES, is_pointwise
from fusewright.ir.size import evaluate_typical, same

# What a byte counts as that the forward would not store if the backward did not read it: it is kept and written. And
# one that the backward would compute again for a product, which reads it from memory: it is read, written and read.
_STORE, _AGAIN = 1.1, 3.0


@dataclass(frozen=True)
class Partition:
    """graph: the joint graph in which the backward reads packed masks. saved: the nodes that the forward keeps."""

    graph: Graph
    saved: tuple[Node, ...]


def partition(
    joint: Graph, forward_outputs: int, tangents: frozenset[int], mutated: frozenset[int] = frozenset()
) -> Partition:
    """Chooses what to save.

    tangents: the indices of the inputs that are output gradients. mutated: of those that the caller overwrites when
    the forward has run; where the backward needs one, a copy is saved.
    """
    overwritten = {node for i, node in enumerate(joint.inputs) if i in mutated}
    late = _dependents(joint, {node for i, node in enumerate(joint.inputs) if i in tangents})
    backward_outputs = {o for o in joint.outputs[forward_outputs:] if o is not None}
    results = {base_of(o) for o in joint.outputs[:forward_outputs] if o is not None}
    saved = _minimum_cut(joint, late, results, backward_outputs, overwritten)
    return _rebuild(joint, forward_outputs, saved, late, overwritten)


def _dependents(graph: Graph, sources: set[Node]) -> set[Node]:
    late = set(sources)
    for node in graph.nodes():
        if any(i in late for i in node.inputs):
            late.add(node)
    return late


def _minimum_cut(
    joint: Graph, late: set[Node], results: set[Node], backward_outputs: set[Node], overwritten: set[Node]
) -> list[Node]:
    network = networkx.DiGraph()
    network.add_nodes_from(("source", "sink"))
    early = [n for n in joint.nodes() if n not in late and n.op not in ("constant", "size")]
    needed = {i for n in joint.nodes() if n in late for i in n.inputs if i not in late}
    needed |= backward_outputs - late
    # What no result depends on may be computed in the backward, whatever it takes: it is not computed again.
    forward = set(Graph(joint.inputs, tuple(results)).nodes())
    # What a product or ATen reads in the forward lies in memory there anyway, and so do results.
    stored = results | {base_of(i) for n in forward if n.op in ("matmul", "aten") for i in n.inputs}
    stored |= {n for n in forward if n.op in ("aten", "item")}
    read_late = {base_of(i) for n in late if n.op == "matmul" for i in n.inputs}
    checkpointed, inner = _checkpoints(joint, results)
    for node in early:
        store = float("inf") if node in inner else 1.0 if node in stored else _STORE
        network.add_edge((node, "in"), (node, "out"), capacity=store * _cost(node, node in overwritten))
        cheap = (is_pointwise(node.op) and not _told_by_rounding(node)) or node.op == "unpack_bits"
        cheap = cheap or not (node in forward or _told_by_rounding(node) or _random(node))
        if not (node.op in VIEWS or node in inner or (cheap and node not in checkpointed)):
            network.add_edge("source", (node, "in"), capacity=float("inf"))
        elif is_pointwise(node.op) and node in read_late and node not in inner:
            network.add_edge("source", (node, "in"), capacity=_AGAIN * _cost(node, overwritten=False))
        for source in node.inputs:
            if source.op not in ("constant", "size"):
                network.add_edge((source, "out"), (node, "in"), capacity=float("inf"))
        if node in needed:
            network.add_edge((node, "out"), "sink", capacity=float("inf"))
    _, (reached, _) = networkx.minimum_cut(network, "source", "sink")
    return [n for n in early if (n, "in") in reached and (n, "out") not in reached]


def _checkpoints(joint: Graph, results: set[Node]) -> tuple[set[Node], set[Node]]:
    """(nodes of activation checkpoints, those of them that no other part of the forward reads).

    A part of an operator has no origin of its own: it belongs where its users do.
    """
    forward = Graph(joint.inputs, tuple(results), joint.origins)
    numbers: dict[Node, int] = {}
    inner: set[Node] = set()
    for node, users in reversed(forward.users().items()):
        around = {numbers.get(u) for u in users}
        found = {o.checkpoint for o in joint.origins.get(node, ())} or around
        (number, *others) = found or {None}
        if node.op != "input" and number is not None and not others and not _random(node):
            numbers[node] = number
            if around == {number} and node not in results:
                inner.add(node)
    return set(numbers), inner


def _told_by_rounding(node: Node) -> bool:
    """Whether a predicate reads a rounding that the graph keeps. Computed again, from what was saved rounded and the
    forward read unrounded, it could tell something else."""
    if not (is_pointwise(node.op) and PRIMITIVES[node.op].boolean):
        return False
    for source in node.inputs:
        while source.op in VIEWS or is_implicit(source):
            source = source.inputs[0]
        if source.op == "cast" and source.tensor.dtype in (torch.float16, torch.bfloat16):
            return True
    return False


def _random(node: Node) -> bool:
    if node.op == "item":
        return _random(node.inputs[0])
    # The target of a tensor that the graph holds is no operator.
    return node.op == "aten" and torch.Tag.nondeterministic_seeded in getattr(node.attribute("target"), "tags", ())


def _cost(node: Node, overwritten: bool) -> float:
    """Bytes that it takes to keep a node until the backward. Inputs are alive anyway; a view is kept as its base."""
    if node.op == "input" and not overwritten:
        return 1.0
    if node.op in VIEWS or node.type is None:
        return float("inf")
    bits = 1 if node.tensor.dtype == torch.bool and node.tensor.shape else 8 * node.tensor.dtype.itemsize
    return 2.0 + evaluate_typical(node.tensor.numel) * bits / 8


def _rebuild(
    joint: Graph, forward_outputs: int, saved: list[Node], late: set[Node], overwritten: set[Node]
) -> Partition:
    """The graph in which the backward reads each saved value in the form that it is saved in: a mask as
    `unpack(pack(mask))`, an input that is overwritten as its copy."""
    views = _views_of_products(joint)
    builder = Builder()
    new: dict[Node, Node] = {}
    # What the backward reads in place of a node: another form of it, or a node computed again from one.
    again: dict[Node, Node] = {}
    kept: list[Node] = []
    origins: dict[Node, frozenset[Origin]] = {}
    for node in joint.nodes():
        inputs = [again.get(i, new[i]) if node in late else new[i] for i in node.inputs]
        new[node] = builder.node(node.op, inputs, node.type, **dict(node.attributes))
        if node in joint.origins:
            origins[new[node]] = joint.origins[node]
        if node in saved:
            kept.append(new[node])
            if node.op == "input":
                if node in overwritten:
                    kept[-1] = again[node] = builder.node("copy", (new[node],), node.type, of="saved")
            elif node.tensor.dtype == torch.bool and node.tensor.shape:
                kept[-1], again[node] = mask_pair(builder, new[node], views.get(node, ()))
        elif node not in late and any(i in again for i in node.inputs):
            inputs = [again.get(i, new[i]) for i in node.inputs]
            again[node] = builder.node(node.op, inputs, node.type, **dict(node.attributes))
    forward = tuple(None if o is None else new[o] for o in joint.outputs[:forward_outputs])
    backward = tuple(None if o is None else again.get(o, new[o]) for o in joint.outputs[forward_outputs:])
    outputs = (*forward, *backward)
    return Partition(Graph(tuple(new[i] for i in joint.inputs), outputs, origins), tuple(kept))


def _views_of_products(joint: Graph) -> dict[Node, tuple[Node, ...]]:
    """For what follows a product element by element, the views that lie between.

    Of several products the last counts; what is laid out in another way than what it follows counts as one.
    """
    order: dict[Node, int] = {}
    views: dict[Node, tuple[Node, ...]] = {}
    for node in joint.nodes():
        last = max((i for i in node.inputs if i in order), key=lambda i: order[i], default=None)
        if node.op == "matmul" or (last and is_pointwise(node.op) and not same_layout(node.tensor, last.tensor)):
            order[node], views[node] = len(order), ()
        elif last and (is_pointwise(node.op) or node.op in ("reshape", "permute")):
            order[node] = order[last]
            views[node] = views[last] if is_pointwise(node.op) else (*views[last], node)
    return views


def mask_pair(builder: Builder, mask: Node, views: Sequence[Node] = ()) -> tuple[Node, Node]:
    """(bits, boolean): `mask` packed to one bit an element, and read back.

    views: those between a product and the mask. It is packed without them, as it lies where the product is computed.
    """
    if any(same(n, 0) for n in mask.tensor.shape):
        views = ()  # of nothing there is no order
    for view in reversed(views):
        mask = _undone(builder, view, mask)
    bits, again = _packed(builder, mask)
    for view in views:
        again = _applied(builder, view, again)
    return bits, again


def _undone(builder: Builder, view: Node, x: Node) -> Node:
    if view.op == "reshape":
        return builder.reshape(x, view.inputs[0].tensor.shape)
    dims = view.attribute("dims")
    return builder.permute(x, [dims.index(d) for d in range(len(dims))])


def _applied(builder: Builder, view: Node, x: Node) -> Node:
    return builder.reshape(x, view.tensor.shape) if view.op == "reshape" else builder.permute(x, view.attribute("dims"))


def _packed(builder: Builder, mask: Node) -> tuple[Node, Node]:
    t = mask.tensor
    columns = t.shape[-1]
    width = (columns + 7) // 8
    packed_type = contiguous((*t.shape[:-1], width), torch.uint8, t.device)
    packed = builder.node("pack_bits", (mask,), packed_type, columns=columns)
    return packed, builder.node("unpack_bits", (packed,), contiguous(t.shape, torch.bool, t.device), columns=columns)
