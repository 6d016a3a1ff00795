"""The format stage: which float32 matrices are split into fp16 halves for the tensor cores, for a graph as a whole.

A split is shared: that of x, W or an incoming gradient serves every product that reads the matrix, either way round.
So products and splits are chosen together. Each product saves time if both of its operands are split, each split costs
time once, and what is to be gained most from is a closure problem: a minimum cut between products and splits (Picard,
"Maximal Closure of a Graph and Applications to Combinatorial Problems", 1976). A product may also round its right
operand in registers and do without that split: the edge between the two has for its capacity what this costs. And
where TF32's precision is allowed and lines run along K, one that reads no halves may read floats as they lie.

Then it is known which way round each split is read. Where all its products sum along its lines, as in inference, each
line has its own exponent: a product undoes exponents of its rows and columns, but none that change within a sum.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import networkx
import torch

from fusewright.ir.encoding import Halves
from fusewright.ir.graph import Builder, Graph, Node, Origin, base_of, untransposed
from fusewright.ir.rules import check
from fusewright.ir.size import divides, evaluate_typical, same

_ALIGNMENTS = (128, 64, 32, 16)  # bytes, by which copies differ


class Capabilities(Protocol):
    """What kernels can do on a chip, as far as this stage must know."""

    @property
    def tf32(self) -> bool:
        """Whether TF32's precision is allowed."""

    @property
    def planes(self) -> int:
        """Of a split: 2 for float32's precision, 1 where TF32's is allowed."""

    def gain(self, m: float, n: float, k: float, direct: int) -> float:
        """Seconds that a product of m × k by k × n saves where its operands are split; negative where it loses. direct:
        bytes that the lines of both, which run along K, lie at multiples of; 0 where kernels cannot read both so."""

    def registers(self, m: float, n: float, k: float) -> float:
        """Seconds more that it takes where it rounds its right operand in registers; infinite where it cannot."""

    def split(self, elements: float) -> float:
        """Seconds that splitting a matrix takes."""


@dataclass(frozen=True)
class Operand:
    """A product's operand by the matrix that is split: `source`, lines contiguous; turned: it is the transpose."""

    source: Node
    flipped: bool  # the split matrix is itself the transpose of `source`
    turned: bool

    def along_k(self, left: bool) -> bool:
        """Whether a product of which it is the left operand, or else the right one, sums along its lines."""
        return self.turned != left

    @property
    def alignment(self) -> int:
        """Bytes that its lines lie at multiples of: 128 to 16, or 0 where a kernel cannot read the matrix itself."""
        stride = self.source.tensor.stride[1 if self.flipped else 0] * self.source.tensor.dtype.itemsize
        return next((bytes for bytes in _ALIGNMENTS if divides(bytes, stride) is not None), 0)

    @property
    def copied_in_bulk(self) -> bool:
        return self.alignment > 0


def encode_operands(graph: Graph, capabilities: Capabilities, kept: Iterable[Node] = ()) -> Graph:
    """Gives products encodings of their operands wherever that pays. kept: inputs whose splits cost nothing here."""
    products = {node: found for node in graph.nodes() if (found := _operands(node)) is not None}
    chosen = _choose(products, capabilities, set(kept))
    as_they_lie = {n for n, o in products.items() if capabilities.tf32 and n not in chosen and _common_alignment(*o)}
    return _rebuild(graph, products, chosen, as_they_lie, capabilities.planes) if chosen or as_they_lie else graph


def _common_alignment(a: Operand, b: Operand) -> int:
    """Bytes that the lines of both operands lie at multiples of, as far as copies care, where they run along K; else 0,
    as where copies do not take them."""
    return min(a.alignment, b.alignment) if b.turned and not a.turned else 0


def _operands(node: Node) -> tuple[Operand, Operand] | None:
    """The operands of a float32 product that could be split; None for any other node."""
    if node.op != "matmul" or len(node.inputs) != 2 or any(i.tensor.dtype != torch.float32 for i in node.inputs):
        return None
    a, b = (_operand(i) for i in node.inputs)
    return None if a is None or b is None else (a, b)


