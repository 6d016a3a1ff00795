"""`Graph` → FX, so that AOTAutograd can cut a rewritten joint graph into its forward and backward modules."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import fx
from torch._functorch import partitioners

from fusewright.capture.fx import RESULTS, IRCall, from_fx
from fusewright.capture.metadata import as_torch_has_it
from fusewright.ir.graph import Graph, Node, TensorType
from fusewright.passes import pipeline
from fusewright.passes.format import Capabilities, encode_operands
from fusewright.passes.training import Partition, partition


def partition_joint(
    joint: fx.GraphModule,
    inputs: Sequence[Any],
    *,
    num_fwd_outputs: int,
    capabilities: Capabilities | None = None,
    **options: Any,
) -> tuple[fx.GraphModule, fx.GraphModule]:
    """AOTAutograd's `partition_fn`: rewrites the joint graph, then splits it. Returns (forward, backward).

    capabilities: products may read halves of their operands, which forward and backward share.
    """
    placeholders = joint.graph.find_nodes(op="placeholder")
    tangents = frozenset(i for i, p in enumerate(placeholders) if "tangents" in str(p.target))
    graph = pipeline.run(from_fx(joint))
    if capabilities is not None:
        graph = encode_operands(graph, capabilities)
    split = partition(graph, num_fwd_outputs, tangents, _mutated(joint, placeholders))
    module, nodes = _Exporter(joint).export(split.graph)
    forward, backward = partitioners._extract_fwd_bwd_modules(
        module,
        [nodes[n] for n in split.saved],
        saved_sym_nodes=[nodes[n] for n in _sizes_of_backward(split, num_fwd_outputs)],
        num_fwd_outputs=num_fwd_outputs,
    )
    forward.meta[RESULTS] = num_fwd_outputs
    return forward, backward


def _sizes_of_backward(split: Partition, num_fwd_outputs: int) -> list[Node]:
    """The size arguments that the backward uses: maybe no tensor that it is given has that size."""
    graph, saved = split.graph, set(split.saved)
    computed: set[Node] = set()  # there, some of it as in the forward
    pending = [o for o in graph.outputs[num_fwd_outputs:] if o is not None]
    while pending:
        node = pending.pop()
        if node not in computed and node not in saved:
            computed.add(node)
            pending += node.inputs
    used = {size for node in computed for size in _sizes(graph, node)}
    return [n for n in graph.inputs if n in used]


def _sizes(graph: Graph, node: Node) -> list[Node]:
    """The size arguments that a node's type and attributes are made of."""
    values = (*node.type.shape, *node.type.stride) if node.type else ()
    symbols: set[sympy.Symbol] = set()
    for value in (*values, *(v for _, v in node.attributes)):
        symbols |= value.free_symbols if isinstance(value, sympy.Expr) else set()
    return [n for n in graph.inputs if n.op == "size" and n.attribute("value") in symbols] if symbols else []


def _mutated(joint: fx.GraphModule, placeholders: Sequence[fx.Node]) -> frozenset[int]:
    """The inputs that AOTAutograd overwrites with a result of the forward once that has run."""
    described = joint.graph.output_node().meta.get("desc", ())
    mutated = {output.mutated_input for output in described if hasattr(output, "mutated_input")}
    return frozenset(i for i, p in enumerate(placeholders) if p.meta.get("desc") in mutated)


@dataclass
class _Exporter:
    """Writes a graph as FX calls of `IRCall`, with the placeholders and the output structure of `source`."""

    source: fx.GraphModule
    fakes: dict[TensorType, torch.Tensor] = field(default_factory=dict)

    def export(self, graph: Graph) -> tuple[fx.GraphModule, dict[Node, fx.Node]]:
        result = fx.Graph()
        copied: dict[fx.Node, fx.Node] = {}
        nodes: dict[Node, fx.Node] = {}
        for node, old in zip(graph.inputs, self.source.graph.find_nodes(op="placeholder"), strict=True):
            nodes[node] = copied[old] = result.node_copy(old)
        self.fake_mode, self.shape_env = _fake_mode(self.source)
        for node in graph.nodes():
            if node not in nodes and node.op != "size":
                # FX sees the sizes that a node is made of as arguments behind its operands.
                inputs = [nodes[i] for i in (*node.inputs, *_sizes(graph, node))]
                nodes[node] = self.call(result, graph, node, inputs)
        old_output = next(iter(self.source.graph.find_nodes(op="output")))
        returned = [
            self.returned(result, new, old, nodes, copied)
            for new, old in zip(graph.outputs, old_output.args[0], strict=True)
        ]
        output = result.output(returned)
        output.meta.update(old_output.meta)
        return fx.GraphModule({}, result), nodes

    def call(self, result: fx.Graph, graph: Graph, node: Node, inputs: list[fx.Node]) -> fx.Node:
        made = result.call_function(IRCall(node), tuple(inputs))
        made.meta["fusewright_origins"] = graph.origins.get(node, frozenset())
        if node.type is not None:
            made.meta["val"] = self.fake(node.type)
        return made

    def returned(self, result: fx.Graph, new: Node | None, old: Any, nodes: Any, copied: Any) -> Any:
        if new is None or not isinstance(old, fx.Node):
            return old
        if new.op == "size" and new not in nodes:
            return self.copy_size(result, old, copied)
        return nodes[new]

    def copy_size(self, result: fx.Graph, old: fx.Node, copied: dict[fx.Node, fx.Node]) -> fx.Node:
        for source in old.all_input_nodes:
            if source not in copied:
                self.copy_size(result, source, copied)
        copied[old] = result.node_copy(old, lambda n: copied[n])
        return copied[old]

    def fake(self, type: TensorType) -> torch.Tensor:
        """A tensor of `type` without data; making one takes longer than all else here, so values of a type share it."""
        if type not in self.fakes:
            self.fakes[type] = self.new_fake(type)
        return self.fakes[type]

    def new_fake(self, type: TensorType) -> torch.Tensor:
        with self.fake_mode:
            return torch.empty_strided(
                [self.symbolic(s) for s in type.shape],
                [self.symbolic(s) for s in type.stride],
                dtype=type.dtype,
                device=type.device,
            )

    def symbolic(self, size: Any) -> Any:
        if not isinstance(size, sympy.Expr):
            return size
        return self.shape_env.create_symintnode(as_torch_has_it(size), hint=None)


def _fake_mode(module: fx.GraphModule) -> tuple[Any, Any]:
    for node in module.graph.find_nodes(op="placeholder"):
        value = node.meta.get("val")
        if isinstance(value, torch._subclasses.FakeTensor):
            return value.fake_mode, value.fake_mode.shape_env
    raise AssertionError("a joint graph has at least one tensor input")
