"""The two pictures of a graph in a report: the model's operators, and the kernels that they became."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import sympy
import torch

from fusewright.fusion.plan import Fallback, FusionPlan, Step, View
from fusewright.ir.graph import Node, Origin, TensorType
from fusewright.ir.size import Size, evaluate
from fusewright.tools.layered import Layout, Place, layered
from fusewright.tools.planned import Planned

Sizes = Mapping[sympy.Symbol, int]

# Pixels of a box: a character of the 12-pixel monospaced type, a line, and what is left free.
_CHARACTER, _LINE, _PADDING = 7.25, 17.0, 9.0
_LONGEST = 30  # characters of a line
_SHORT = {torch.float16: "f16", torch.bfloat16: "bf16", torch.float32: "f32", torch.float64: "f64"}


@dataclass(frozen=True)
class Box:
    """kind: "input", "result", "operator", "kernel" or "aten". marks: the numbers of the kernels that it belongs to.

    lines: what it shows; title: the same in full. href: where a click leads.
    """

    kind: str
    lines: tuple[str, ...]
    title: str
    place: Place
    marks: tuple[int, ...] = ()
    href: str = ""


@dataclass(frozen=True)
class Picture:
    """boxes and the SVG paths of edges (path, title), in pixels. description: the same in words."""

    width: float
    height: float
    boxes: tuple[Box, ...]
    edges: tuple[tuple[str, str], ...]
    description: str


@dataclass(frozen=True)
class _Draft:
    kind: str
    lines: tuple[str, ...]
    marks: tuple[int, ...] = ()
    href: str = ""

    @property
    def size(self) -> tuple[float, float]:
        longest = max(len(line) + (3 if i == 0 else 0) * len(self.marks) for i, line in enumerate(self.shown))
        return longest * _CHARACTER + 2 * _PADDING, len(self.lines) * _LINE + _PADDING

    @property
    def shown(self) -> tuple[str, ...]:
        return tuple(line if len(line) <= _LONGEST else line[: _LONGEST - 1] + "…" for line in self.lines)


def short_type(dtype: torch.dtype, shape: Sequence[Size], sizes: Sizes) -> str:
    """Such as "f32[24, 20]", as torch's own graphs have it."""
    name = _SHORT.get(dtype, str(dtype).removeprefix("torch."))
    return f"{name}{[int(evaluate(n, sizes)) for n in shape]}"


def type_name(dtype: torch.dtype, shape: Sequence[Size], sizes: Sizes) -> str:
    """Such as "float32 [24, 20]"."""
    return f"{str(dtype).removeprefix('torch.')} {[int(evaluate(n, sizes)) for n in shape]}"


def operators(planned: Planned, results: Sequence[str], links: str) -> Picture:
    """The operators that eager would launch. results: a name for each of the graph's outputs, "" for none.

    links: what the address of a kernel's part of the page starts with; its number follows.
    """
    graph, sizes = planned.graph, planned.sizes
    numbers = step_numbers(planned.plan)
    drafts: dict[Hashable, _Draft] = {}
    edges: dict[tuple[Hashable, Hashable], str] = {}
    names = dict(zip(graph.inputs, planned.plan.inputs, strict=True))
    users = graph.users()
    # The operators or inputs whose values a node's are made of, in order: the same page each time.
    made_by: dict[Node, tuple[Hashable, ...]] = {}
    for node in graph.nodes():
        below = tuple(dict.fromkeys(key for i in node.inputs for key in made_by[i]))
        if node.op == "input" and isinstance(names[node], str):
            drafts[node] = _Draft("input", (str(names[node]), _typed(node.type, sizes)))
            made_by[node] = (node,)
        elif origins := graph.origins.get(node):
            made_by[node] = tuple(sorted(origins))
            for origin in sorted(origins):
                drafts[origin] = _operator(origin, _stored(node, users), planned, numbers, links)
                edges.update({(source, origin): "" for source in below if source not in origins})
        else:
            made_by[node] = below
    _add_results(drafts, edges, [made_by[o] if o is not None else () for o in graph.outputs], results)
    return _picture(drafts, edges)


def _stored(node: Node, users: Mapping[Node, Sequence[Node]]) -> Node:
    """The rounding to what eager stores, where a value is computed in a wider type."""
    return next((u for u in users[node] if u.op == "cast" and u.attribute("implicit")), node)


