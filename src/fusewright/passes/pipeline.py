"""The ordered lists of passes."""

from __future__ import annotations

from collections.abc import Callable

from fusewright.ir.graph import Graph
from fusewright.ir.rules import check
from fusewright.passes.algebra import ALGEBRA, VIEW_RULES
from fusewright.passes.rewrite import RuleSet, rewrite

Pass = RuleSet | Callable[[Graph], Graph]

BEFORE_PARTITION: tuple[Pass, ...] = (VIEW_RULES, ALGEBRA)
BEFORE_FUSION: tuple[Pass, ...] = (VIEW_RULES, ALGEBRA)


def run(graph: Graph, passes: tuple[Pass, ...]) -> Graph:
    """Applies the passes in order. Raises AssertionError if one leaves an illegal graph."""
    for one in passes:
        graph = rewrite(graph, one) if isinstance(one, RuleSet) else one(graph)
        check(graph)
    return graph
