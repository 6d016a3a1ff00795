"""The rewrite engine: patterns over graph nodes, applied bottom-up until nothing matches.

A rule is a pattern and a replacement. Every rule must be *exact*: the replacement gives the same bits, special values
and signed zeros included.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fusewright.ir.graph import VIEWS, Builder, Graph, Node, Origin, Output, base_of, same_layout

Bindings = dict[str, Node]


@dataclass(frozen=True)
class Pattern:
    """Matches a node of `op` whose inputs match `inputs` and whose attributes equal `attributes`."""

    op: str
    inputs: tuple[Pattern | str, ...] = ()
    attributes: Mapping[str, Any] = field(default_factory=dict)

    def match(self, node: Node, bound: Bindings) -> bool:
        if node.op != self.op or (self.inputs and len(node.inputs) != len(self.inputs)):
            return False
        found = dict(node.attributes)
        if any(_different(found.get(k), v) for k, v in self.attributes.items()):
            return False
        return all(_match_input(p, n, bound) for p, n in zip(self.inputs, node.inputs, strict=False))


def _different(a: Any, b: Any) -> bool:
    if a != b or isinstance(a, bool) != isinstance(b, bool):
        return True
    # 0.0 == -0.0, but x - 0.0 is x and x - -0.0 is not.
    return isinstance(a, float) and a == 0 and math.copysign(1, a) != math.copysign(1, b)


def _match_input(pattern: Pattern | str, node: Node, bound: Bindings) -> bool:
    if isinstance(pattern, Pattern):
        return pattern.match(node, bound)
    return bound.setdefault(pattern, node) is node


@dataclass(frozen=True)
class Rule:
    """replacement(builder, matched node, what the pattern's names are bound to) → a node, or None to decline."""

    name: str
    pattern: Pattern
    replacement: Callable[[Builder, Node, Bindings], Node | None]


@dataclass(frozen=True)
class RuleSet:
    """Rules that are applied together, under a name that `explain` can show."""

    name: str
    rules: tuple[Rule, ...]


def rewrite(graph: Graph, rule_set: RuleSet) -> Graph:
    """Applies the rules to every node, inputs first, each until none matches; repeats until the graph is stable."""
    while True:
        rewritten, changed = _sweep(graph, rule_set.rules)
        if not changed:
            return graph
        graph = rewritten


def _sweep(graph: Graph, rules: Sequence[Rule]) -> tuple[Graph, bool]:
    by_op: dict[str, list[Rule]] = {}
    for rule in rules:
        by_op.setdefault(rule.pattern.op, []).append(rule)
    builder = Builder()
    new: dict[Node, Node] = {}
    origins: dict[Node, frozenset[Origin]] = {}
    changed = False
    for node in graph.nodes():
        result = builder.node(node.op, [new[i] for i in node.inputs], node.type, **dict(node.attributes))
        while (better := _apply(builder, result, by_op.get(result.op, ()))) is not None:
            result, changed = better, True
        new[node] = result
        if node in graph.origins:
            origins[result] = origins.get(result, frozenset()) | graph.origins[node]
    inputs = tuple(new[i] for i in graph.inputs)
    return Graph(inputs, _outputs(builder, graph, new), origins), changed


def _outputs(builder: Builder, graph: Graph, new: Mapping[Node, Node]) -> tuple[Output, ...]:
    """What had memory and strides of its own keeps them, although a rule found it to be equal to something else."""
    owners = {new[i]: i for i in graph.inputs}
    copies: dict[Node, Node] = {}
    results: list[Output] = []
    for position, old in enumerate(graph.outputs):
        if old is None or old.type is None:
            results.append(None if old is None else new[old])
            continue
        owner = base_of(old)
        found = new[owner]
        if owner not in copies and (
            owners.setdefault(base_of(found), owner) is not owner or not same_layout(owner.tensor, found.tensor)
        ):
            copies[owner] = builder.node("copy", (found,), owner.type, of=position)
        results.append(_viewed(builder, old, copies[owner]) if owner in copies else new[old])
    return tuple(results)


def _viewed(builder: Builder, view: Node, base: Node) -> Node:
    """The chain of views that `view` ends, of another base."""
    if view.op not in VIEWS:
        return base
    inner = _viewed(builder, view.inputs[0], base)
    return builder.node(view.op, (inner,), view.type, **dict(view.attributes))


def _apply(builder: Builder, node: Node, rules: Sequence[Rule]) -> Node | None:
    for rule in rules:
        bound: Bindings = {}
        if rule.pattern.match(node, bound):
            replacement = rule.replacement(builder, node, bound)
            if replacement is not None and replacement is not node:
                return replacement
    return None
