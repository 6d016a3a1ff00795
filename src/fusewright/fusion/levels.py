"""Which operators may share a kernel.

Every value gets a level. A matrix product opens a level, and the pointwise operators that follow it join the highest
level among their operands, so the levels are a linear order that no kernel's inputs can break: a kernel at a level
reads values of lower levels only. Level -1 holds what depends on the graph's inputs alone; such values are recomputed
in every kernel that reads them unless they have memory anyway.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field

from fusewright.fusion.index import Map, NeedsSplit, NotAffine, Space, result_map
from fusewright.ir.graph import VIEWS, Graph, Node, base_of, is_implicit
from fusewright.ir.primitives import is_pointwise
from fusewright.ir.size import evaluate_typical

# Longer chains are cut: registers and compile time grow with a kernel's expression.
LONGEST_CHAIN = 200

FREE = -1


def products_last(nodes: Sequence[Node]) -> list[Node]:
    """`nodes`, inputs before users, each product only when nothing else can be placed.

    So whatever else an epilogue reads has a level below its product's, and the epilogue of one product ends before
    the next product begins. Otherwise the order is kept.
    """
    waiting = {node: len(set(node.inputs)) for node in nodes}
    users: dict[Node, list[Node]] = {node: [] for node in nodes}
    for node in nodes:
        for source in set(node.inputs):
            users[source].append(node)
    place = {node: i for i, node in enumerate(nodes)}
    ready = [(node.op == "matmul", place[node], node) for node in nodes if not node.inputs]
    order = []
    while ready:
        *_, node = heapq.heappop(ready)
        order.append(node)
        for user in users[node]:
            waiting[user] -= 1
            if not waiting[user]:
                heapq.heappush(ready, (user.op == "matmul", place[user], user))
    return order


@dataclass
class Decisions:
    """What earlier attempts at a plan found impossible; each attempt that fails adds one and starts again.

    left: nodes that run by their reference, and why. copied: views that get memory of their own.
    apart: pointwise nodes that get memory, and whose readers start a kernel of their own, and why.
    alone: sums and packed masks that get a kernel of their own, which reads its operand from memory, and why.
    whole: products whose columns no view may split.
    """

    left: dict[Node, str] = field(default_factory=dict)
    copied: dict[Node, str] = field(default_factory=dict)
    apart: dict[Node, str] = field(default_factory=dict)
    alone: dict[Node, str] = field(default_factory=dict)
    whole: set[Node] = field(default_factory=set)

    def count(self) -> int:
        return sum(len(d) for d in (self.left, self.copied, self.apart, self.alone, self.whole))


@dataclass
class Epilogue:
    """The nodes that are computed with one product, and the index map of each over the product's M × N space."""

    product: Node
    space: Space
    whole: bool
    members: list[Node] = field(default_factory=list)
    maps: dict[Node, Map] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.maps[self.product] = self.space.identity()

    def admit(self, node: Node) -> None:
        """Adds a view or pointwise node. Raises NotAffine if it does not follow the product element by element."""
        while True:
            try:
                self.maps[node] = self._map(node)
            except NeedsSplit as need:
                if not self.splits(need):
                    raise NotAffine("a view splits the columns of the product") from None
            else:
                self.members.append(node)
                return

    def splits(self, need: NeedsSplit) -> bool:
        """Builds the space again with an axis split; False if it is that of N, and the columns have to stay whole."""
        if need.axis == 1 and self.whole:
            return False
        self.space = self.space.split(need.axis, need.outer, need.inner)
        self.maps = {self.product: self.space.identity()}
        for member in self.members:
            self.maps[member] = self._map(member)
        return True

    def _map(self, node: Node) -> Map:
        if node.op in VIEWS:
            return result_map(node, self.maps[node.inputs[0]], self.space)
        maps = {self.maps[i] for i in node.inputs if i in self.maps}
        if len(maps) != 1:
            raise NotAffine("the product is read at two different indices")
        return maps.pop()