def _operator(origin: Origin, node: Node, planned: Planned, numbers: Sequence[tuple[int, Step]], links: str) -> _Draft:
    marks = tuple(n for n, step in numbers if origin in step.origins)
    href = f"{links}{marks[0]}" if marks else ""
    return _Draft("operator", (origin.name, _typed(node.type, planned.sizes)), marks, href)


def _typed(type: TensorType | None, sizes: Sizes) -> str:
    return "several results" if type is None else short_type(type.dtype, type.shape, sizes)


def kernels(planned: Planned, families: Mapping[int, str], results: Sequence[str], links: str) -> Picture:
    """The steps of the plan. families: by a step's number, which kernel family computes it."""
    plan, sizes = planned.plan, planned.sizes
    drafts: dict[Hashable, _Draft] = {}
    edges: dict[tuple[Hashable, Hashable], str] = {}
    writer: dict[str, Hashable] = {}
    numbers = step_numbers(plan)
    read = {name for _, step in numbers for name in step.reads()}
    outputs = [o.buffer if isinstance(o, View) else None for o in plan.outputs]
    for name in plan.inputs:
        if isinstance(name, str) and (name in read or name in outputs):
            buffer = plan.buffers[name]
            drafts[name] = _Draft("input", (name, short_type(buffer.dtype, buffer.shape, sizes)))
            writer[name] = name
    for number, step in numbers:
        names = ", ".join(step.operators) or "copy"
        kind = "aten" if isinstance(step, Fallback) else "kernel"
        draft = _Draft(
            kind, (names, families.get(number, "ATen" if kind == "aten" else "")), (number,), f"{links}{number}"
        )
        drafts[number] = draft
        for name in dict.fromkeys(step.reads()):
            if name in writer:
                edges[writer[name], number] = _carried(plan, name, sizes)
        writer.update(dict.fromkeys(step.writes(), number))
    made_by = [(writer[o],) if o in writer else () for o in outputs]
    _add_results(drafts, edges, made_by, results)
    return _picture(drafts, edges)


def step_numbers(plan: FusionPlan) -> list[tuple[int, Step]]:
    """Every step with the number that the page gives it."""
    return list(enumerate(plan.steps, 1))


def _carried(plan: FusionPlan, name: str, sizes: Sizes) -> str:
    buffer = plan.buffers[name]
    return f"{name}: {type_name(buffer.dtype, buffer.shape, sizes)}"


def _add_results(
    drafts: dict[Hashable, _Draft],
    edges: dict[tuple[Hashable, Hashable], str],
    made_by: Sequence[Sequence[Hashable]],
    names: Sequence[str],
) -> None:
    for place, (sources, name) in enumerate(zip(made_by, names, strict=True)):
        if name:
            key = ("result", place)
            drafts[key] = _Draft("result", (name,))
            edges.update({(source, key): name for source in sources})


def _picture(drafts: Mapping[Hashable, _Draft], edges: Mapping[tuple[Hashable, Hashable], str]) -> Picture:
    used = {key for edge in edges for key in edge}
    kept = {key: draft for key, draft in drafts.items() if key in used or draft.kind != "input"}
    layout = layered({key: draft.size for key, draft in kept.items()}, list(edges))
    boxes = tuple(
        Box(d.kind, d.shown, "\n".join(d.lines), layout.places[key], d.marks, d.href) for key, d in kept.items()
    )
    return Picture(layout.width, layout.height, boxes, _paths(layout, edges), _words(kept, edges))


def _paths(layout: Layout, edges: Mapping[tuple[Hashable, Hashable], str]) -> tuple[tuple[str, str], ...]:
    return tuple((route.path, edges[route.source, route.target]) for route in layout.routes)


def _words(drafts: Mapping[Hashable, _Draft], edges: Iterable[tuple[Hashable, Hashable]]) -> str:
    """What a screen reader says in the picture's place."""
    sources: dict[Hashable, list[str]] = {}
    for source, target in edges:
        sources.setdefault(target, []).append(drafts[source].lines[0])
    return "; ".join(
        f"{draft.lines[0]} from {', '.join(sources[key])}" for key, draft in drafts.items() if key in sources
    )
