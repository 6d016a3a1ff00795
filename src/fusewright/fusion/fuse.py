"""`Graph` → `FusionPlan`."""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from typing import Any

from fusewright.fusion.levels import Decisions, Levels
from fusewright.fusion.plan import Buffer, Fallback, FusionPlan, Refusal, Step, View
from fusewright.fusion.regions import RegionBuilder, Retry, anchor
from fusewright.ir.graph import VIEWS, Graph, Node, Origin, Output, base_of, contiguous
from fusewright.ir.size import Size, same

_LONGEST_NAME = 60


def fuse(graph: Graph, names: Sequence[str | None] = (), kept: Collection[Node] = ()) -> FusionPlan:
    """Groups the graph's operators into regions; what no region can hold becomes a fallback with its reason.

    names: what to call the buffers of the graph's inputs, where they should not be numbered. kept: the inputs whose
    encodings are kept from one call to the next.
    """
    decisions, known = Decisions(), -1
    while decisions.count() > known:
        known = decisions.count()
        with suppress(Retry):
            return _Planner(graph, decisions, names, kept).plan()
    raise AssertionError("planning tries again what it has decided")


class _Planner:
    """One attempt at a plan."""

    def __init__(self, graph: Graph, decisions: Decisions, names: Sequence[str | None], kept: Collection[Node]) -> None:
        self.graph = graph
        self.kept = kept
        self.input_names = dict(zip(graph.inputs, names, strict=False))
        self.decisions = decisions
        self.levels = Levels(graph, decisions)
        self.buffers: dict[Node, Buffer] = {}
        self.names: set[str] = set()
        for node in graph.nodes():
            if node.type is not None and self.levels.has_memory(node):
                self.buffers[node] = self.buffer(node)
        self.regions = RegionBuilder(self.levels, decisions, self.buffers)

    def plan(self) -> FusionPlan:
        # Encodings come last: `ordered` then places each just before what reads it, so that it does not live longer.
        steps = [*self.fallbacks(), *self.fused(), *self.encodes()]
        outputs = tuple(self.output(o) for o in self.graph.outputs)
        return FusionPlan(
            inputs=tuple(self.argument(n) for n in self.graph.inputs),
            outputs=outputs,
            buffers={b.name: b for b in self.buffers.values()},
            steps=self.ordered(steps),
            refusals=tuple(self.refusals()),
        )

    def buffer(self, node: Node) -> Buffer:
        t = node.tensor
        name = self.input_names.get(node) or self.buffer_name(node)
        # Of a view that torch takes: what is returned may lie in an argument.
        taken = node.op in VIEWS and node in self.decisions.left
        dense = node.op in ("input", "aten", "item") or taken or t.dense
        stride = (
            t.stride if dense and node not in self.decisions.copied else contiguous(t.shape, t.dtype, t.device).stride
        )
        return Buffer(name, t.shape, stride, t.dtype, t.device)

    def buffer_name(self, node: Node) -> str:
        """x, mask, halves, out or t (for temporaries), numbered from the second of its kind on; temporaries always."""
        returned = {self.levels.base(o) for o in self.graph.outputs if o is not None}
        prefix = {"input": "x", "pack_bits": "mask", "encode": "halves"}.get(
            node.op, "out" if node in returned else "t"
        )
        taken = {b.name for b in self.buffers.values()} | {n for n in self.input_names.values() if n}
        numbered = (f"{prefix}{n or ''}" for n in itertools.count(1 if prefix in ("t", "x") else 0))
        return next(name for name in numbered if name not in taken)

    def argument(self, node: Node) -> str | Size | None:
        if node.op == "size":
            return node.attribute("value")
        return self.buffers[node].name if node.type is not None else None

    def output(self, node: Output) -> View | Size | None:
        if node is None or node.op == "size":
            return None if node is None else node.attribute("value")
        view = self.regions.view(node)
        wanted = node.tensor.stride
        differs = any(
            not same(a, b) for a, b, n in zip(view.stride, wanted, node.tensor.shape, strict=True) if not same(n, 1)
        )
        if differs and any(same(s, 0) for s in view.stride) and self.levels.base(node) is not node:
            # Eager returns memory of its own here, not a broadcast.
            self.decisions.copied[node] = "the result is a broadcast"
            raise Retry
        return view

    def fallbacks(self) -> list[Step]:
        steps: list[Step] = []
        for node in self.graph.nodes():
            reason = self.decisions.left.get(node)
            if node.op == "aten":
                reason = "no kernel family computes this operator" + _on(node)
            if reason is None:
                continue
            inputs = tuple(
                self.regions.view(i, self.levels.read(node, i)) if i.type else dict(i.attributes).get("value")
                for i in node.inputs
            )
            items = [u for u in self.levels.users[node] if u.op == "item"] if node.type is None else []
            count = 1 + max((i.attribute("index") for i in items), default=-1) if node.type is None else 1
            results: list[str | None] = [None] * count
            for item in items or [node]:
                if item in self.buffers:
                    results[item.attribute("index") if items else 0] = self.buffers[item].name
            origins = tuple(sorted(self.graph.origins.get(node, ())))
            steps.append(Fallback(node, inputs, tuple(results), origins, reason))
        return steps

    def fused(self) -> list[Step]:
        at: dict[int, list[Node]] = {}
        for node in self.graph.nodes():
            if node in self.decisions.left or node.op in ("input", "aten", "item", "encode"):
                continue
            if node in self.levels.home:
                at.setdefault(self.levels.home[node], []).append(node)
            elif node in self.levels.materialised and node not in self.levels.stored_as.values():
                at.setdefault(self.levels.level[node], []).append(node)
        steps: list[Step] = []
        for level, sinks in sorted(at.items()):
            if level in self.levels.epilogues:
                steps.append(self.regions.product_region(level, sinks, self.name))
            else:
                steps += self.pointwise(sinks)
        return steps

    def encodes(self) -> Iterator[Step]:
        """One step for what each product is the first to read encoded; what is kept between calls has its own."""
        made: set[Node] = set()
        products = [e.product for _, e in sorted(self.levels.epilogues.items())]
        for sources in (*(p.inputs[2:] for p in products), self.graph.nodes()):
            new = [n for n in dict.fromkeys(sources) if n.op == "encode" and n not in made]
            made.update(new)
            kept = [n for n in new if base_of(n.inputs[0]) in self.kept]
            for group in ([n for n in new if n not in kept], *([n] for n in kept)):
                if group:
                    yield self.regions.encode(group, self.unique("encode"), group[0] in kept)

    def pointwise(self, sinks: Sequence[Node]) -> list[Step]:
        """One region for each shape among the sinks of a level; sums over other dimensions, or of another dtype, apart.

        A kernel adds up all its sums in one type.
        """
        groups: dict[tuple[Any, ...], list[Node]] = {}
        summed: dict[tuple[Size, ...], Any] = {}
        for sink in sinks:
            wide = tuple(s for s in anchor(sink)[0].tensor.shape if not same(s, 1))
            sums: tuple[Any, ...] = ()
            if sink.op == "sum":
                shape = sink.inputs[0].tensor.shape
                sums = (tuple(d for d in sink.attribute("dims") if not same(shape[d], 1)), sink.tensor.dtype)
            apart = bool(sums) and summed.setdefault(wide, sums) != sums
            groups.setdefault((wide, sums if apart else ()), []).append(sink)
        return [self.regions.pointwise_region(shape, group, self.name) for (shape, _), group in groups.items()]

    def name(self, origins: Sequence[Origin]) -> str:
        """A C identifier that says which operators a kernel computes."""
        words = [re.sub(r"\W", "", o.name).strip("_") for o in origins]
        name = "_".join(dict.fromkeys(words)) or "copy"
        if len(name) > _LONGEST_NAME:
            name = f"{words[0]}_to_{words[-1]}_{len(words)}_operators"
        return self.unique(f"fused_{name}")

    def unique(self, name: str) -> str:
        found, n = name, 2
        while found in self.names:
            found, n = f"{name}_{n}", n + 1
        self.names.add(found)
        return found

    def ordered(self, steps: Sequence[Step]) -> tuple[Step, ...]:
        """Steps so that every buffer is written before it is read."""
        writer = {name: step for step in steps for name in step.writes()}
        order: list[Step] = []
        state: dict[int, bool] = {}

        def visit(step: Step) -> None:
            if id(step) in state:
                if not state[id(step)]:
                    self.break_cycle(step)
                return
            state[id(step)] = False
            for name in step.reads():
                if name in writer and writer[name] is not step:
                    visit(writer[name])
            state[id(step)] = True
            order.append(step)

        for step in steps:
            visit(step)
        return tuple(order)

    def break_cycle(self, step: Step) -> None:
        """Two kernels of one level that read each other's results: readers of this one start a level of their own."""
        for node, buffer in self.buffers.items():
            if buffer.name in step.writes():
                self.decisions.apart[node] = "two kernels would wait for each other"
        raise Retry

    def refusals(self) -> list[Refusal]:
        alone = [(n, why) for n, why in self.decisions.alone.items() if n not in self.decisions.left]
        decided = [*self.decisions.left.items(), *self.decisions.copied.items(), *alone]
        return [Refusal(self.operators(node), reason) for node, reason in [*self.levels.refusals, *decided]]

    def operators(self, node: Node) -> tuple[str, ...]:
        """The operators of the model that gave a node or what it views, else those that it is a step of."""
        origins, steps = self.graph.origins, [node]
        found = origins.get(node) or origins.get(self.levels.base(node), frozenset())
        while not found and steps:
            steps = list(dict.fromkeys(user for step in steps for user in self.levels.users[step]))
            found = frozenset().union(*(origins.get(step, ()) for step in steps))
        return tuple(o.name for o in sorted(found)) or (node.op,)


def _on(node: Node) -> str:
    """The dtypes of what an operator reads, if it reads no floats: products of them, for one, have kernels."""
    dtypes = dict.fromkeys(i.tensor.dtype for i in node.inputs if i.type is not None)
    floats = not dtypes or any(d.is_floating_point for d in dtypes)
    return "" if floats else f" on {', '.join(str(d).removeprefix('torch.') for d in dtypes)}"
