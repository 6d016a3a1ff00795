"""Levels → regions: the expressions and sinks of each kernel, over axes merged as far as strides allow.

Roundings of 16-bit models that only tell where eager stores a value are left out where a kernel computes and reads it.
What lies in memory between two kernels is rounded there, as in eager, and takes half of the bytes.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from fusewright.fusion.expression import (
    Access,
    Accumulator,
    Apply,
    ColumnSum,
    Constant,
    Expression,
    Load,
    Sink,
    Store,
)
from fusewright.fusion.index import (
    Dim,
    Map,
    NeedsSplit,
    NotAffine,
    Space,
    axis_strides,
    result_maps,
    source_map,
    with_splits,
)
from fusewright.fusion.levels import Decisions, Epilogue, Levels
from fusewright.fusion.plan import Buffer, Encode, Encoded, Gemm, Matrix, Region, View
from fusewright.ir.encoding import Halves
from fusewright.ir.graph import VIEWS, Node, Origin, contiguous, is_implicit
from fusewright.ir.size import Size, evaluate_typical, product, same

_COLUMNS = "an operand's view splits the columns of the product"

# A column sum with one column keeps few lanes of a warp busy.
_LONGEST_SUM = 1 << 16


class Retry(Exception):
    """A decision was added; the plan has to be made again."""


def anchor(sink: Node) -> tuple[Node, list[Node]]:
    """The node whose elements a kernel of `sink` runs over, and the views from there to what it sums or packs."""
    if sink.op not in ("sum", "pack_bits"):
        return sink, []
    node, views = sink.inputs[0], list[Node]()
    while node.op in ("reshape", "permute", "cast"):
        if node.op != "cast":
            views.insert(0, node)
        node = node.inputs[0]
    try:
        with_splits(node.tensor.shape, lambda space: result_maps(views, space.identity(), space))
    except NotAffine:
        return sink.inputs[0], []
    return node, views


# Turns (stride of each axis, offset, in bits) into an access of the finished region.
Finish = Callable[[str, Node, dict[int, Size], Size, bool], Access]


@dataclass
class RegionBuilder:
    """Builds the regions of one attempt at a plan."""

    levels: Levels
    decisions: Decisions
    buffers: dict[Node, Buffer]

    def product_region(self, level: int, sinks: Sequence[Node], name: Callable[[Sequence[Origin]], str]) -> Region:
        epilogue = self.levels.epilogues[level]
        while True:
            try:
                return self._product_region(epilogue, sinks, name)
            except NeedsSplit as need:  # of the rows, for an operand that is read through a view
                epilogue.splits(need)

    def _product_region(
        self, epilogue: Epilogue, sinks: Sequence[Node], name: Callable[[Sequence[Origin]], str]
    ) -> Region:
        space, maps = epilogue.space, epilogue.maps
        rows, column = space.leaves(0), space.leaves(1)
        placed = [(s, maps[s.inputs[0] if s.op == "pack_bits" else s]) for s in sinks]
        layout = self._layout(space, [[*rows], [*column]], placed, epilogue.product)
        a, b = (self.matrix(i) for i in epilogue.product.inputs[:2])
        tf32 = dict(epilogue.product.attributes).get("tf32", False)
        gemm = Gemm(a, b, epilogue.product.tensor.dtype, self._encoded(epilogue.product), tf32)
        return self._region(space, layout, placed, epilogue.product, gemm, name)

    def _encoded(self, product_node: Node) -> tuple[Encoded, Encoded] | None:
        operands, encodings = product_node.inputs[:2], product_node.inputs[2:]
        if not encodings:
            return None
        attributes = (product_node.attribute(n) for n in ("planes", "transposed", "by_line"))
        a, b = (
            Encoded(self.buffers[e].name, Halves.of(_turned(o.tensor.shape, t), planes, by_line), t)
            for o, e, planes, t, by_line in zip(operands, encodings, *attributes, strict=True)
        )
        return a, b

    def encode(self, nodes: Sequence[Node], name: str, kept: bool) -> Encode:
        """One step that encodes the inputs of `nodes`."""
        matrices = tuple(self.matrix(n.inputs[0]) for n in nodes)
        for node, matrix in zip(nodes, matrices, strict=True):
            if not same(matrix.stride[1], 1):
                self.decisions.copied[node.inputs[0]] = "halves are made of contiguous lines"
                raise Retry
        results = tuple(
            Encoded(self.buffers[n].name, Halves.of(m.shape, n.attribute("planes"), n.attribute("by_line")))
            for n, m in zip(nodes, matrices, strict=True)
        )
        return Encode(name, matrices, results, kept)

    def pointwise_region(
        self, shape: Sequence[Size], sinks: Sequence[Node], name: Callable[[Sequence[Origin]], str]
    ) -> Region:
        def build(space: Space) -> Region:
            placed = [(s, self._sink_map(s, space)) for s in sinks]
            axes = self._axis_order(space, placed)
            layout = self._layout(space, axes, placed, None)
            return self._region(space, layout, placed, None, None, name)

        return with_splits(shape, build)

    def _sink_map(self, sink: Node, space: Space) -> Map:
        """Sinks of one region have one shape, dimensions of size 1 and the views of sums and masks aside."""
        base, views = anchor(sink)
        wide = [d for d, s in zip(space.identity(), space.sizes, strict=False) if not same(s, 1)]
        dims = tuple(Dim() if same(s, 1) else wide.pop(0) for s in base.tensor.shape)
        return result_maps(views, dims, space)

    def _axis_order(self, space: Space, placed: Sequence[tuple[Node, Map]]) -> list[list[int]]:
        """Axes outermost first as the main store lays them out; with column sums the summed axes come first."""
        main = next((p for p in placed if p[0].op == "pack_bits"), None)
        main = main or max(placed, key=lambda p: len(p[1]) if p[0].op != "sum" else -1)
        strides = {a: float(i) for i, a in enumerate(reversed(space.axes()))}
        if main[0].op != "sum":
            buffer = self.buffers[main[0]]
            stride = _bit_strides(buffer.stride) if main[0].op == "pack_bits" else buffer.stride
            found, _ = axis_strides(main[1], stride, space)
            strides = {a: evaluate_typical(found.get(a, 0)) for a in space.axes()}
        order = sorted(space.axes(), key=lambda a: -strides[a])
        sums = [(s, m) for s, m in placed if s.op == "sum"]
        if not sums:
            # Of a mask of one column each row is a byte.
            return [order, []] if main[0].op == "pack_bits" and not main[1][-1].axes else [order]
        summed = {frozenset(a for d in s.attribute("dims") for a in m[d].axes) for s, m in sums}
        if len(summed) != 1:
            raise self._alone([s for s, _ in sums][1:], "sums of one kernel run over the same dimensions")
        rows = next(iter(summed))
        return [[a for a in order if a in rows], [a for a in order if a not in rows]]

    def _alone(self, nodes: Sequence[Node], reason: str) -> Retry:
        """Sinks get a kernel of their own; those that have one run as ATen."""
        shared = [n for n in nodes if n not in self.decisions.alone]
        if not shared:
            return self._leave(nodes, reason)
        self.decisions.alone.update(dict.fromkeys(shared, reason))
        return Retry()

    def _apart(self, masks: Sequence[Node], reason: str) -> Retry:
        """Masks are packed by a kernel of their own, which in the end reads them as they are to be packed."""
        for node in masks:
            if node in self.decisions.alone:
                self.decisions.copied[node.inputs[0]] = reason
            else:
                self.decisions.alone[node] = reason
        return Retry()

    def _leave(self, nodes: Sequence[Node], reason: str) -> Retry:
        self.decisions.left.update(dict.fromkeys(nodes, reason))
        return Retry()

    def _layout(
        self, space: Space, parts: list[list[int]], placed: Sequence[tuple[Node, Map]], product_node: Node | None
    ) -> _Layout:
        """Merges neighbouring axes of each part wherever every access steps through them evenly."""
        seen: list[dict[int, Size]] = []

        def record(name: str, node: Node, strides: dict[int, Size], offset: Size, bits: bool) -> Access:
            seen.append(strides)
            return Access(name, node.tensor.dtype, (), offset, bits)

        _Expressions(self, space, placed, product_node, record).sinks()
        groups = [_merge(part, space, seen) for part in parts]
        sums = [s for s, _ in placed if s.op == "sum"]
        if len(groups) == 2:  # rows, columns
            rows, columns = groups
            if len(columns) > 1 and product_node is not None:
                self.decisions.whole.add(product_node)
                raise Retry
            if len(columns) > 1:
                raise self._alone(sums, "sums onto dimensions that are not one run of memory")
        else:
            rows, columns = groups[0][:-1], groups[0][-1:]
        if sums and not columns and evaluate_typical(product(space.sizes[a] for g in rows for a in g)) > _LONGEST_SUM:
            raise self._leave(sums, "sums a long vector to one number")
        return _Layout(space, rows, columns)

    def _region(
        self,
        space: Space,
        layout: _Layout,
        placed: Sequence[tuple[Node, Map]],
        product_node: Node | None,
        gemm: Gemm | None,
        name: Callable[[Sequence[Origin]], str],
    ) -> Region:
        expressions = _Expressions(self, space, placed, product_node, layout.access)
        sinks = expressions.sinks()
        scattered = [n for (n, _), s in zip(placed, sinks, strict=True) if s.access.bits and not s.access.in_bytes]
        if any(n.inputs[0] not in self.decisions.copied for n in scattered):
            raise self._apart(scattered, "a mask is packed along the columns of its kernel")
        origins = tuple(sorted(expressions.origins))
        rows = tuple(product(space.sizes[a] for a in group) for group in layout.rows)
        columns = product(space.sizes[a] for group in layout.columns for a in group)
        return Region(name(origins), rows, columns, tuple(sinks), origins, gemm)

    # ---- views of memory

    def matrix(self, node: Node) -> Matrix:
        view = self.view(node)
        return Matrix(view.buffer, node.tensor.dtype, view.shape, view.stride, view.offset)  # type: ignore[arg-type]

    def view(self, node: Node, base: Node | None = None) -> View:
        """`node` as a strided tensor over the buffer that holds it. Asks for a copy of a view that has no strides.

        base: what lies there, where that is read as it was before conversions.
        """
        base = base or self.levels.base(node)
        buffer = self.buffers[base]

        def build(space: Space) -> View:
            strides, offset = self.strides(node, base, space.identity(), space)
            runs = tuple(_run(space, a, strides) for a in range(space.roots))
            # The stride of a single element is free: what torch says it is.
            t = node.tensor
            stride = tuple(s if same(n, 1) else r for n, s, r in zip(t.shape, t.stride, runs, strict=True))
            return View(buffer.name, t.shape, stride, offset)

        try:
            return with_splits(node.tensor.shape, build)
        except NotAffine as error:
            if base.op == "input" and node in self.levels.graph.outputs:  # a view of the argument in eager, too
                while node is not base:
                    self.decisions.left[node] = str(error)
                    node = node.inputs[0]
            else:
                self.decisions.copied[node] = str(error)
            raise Retry() from None

    def strides(self, node: Node, base: Node, dims: Map, space: Space) -> tuple[dict[int, Size], Size]:
        """(stride of each axis, offset) of `node`'s elements in the memory of `base`."""
        while node is not base:
            if self.reshapes_memory(node, base):
                shape = contiguous(node.tensor.shape, node.tensor.dtype, node.tensor.device)
                return axis_strides(dims, shape.stride, space)
            if node.op != "cast":
                dims = source_map(node, dims, space)
            node = node.inputs[0]
        return axis_strides(dims, self.buffers[base].stride, space)

    def reshapes_memory(self, node: Node, base: Node) -> bool:
        """Whether a reshape gives the elements of `base`, converted or not, in the order in which they lie: then it has
        strides, even where it mixes dimensions."""
        if node.op != "reshape":
            return False
        source = node.inputs[0]
        while source is not base and source.op == "cast":
            source = source.inputs[0]
        buffer = self.buffers[base]
        return source is base and buffer.stride == contiguous(buffer.shape, buffer.dtype, buffer.device).stride


