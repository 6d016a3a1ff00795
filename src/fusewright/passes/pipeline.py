"""The ordered lists of passes."""

from __future__ import annotations

from collections.abc import Callable

from fusewright.ir.graph import Graph
from fusewright.ir.rules import check
from fusewright.passes.algebra import ALGEBRA, VIEW_RULES
from fusewright.passes.rewrite import RuleSet, rewrite
from fusewright.passes.rounding import keep_wide

Pass = RuleSet | Callable[[Graph], Graph]

# Before a joint graph is split, the roundings of 16-bit models stay: they mark what is cheap to save.
BEFORE_PARTITION: tuple[Pass, ...] = (VIEW_RULES, ALGEBRA)
BEFORE_FUSION: tuple[Pass, ...] = (VIEW_RULES, ALGEBRA, keep_wide, VIEW_RULES)


def run(graph: Graph, passes: tuple[Pass, ...]) -> Graph:
    """Applies the passes in order. Raises AssertionError if one leaves an illegal graph."""
    for one in passes:
        graph = rewrite(graph, one) if isinstance(one, RuleSet) else one(graph)
        check(graph)
    return graph
