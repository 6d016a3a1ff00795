"""The graph that every pass reads and returns: hash-consed nodes with symbolic shape, stride and dtype.

Node kinds (`Node.op`):

| op | inputs | attributes | meaning |
|---|---|---|---|
| input | | index | a tensor argument of the graph |
| size | | value | a size argument or a size computed from them |
| constant | | value | one scalar, broadcast to whatever reads it |
| a primitive of `ir.primitives` | same shape each, or constants | implicit (cast only) | applied to each element |
| reshape, permute, expand, slice | one | shape; dims; shape; dim, start, step | an index map, never a copy |
| matmul | [M, K], [K, N] | tf32 (if it may be) | [M, N], in the accumulator's dtype; floats may be rounded to TF32 |
| matmul | also an encoding of each | planes, transposed, by_line | the same; of a, b: its, whether turned beside it |
| encode | float32 [lines, length], lines contiguous | planes, by_line | its fp16 halves in one buffer (`ir.encoding`) |
| sum | one | dims | sum over `dims`, which are removed; in the accumulator's dtype |
| pack_bits, unpack_bits | one | columns | a boolean tensor as one bit an element, rows padded to bytes; and back |
| aten | any | target, args, kwargs | an operator that fusewright does not take apart |
| item | aten | index | one of several results |
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch

from fusewright.ir.size import Size, evaluate_typical, product, same

VIEWS = frozenset({"reshape", "permute", "expand", "slice"})


@dataclass(frozen=True)
class TensorType:
    """Shape and strides in elements, dtype and device of a dense value."""

    shape: tuple[Size, ...]
    stride: tuple[Size, ...]
    dtype: torch.dtype
    device: torch.device

    @property
    def numel(self) -> Size:
        return product(self.shape)

    @property
    def dense(self) -> bool:
        """Whether strides are those of some order of the dimensions, without gaps or overlap."""
        expected: Size = 1
        dims = [(s, n) for s, n in zip(self.stride, self.shape, strict=True) if not same(n, 1)]
        for s, n in sorted(dims, key=lambda d: evaluate_typical(d[0])):
            if not same(s, expected):
                return False
            expected = expected * n
        return True

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')}[{', '.join(map(str, self.shape))}]"


def same_layout(a: TensorType, b: TensorType) -> bool:
    """Whether two tensors of one shape have the same strides, wherever these matter."""
    return all(same(s, t) for n, s, t in zip(a.shape, a.stride, b.stride, strict=True) if not same(n, 1))


@dataclass(frozen=True, eq=False)
class Node:
    """One value. Nodes of one `Builder` with equal op, inputs, attributes and type are the same object.

    type is None for sizes, for values that eager gives no tensor for, and for an `aten` node with several results.
    """

    op: str
    inputs: tuple[Node, ...]
    attributes: tuple[tuple[str, Any], ...]
    type: TensorType | None

    def attribute(self, name: str) -> Any:
        return dict(self.attributes)[name]

    def __repr__(self) -> str:
        # Without its inputs: a DAG written out as a tree is exponentially long.
        return f"<{self.op}: {self.type}>"

    @property
    def tensor(self) -> TensorType:
        assert self.type is not None, f"{self.op} is not a tensor"
        return self.type


@dataclass(frozen=True, order=True)
class Origin:
    """One operator call of the user's model that eager would launch: its place, name, and the bytes it moves.

    checkpoint: the number of the activation checkpoint that it belongs to: backward is to compute it again.
    call: Dynamo's name of the call that it is part of, if Dynamo traced it: each call has another.
    """

    index: int
    name: str
    bytes: Size = field(compare=False)
    checkpoint: int | None = field(default=None, compare=False)
    call: str | None = field(default=None, compare=False)


Output = Node | None


@dataclass(frozen=True)
class Graph:
    """Inputs in call order, outputs in return order (None where eager returns None).

    origins: for a node, the operator calls of the user's model whose result it is.
    """

    inputs: tuple[Node, ...]
    outputs: tuple[Output, ...]
    origins: Mapping[Node, frozenset[Origin]] = field(default_factory=dict, repr=False)

    def nodes(self) -> list[Node]:
        """Every node that an output needs, and every input, inputs before users."""
        order: dict[Node, None] = dict.fromkeys(self.inputs)
        for output in self.outputs:
            if output is not None:
                for node in postorder(output, order):
                    order[node] = None
        return list(order)

    def users(self) -> dict[Node, list[Node]]:
        users: dict[Node, list[Node]] = {node: [] for node in self.nodes()}
        for node in users:
            for source in dict.fromkeys(node.inputs):
                users[source].append(node)
        return users

    def __str__(self) -> str:
        names = {node: f"%{i}" for i, node in enumerate(self.nodes())}
        lines = []
        for node, name in names.items():
            attributes = "".join(f", {k}={v}" for k, v in node.attributes)
            arguments = ", ".join(names[i] for i in node.inputs)
            lines.append(f"{name} = {node.op}({arguments}{attributes})  # {node.type}")
        returned = ", ".join("None" if o is None else names[o] for o in self.outputs)
        return "\n".join([*lines, f"return {returned}"])


def postorder(root: Node, known: Mapping[Node, Any]) -> Iterator[Node]:
    """Yields the nodes under `root` that are not in `known`, inputs first. Iterative: graphs can be deep."""
    stack: list[tuple[Node, Iterator[Node]]] = []
    seen: set[Node] = set()
    if root not in known:
        stack.append((root, iter(root.inputs)))
        seen.add(root)
    while stack:
        node, pending = stack[-1]
        child = next((c for c in pending if c not in known and c not in seen), None)
        if child is None:
            yield node
            stack.pop()
        else:
            seen.add(child)
            stack.append((child, iter(child.inputs)))


@dataclass(frozen=True)
class Operand:
    """Stands for input `index` of an `aten` node inside its argument template."""

    index: int


def base_of(node: Node) -> Node:
    """The node whose memory a chain of views reads."""
    while node.op in VIEWS:
        node = node.inputs[0]
    return node


def is_implicit(node: Node) -> bool:
    """Whether a node only converts to what eager stores or computes in."""
    return node.op == "cast" and bool(node.attribute("implicit"))


def untransposed(node: Node) -> tuple[Node, bool]:
    """The matrix below a chain of transpositions, and whether `node` is its transpose."""
    turned = False
    while node.op == "permute" and len(node.tensor.shape) == 2:
        turned ^= node.attribute("dims") == (1, 0)
        node = node.inputs[0]
    return node, turned


class Builder:
    """Makes nodes, each distinct value once. made: every node so far, in the order of making."""

    def __init__(self) -> None:
        self._nodes: dict[Any, Node] = {}
        self.made: list[Node] = []

    def node(
        self,
        op: str,
        inputs: Sequence[Node] = (),
        type: TensorType | None = None,
        **attributes: Any,
    ) -> Node:
        items = tuple(sorted(attributes.items()))
        key = (op, tuple(inputs), tuple((k, _distinct(v)) for k, v in items), type)
        found = self._nodes.get(key)
        if found is None:
            found = self._nodes[key] = Node(op, tuple(inputs), items, type)
            self.made.append(found)
        return found

    def constant(self, value: Any, dtype: torch.dtype, device: torch.device) -> Node:
        if isinstance(value, sympy.Expr) and value.is_Integer:
            value = int(value)
        if isinstance(value, float) and math.isfinite(value) and not dtype.is_floating_point and dtype != torch.bool:
            value = int(value)
        return self.node("constant", (), TensorType((), (), dtype, device), value=value)

    def cast(self, x: Node, dtype: torch.dtype, *, implicit: bool) -> Node:
        """Converts to `dtype`. implicit: the rounding only models where eager would store; it may be left out."""
        if x.tensor.dtype == dtype:
            return x
        if x.op == "constant":
            return self.constant(x.attribute("value"), dtype, x.tensor.device)
        t = x.tensor
        return self.node("cast", (x,), TensorType(t.shape, t.stride, dtype, t.device), implicit=implicit)

    def view(self, op: str, x: Node, type: TensorType, **attributes: Any) -> Node:
        """A view node, or `x` itself where the view changes nothing."""
        if op != "permute" and type.shape == x.tensor.shape:
            return x
        if op == "permute" and attributes["dims"] == tuple(range(len(type.shape))):
            return x
        return self.node(op, (x,), type, **attributes)

    def reshape(self, x: Node, shape: Sequence[Size]) -> Node:
        t = x.tensor
        return self.view("reshape", x, contiguous(shape, t.dtype, t.device), shape=tuple(shape))

    def permute(self, x: Node, dims: Sequence[int]) -> Node:
        t = x.tensor
        dims = tuple(d % len(t.shape) for d in dims)
        moved = TensorType(tuple(t.shape[d] for d in dims), tuple(t.stride[d] for d in dims), t.dtype, t.device)
        return self.view("permute", x, moved, dims=dims)

    def expand(self, x: Node, shape: Sequence[Size]) -> Node:
        t = x.tensor
        lead = len(shape) - len(t.shape)
        stride: list[Size] = [0] * lead
        stride += [
            s if same(old, new) else 0 for s, old, new in zip(t.stride, t.shape, list(shape)[lead:], strict=True)
        ]
        return self.view("expand", x, TensorType(tuple(shape), tuple(stride), t.dtype, t.device), shape=tuple(shape))


def _distinct(value: Any) -> Any:
    """A key under which 1, 1.0, True, 0.0 and -0.0 are different and NaN equals itself."""
    if isinstance(value, (bool, int, float)):
        return (type(value).__name__, repr(value))
    return value


def contiguous(shape: Iterable[Size], dtype: torch.dtype, device: torch.device) -> TensorType:
    """The row-major type of `shape`."""
    shape = tuple(shape)
    stride: list[Size] = []
    step: Size = 1
    for size in reversed(shape):
        stride.append(step)
        step = step * size
    return TensorType(shape, tuple(reversed(stride)), dtype, device)


def substitute(graph: Graph, sizes: Mapping[sympy.Symbol, Size]) -> Graph:
    """The same graph with size symbols replaced, in types and attributes."""

    def replace(value: Any) -> Any:
        if isinstance(value, sympy.Expr):
            result = value.xreplace(dict(sizes))
            return int(result) if result.is_Integer else result
        if isinstance(value, tuple):
            return tuple(replace(v) for v in value)
        if isinstance(value, TensorType):
            return TensorType(replace(value.shape), replace(value.stride), value.dtype, value.device)
        return value

    builder = Builder()
    new: dict[Node, Node] = {}
    for node in graph.nodes():
        attributes = {k: replace(v) for k, v in node.attributes}
        new[node] = builder.node(node.op, [new[i] for i in node.inputs], replace(node.type), **attributes)
    outputs = tuple(None if o is None else new[o] for o in graph.outputs)
    origins = {
        new[n]: frozenset(dataclasses.replace(o, bytes=replace(o.bytes)) for o in found)
        for n, found in graph.origins.items()
        if n in new
    }
    return Graph(tuple(new[i] for i in graph.inputs), outputs, origins)


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which values of `dtype` are summed and chains are computed: float32 for 16-bit floats."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