def _operand(node: Node) -> Operand | None:
    source, turned = untransposed(node)
    sizes, (outer, inner) = source.tensor.shape, source.tensor.stride
    if any(same(s, 1) or same(step, 0) for s, step in zip(sizes, (outer, inner), strict=True)):
        return None  # a vector, or a broadcast one
    if same(inner, 1):
        return Operand(source, False, turned)
    return Operand(source, True, not turned) if same(outer, 1) else None


def _choose(
    products: dict[Node, tuple[Operand, Operand]], capabilities: Capabilities, kept: set[Node]
) -> dict[Node, bool]:
    """The products that read encodings, and whether the right operand is split too."""
    network = networkx.DiGraph()
    network.add_nodes_from(("source", "sink"))
    for node, operands in products.items():
        (m, k), n = node.inputs[0].tensor.shape, node.inputs[1].tensor.shape[1]
        sizes = [evaluate_typical(s) for s in (m, n, k)]
        a, b = operands
        gain = capabilities.gain(sizes[0], sizes[1], sizes[2], _common_alignment(a, b))
        if gain <= 0:
            continue
        network.add_edge("source", node, capacity=gain)
        alone = capabilities.registers(*sizes) if b.copied_in_bulk and a.source is not b.source else math.inf
        for operand, otherwise in ((b, alone), (a, math.inf)):
            split = ("split", operand.source)
            free = base_of(operand.source) in kept
            cost = 0.0 if free else capabilities.split(evaluate_typical(operand.source.tensor.numel))
            network.add_edge(node, split, capacity=otherwise)
            network.add_edge(split, "sink", capacity=cost)
    _, (gaining, _) = networkx.minimum_cut(network, "source", "sink")
    return {node: ("split", b.source) in gaining for node, (_, b) in products.items() if node in gaining}


def _by_line(products: dict[Node, tuple[Operand, Operand]], chosen: dict[Node, bool]) -> set[Node]:
    """The sources whose planes are read along their lines alone."""
    read: set[Node] = set()
    across: set[Node] = set()
    for node, right in chosen.items():
        a, b = products[node]
        for operand, left in ((a, True), (b, False)) if right else ((a, True),):
            read.add(operand.source)
            if not operand.along_k(left):
                across.add(operand.source)
    return read - across


def _rebuild(
    graph: Graph,
    products: dict[Node, tuple[Operand, Operand]],
    chosen: dict[Node, bool],
    as_they_lie: set[Node],
    planes: int,
) -> Graph:
    builder = Builder()
    new: dict[Node, Node] = {}
    origins: dict[Node, frozenset[Origin]] = {}
    lines = _by_line(products, chosen)
    for node in graph.nodes():
        inputs, attributes = [new[i] for i in node.inputs], dict(node.attributes)
        if node in chosen:
            operands, own = products[node], (planes, planes if chosen[node] else 0)
            by_line = tuple(p > 0 and o.source in lines for o, p in zip(operands, own, strict=True))
            inputs += [
                _encoding(builder, new[o.source], o.flipped, p, by)
                for o, p, by in zip(operands, own, by_line, strict=True)
            ]
            attributes = {"planes": own, "transposed": tuple(o.turned for o in operands), "by_line": by_line}
        elif node in as_they_lie:
            attributes = {"tf32": True}
        new[node] = builder.node(node.op, inputs, node.type, **attributes)
        if node in graph.origins:
            origins[new[node]] = graph.origins[node]
    outputs = tuple(None if o is None else new[o] for o in graph.outputs)
    encoded = Graph(tuple(new[i] for i in graph.inputs), outputs, origins)
    check(encoded)
    return encoded


def _encoding(builder: Builder, source: Node, flipped: bool, planes: int, by_line: bool) -> Node:
    matrix = builder.permute(source, (1, 0)) if flipped else source
    t = matrix.tensor
    words = Halves.of(t.shape, planes, by_line).type(t.device)
    return builder.node("encode", (matrix,), words, planes=planes, by_line=by_line)