@dataclass
class _Layout:
    """Axes merged into row groups and at most one column group, outermost first."""

    space: Space
    rows: list[list[int]]
    columns: list[list[int]]

    def access(self, name: str, node: Node, strides: dict[int, Size], offset: Size, bits: bool) -> Access:
        steps = [strides.get(group[-1], 0) for group in self.rows]
        # A single column may have any stride.
        steps.append(strides.get(self.columns[0][-1], 0) if self.columns else int(bits))
        return Access(name, node.tensor.dtype, tuple(steps), offset, bits)


@dataclass
class _Expressions:
    """The sinks of one region, each distinct (node, index map) one expression."""

    builder: RegionBuilder
    space: Space
    placed: Sequence[tuple[Node, Map]]
    product: Node | None
    finish: Finish
    known: dict[tuple[Node, Map], Expression] = field(default_factory=dict)
    # Of what is computed here and rounded as eager stores it, and of its views: what it was before.
    unrounded: dict[tuple[Node, Map], Expression] = field(default_factory=dict)
    origins: set[Origin] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.levels = self.builder.levels
        self.inside = {node for node, _ in self.placed}

    def sinks(self) -> list[Sink]:
        result: list[Sink] = []
        for node, dims in self.placed:
            self.note(node)
            if node.op == "sum":
                stored = self.levels.stored_as.get(node, node)
                self.note(stored)
                kept = tuple(d for i, d in enumerate(dims) if i not in node.attribute("dims"))
                access = self.access(stored, stored, kept)
                result.append(ColumnSum(self.build(node.inputs[0], dims), access))
            elif node.op == "pack_bits":
                result.append(Store(self.build(node.inputs[0], dims), self.access(node, node, dims, bits=True)))
            else:
                result.append(Store(self.build(node, dims), self.access(node, node, dims)))
        return result

    def note(self, node: Node) -> None:
        self.origins |= self.levels.graph.origins.get(node, frozenset())

    def access(self, node: Node, base: Node, dims: Map, bits: bool = False) -> Access:
        buffer = self.builder.buffers[base]
        if bits:
            strides, offset = axis_strides(dims, _bit_strides(buffer.stride), self.space)
        else:
            strides, offset = self.builder.strides(node, base, dims, self.space)
        return self.finish(buffer.name, base, strides, offset, bits)

    def build(self, node: Node, dims: Map) -> Expression:
        """The expression of `node` at the index `dims`. Iterative: chains can be long."""
        root = (node, dims)
        stack = [root]
        while stack:
            key = stack[-1]
            if key in self.known:
                stack.pop()
                continue
            result = self.leaf(*key)
            if result is None:
                operands = self.operands(*key)
                missing = [o for o in operands if o not in self.known]
                if missing:
                    stack += reversed(missing)
                    continue
                result = self.combine(*key, operands)
            self.known[key] = result
            stack.pop()
        return self.known[root]

    def leaf(self, node: Node, dims: Map) -> Expression | None:
        """The expression of a node that is not computed from others here."""
        if node is self.product:
            if dims != self.space.identity():
                raise NotAffine("the product is read at two different indices")
            self.note(node)
            return Accumulator(node.tensor.dtype)
        if node.op == "constant":
            return Constant(node.attribute("value"), node.tensor.dtype)
        base = self.levels.base(node)
        if self.levels.has_memory(base) and base not in self.inside:
            return self.load(node, base, dims)
        base = self.levels.unconverted(base)
        if self.levels.has_memory(base) and base not in self.inside and self.builder.reshapes_memory(node, base):
            read = Load(self.access(node, base, dims), base.tensor.dtype)
            return read if read.dtype == node.tensor.dtype else Apply("cast", (read,), node.tensor.dtype)
        if node.op == "unpack_bits":
            return Load(self.access(node, node.inputs[0], dims, bits=True), node.tensor.dtype)
        return None

    def operands(self, node: Node, dims: Map) -> list[tuple[Node, Map]]:
        if node.op in VIEWS:
            return [self.through(node, dims)]
        return [(i, dims if i.op != "constant" else ()) for i in node.inputs]

    def combine(self, node: Node, dims: Map, sources: Sequence[tuple[Node, Map]]) -> Expression:
        operands = tuple(self.known[s] for s in sources)
        if node.op in VIEWS:
            if sources[0] in self.unrounded:
                self.unrounded[node, dims] = self.unrounded[sources[0]]
            return operands[0]
        if node.op == "cast":
            before = self.unrounded.get(sources[0])
            if before is not None and before.dtype == node.tensor.dtype:
                return before
            if is_implicit(node) and node.tensor.dtype in (torch.float16, torch.bfloat16):
                self.unrounded[node, dims] = operands[0]
        self.note(node)
        origin = tuple(o.name for o in sorted(self.levels.graph.origins.get(node, ())))
        return Apply(node.op, operands, node.tensor.dtype, origin)

    def load(self, node: Node, base: Node, dims: Map) -> Expression:
        try:
            return Load(self.access(node, base, dims), node.tensor.dtype)
        except NotAffine as error:
            self.builder.decisions.left[node] = str(error)
            raise Retry() from None
        except NeedsSplit as need:
            if not self.takes_columns_apart(need):
                raise
            self.builder.decisions.copied[node] = _COLUMNS
            raise Retry() from None

    def through(self, view: Node, dims: Map) -> tuple[Node, Map]:
        try:
            return view.inputs[0], source_map(view, dims, self.space)
        except NotAffine as error:
            reason = str(error)
        except NeedsSplit as need:
            if not self.takes_columns_apart(need):
                raise
            reason = _COLUMNS
        decisions, base = self.builder.decisions, self.levels.unconverted(view.inputs[0])
        if self.levels.has_memory(base):  # and still it cannot be read so
            decisions.left[view] = reason
        else:
            decisions.apart[base] = reason
        raise Retry()

    def takes_columns_apart(self, need: NeedsSplit) -> bool:
        """A thread of a product finishes consecutive columns: where their parts are no run of memory, none are made."""
        return self.product in self.builder.decisions.whole and need.axis == 1


def _merge(axes: Sequence[int], space: Space, accesses: Sequence[dict[int, Size]]) -> list[list[int]]:
    groups: list[list[int]] = []
    for axis in axes:
        if groups and all(
            same(strides.get(groups[-1][-1], 0), strides.get(axis, 0) * space.sizes[axis]) for strides in accesses
        ):
            groups[-1].append(axis)
        else:
            groups.append([axis])
    return groups


def _run(space: Space, axis: int, strides: dict[int, Size]) -> Size:
    """The one stride of a dimension that may be split. Raises NotAffine if its parts do not step evenly."""
    leaves = space.leaves(axis)
    for outer, inner in itertools.pairwise(leaves):
        if not same(strides.get(outer, 0), strides.get(inner, 0) * space.sizes[inner]):
            raise NotAffine("a dimension is not one run of memory")
    return strides.get(leaves[-1], 0) if leaves else 0


def _turned(shape: Sequence[Size], transposed: bool) -> Sequence[Size]:
    return shape[::-1] if transposed else shape


def _bit_strides(stride: Sequence[Size]) -> tuple[Size, ...]:
    """Strides in bits of a boolean tensor packed along its last dimension, from those of the packed bytes."""
    return (*(8 * s for s in stride[:-1]), 1)