class Levels:
    """The level of every node of a graph, which nodes have memory, and where each sink is computed."""

    def __init__(self, graph: Graph, decisions: Decisions) -> None:
        self.graph = graph
        self.decisions = decisions
        self.users = graph.users()
        self.level: dict[Node, int] = {}
        self.depth: dict[Node, int] = {}
        self.materialised: set[Node] = set()
        self.epilogues: dict[int, Epilogue] = {}
        # Column sums and packed masks are computed where their operand is, at this level.
        self.home: dict[Node, int] = {}
        # A sum that is only read through a conversion is stored converted: sum → that cast.
        self.stored_as: dict[Node, Node] = {}
        self.refusals: list[tuple[Node, str]] = []
        # Why a level began, until the first pointwise node in it: a refused view alone costs nothing.
        self._unfused: dict[int, str] = {}
        # The level of what could not join a level although it reads nothing above it.
        self._after: dict[int, int] = {}
        self._next = 0
        for node in products_last(graph.nodes()):
            self.level[node] = self._place(node)
        for output in graph.outputs:
            if output is not None and output.type is not None:
                self.materialise(output)

    def base(self, node: Node) -> Node:
        """The node whose memory holds `node`'s values, if they have any."""
        while node.op in VIEWS and node not in self.decisions.copied and node not in self.decisions.left:
            node = node.inputs[0]
        return node

    def unconverted(self, node: Node) -> Node:
        """What has a value in memory, or would have it: one of 16 bits is widened where it is read, and needs no memory
        beside it for what rounds it again."""
        base = self.base(node)
        while base.op == "cast" and not self.has_memory(base) and (_widens(base) or _rounds_again(base)):
            base = self.base(base.inputs[0])
        return base

    def stored(self, node: Node) -> Node:
        """What lies in memory where a later kernel reads `node`: of the values that it is computed of, one after the
        other, the one by which the fewest bytes move, what is read beside it included."""
        best = base = self.unconverted(node)
        least, beside = 2 * _bytes(base), 0.0
        while is_pointwise(base.op) and not self.has_memory(base) and base not in self.decisions.apart:
            sources = {self.unconverted(i) for i in base.inputs if i.op != "constant"}
            computed = [s for s in sources if self.level[s] > FREE and s.op != "unpack_bits"]
            if len(computed) != 1:
                break
            beside += sum(_bytes(s) for s in sources if s is not computed[0])
            base = computed[0]
            if 2 * _bytes(base) + beside < least:
                best, least = base, 2 * _bytes(base) + beside
        return best

    def read(self, node: Node, source: Node) -> Node:
        """What lies in memory where `node` runs by its reference: a sum adds up 16 bits as they are, but wider."""
        return self.unconverted(source) if node.op == "sum" else self.base(source)

    def materialise(self, node: Node) -> None:
        self.materialised.add(self.base(node))

    def has_memory(self, node: Node) -> bool:
        return node.op in ("input", "aten", "item", "pack_bits") or node in self.materialised

    def _fresh(self) -> int:
        self._next += 1
        return self._next

    def _place(self, node: Node) -> int:
        if node in self.decisions.left or node.op == "aten":
            for source in node.inputs:
                if source.type is not None:
                    self.materialise(self.read(node, source))
            self.materialised.add(node)
            return self._fresh()
        if node.op in ("input", "size", "constant"):
            return FREE
        if node.op == "encode":
            self.materialise(node.inputs[0])
            self.materialised.add(node)
            return self._fresh()
        if node.op == "matmul":
            for source in node.inputs:
                self.materialise(source)
            level = self._fresh()
            self.epilogues[level] = Epilogue(node, Space.of(node.tensor.shape), node in self.decisions.whole)
            return level
        if node.op in ("sum", "pack_bits"):
            return self._place_sink(node)
        if node.op in ("item", "unpack_bits"):
            return self.level[node.inputs[0]]
        if node in self.stored_as.values():
            return self.level[node.inputs[0]]
        return self._place_pointwise(node)

    def _place_sink(self, node: Node) -> int:
        source = node.inputs[0]
        self.home[node] = self.level[source]
        if node.op == "sum" and self.level[source] in self.epilogues:
            self.refusals.append((node, "a sum over the rows of a product reads the product from memory"))
            self.materialise(self.stored(source))
            self.home[node] = self._fresh()
        elif node in self.decisions.alone or self._detached(source):
            self.materialise(self.stored(source))
            self.home[node] = self._fresh()
        self.materialised.add(node)
        if node.op == "pack_bits":
            return self.home[node]
        users = self.users[node]
        if len(users) == 1 and users[0].op == "cast" and node not in self.graph.outputs:
            self.materialised.discard(node)
            self.materialised.add(users[0])
            self.stored_as[node] = users[0]
        return self._fresh()

    def _place_pointwise(self, node: Node) -> int:
        """Views and primitives."""
        sources = [i for i in node.inputs if i.type is not None]
        level = max(self.level[i] for i in sources)
        self.depth[node] = int(node.op != "cast") + max(self.depth.get(i, 0) for i in sources)
        reason = self._reason_apart(node, sources, level)
        if reason is None and level in self.epilogues:
            try:
                self.epilogues[level].admit(node)
            except NotAffine as error:
                reason = str(error)
        if reason is not None:
            if level not in self._after:
                self._after[level] = self._fresh()
                self._unfused[self._after[level]] = reason
            level = self._after[level]
            self.depth[node] = 0
        if level in self._unfused and is_pointwise(node.op) and not is_implicit(node):
            self.refusals.append((node, self._unfused.pop(level)))
        for source in sources:
            if FREE < self.level[self.base(source)] < level:
                base = self.stored(source)
                if base.op != "unpack_bits":
                    self.materialised.add(base)
        return level

    def _reason_apart(self, node: Node, sources: list[Node], level: int) -> str | None:
        if self.depth[node] > LONGEST_CHAIN:
            return f"the chain is longer than {LONGEST_CHAIN} operations"
        for source in sources if self.decisions.apart else ():
            stored = self.stored(source)
            if stored in self.decisions.apart:
                self.materialise(stored)
                return self.decisions.apart[stored]
        if level in self.epilogues and any(self._detached(s) for s in sources):
            return "a view takes the product apart"
        return None

    def _detached(self, node: Node) -> bool:
        """Whether a value of a product's level is not indexed like the product."""
        epilogue = self.epilogues.get(self.level[node])
        return epilogue is not None and node not in epilogue.maps


def _widens(cast: Node) -> bool:
    narrow, wide = cast.inputs[0].tensor.dtype, cast.tensor.dtype
    return narrow.is_floating_point and wide.is_floating_point and narrow.itemsize < wide.itemsize


def _rounds_again(cast: Node) -> bool:
    """Whether a cast gives what was widened before it."""
    widened = base_of(cast.inputs[0])
    return widened.op == "cast" and _widens(widened) and widened.inputs[0].tensor.dtype == cast.tensor.dtype


def _bytes(node: Node) -> float:
    return evaluate_typical(node.tensor.numel) * node.tensor.dtype.itemsize
