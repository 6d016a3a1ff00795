"""The ordered list of rule sets."""

from __future__ import annotations

from fusewright.ir.graph import Graph
from fusewright.ir.rules import check
from fusewright.passes.algebra import ALGEBRA, VIEW_RULES
from fusewright.passes.rewrite import RuleSet, rewrite

# Of a joint graph before it is split, and of every graph before fusion.
RULE_SETS: tuple[RuleSet, ...] = (VIEW_RULES, ALGEBRA)


def run(graph: Graph, rule_sets: tuple[RuleSet, ...] = RULE_SETS) -> Graph:
    """Applies the rule sets in order. Raises AssertionError if one leaves an illegal graph."""
    for rule_set in rule_sets:
        graph = rewrite(graph, rule_set)
        check(graph)
    return graph
