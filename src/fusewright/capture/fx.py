"""FX graph of ATen operators → `Graph`."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.utils.checkpoint import CheckpointPolicy

from fusewright.capture.lowerings import LOWERINGS, PARTS
from fusewright.capture.metadata import size_of, type_of
from fusewright.errors import OverwrittenInBackward
from fusewright.ir import reference
from fusewright.ir.graph import (
    VIEWS,
    Builder,
    Graph,
    Node,
    Operand,
    Origin,
    Output,
    TensorType,
    accumulator_dtype,
    base_of,
    is_implicit,
)
from fusewright.ir.ops import ROWS
from fusewright.ir.size import Size, broadcasts, product
from fusewright.ir.value import Value

FLOATS = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})
DTYPES = FLOATS | {torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}

# In the `meta` of a forward module: how many of its outputs are the caller's; those after them are saved for backward.
RESULTS = "fusewright_results"


def from_fx(module: fx.GraphModule) -> Graph:
    """Converts a functional ATen graph whose nodes carry `meta["val"]`; unknown operators become `aten` nodes."""
    return Importer().convert(module)


class _Held:
    """The target of a call that returns a tensor which the graph holds."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    def __call__(self) -> torch.Tensor:
        return self.tensor


class IRCall:
    """An FX call target that is one graph node: how a `Graph` travels through AOTAutograd. Calls run the reference."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.__name__ = self.__qualname__ = f"ir_{node.op}"
        self.__module__ = __name__

    def __call__(self, *inputs: Any) -> Any:
        return reference.apply(self.node, inputs[: len(self.node.inputs)], {}, lambda dtype: dtype)


class Importer:
    """The state of one conversion; lowerings read their operands and make their nodes through it."""

    def __init__(self) -> None:
        self.builder = Builder()
        self.values: dict[fx.Node, Node | None] = {}
        self.origins: dict[Node, frozenset[Origin]] = {}
        self.device = torch.device("cpu")

    def convert(self, module: fx.GraphModule) -> Graph:
        inputs: list[Node] = []
        outputs: tuple[Output, ...] = ()
        self.device = _device_of(module)
        for node in module.graph.nodes:
            if node.op == "placeholder":
                self.values[node] = self.placeholder(node, len(inputs))
                inputs.append(self.values[node])  # type: ignore[arg-type]
            elif node.op == "output":
                outputs = self.outputs(node, known=RESULTS in module.meta)
            elif node.op == "get_attr":
                self.values[node] = self.held(getattr(module, node.target), node)
            else:
                self.values[node] = self.call(node)
        return Graph(tuple(inputs), outputs, self.origins)

    def placeholder(self, node: fx.Node, index: int) -> Node:
        value = node.meta.get("val")
        if isinstance(value, torch.SymInt):
            return self.builder.node("size", value=size_of(value), input=index)
        return self.builder.node("input", (), self.type_here(value), index=index)

    def type_here(self, value: Any) -> TensorType | None:
        """The type of a value on the graph's device, where numbers that are computed on the CPU are, too."""
        type = type_of(value)
        return replace(type, device=self.device) if type is not None and is_host_number(value) else type

    def held(self, tensor: torch.Tensor, node: fx.Node) -> Node:
        """A tensor that the graph itself holds, such as one that the model makes of numbers."""
        node.meta.setdefault("val", tensor)
        if tensor.dim() == 0 and tensor.dtype in DTYPES:
            with unset_fake_temporarily():
                return self.builder.constant(tensor.item(), tensor.dtype, self.device)
        return self.builder.node("aten", (), type_of(tensor), target=_Held(tensor), args=(), kwargs=())

    def outputs(self, node: fx.Node, known: bool) -> tuple[Output, ...]:
        """Results that eager gives memory of their own get it here too, although equal values are one node.

        known: they have had those copies, in a forward that was written out again: values no longer tell which of them
        share memory. What is saved may share that of a result: autograd notices whoever overwrites it, as in eager.
        """
        results: list[Output] = []
        placeholders = {n: self.values[n] for n in node.graph.find_nodes(op="placeholder")}
        storages: dict[Node, Any] = {value: _storage(n) for n, value in placeholders.items() if value is not None}
        returned: Any = node.args[0]
        for position, source in enumerate(returned):
            if not isinstance(source, fx.Node):
                results.append(None if source is None else self.builder.node("size", value=size_of(source)))
                continue
            result = self.values[source]
            if result is not None and result.type is not None:
                base = base_of(result)
                shares = storages.setdefault(base, _storage(source)) == _storage(source)
                if not (shares or known):
                    result = self.builder.node("copy", (result,), type_of(source.meta["val"]), of=position)
                if result.tensor.device != source.meta["val"].device:
                    result = self.moved(result, source.meta["val"])
            results.append(result)
        return tuple(results)

    def moved(self, result: Node, value: torch.Tensor) -> Node:
        """A result that eager has on another device than the graph's."""
        target, device = torch.ops.aten._to_copy.default, (("device", value.device),)
        return self.builder.node("aten", (result,), type_of(value), target=target, args=(Operand(0),), kwargs=device)

    def call(self, node: fx.Node) -> Node | None:
        if isinstance(node.target, IRCall):
            return self.recall(node, node.target.node)
        if isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable and not node.users:
            # AOTAutograd leaves nothing of the kind but what a backward overwrites.
            raise OverwrittenInBackward(
                f"a backward of the model overwrites one of the model's tensors ({node.target}); compiled graphs "
                "compute gradients and nothing else: put torch._dynamo.disable on the function that does it"
            )
        value = node.meta.get("val")
        if isinstance(value, (torch.SymInt, torch.SymFloat, int, float)):
            return self.builder.node("size", value=size_of(value))
        if node.target is operator.getitem:
            part = self.part(node.args[0], node.args[1])  # type: ignore[arg-type]
            if part is not None:
                return part
            source = self.values[node.args[0]]  # type: ignore[index]
            assert source is not None
            return self.builder.node("item", (source,), type_of(value), index=node.args[1])
        before = len(self.builder.made)
        result = self.lower(node)
        if any(result is self.values[source] for source in node.all_input_nodes):
            return result  # `detach` and the like: nothing is computed
        computed = self.computed(result, set(self.builder.made[before:]))
        if computed is not None:
            products = {n for n in self.builder.made[before:] if n.op in ("matmul", "sum")}
            moved = sum(_bytes(n) for n in (node, *node.all_input_nodes))
            origin = Origin(len(self.values), _operator_name(node.target), moved, _checkpoint(node), call_of(node))
            for made in {computed, *products}:
                self.origins[made] = self.origins.get(made, frozenset()) | {origin}
        return result

    def part(self, source: fx.Node, index: int) -> Node | None:
        """Result `index` of an operator that cuts a tensor into views, as a view."""
        parts = PARTS.get(_operator_name(source.target))
        if parts is None or not self.taken_apart(source, source.meta["val"][0]):
            return None
        arguments = {k: self.operand(v) for k, v in _bind(source.target, source).items()}  # type: ignore[arg-type]
        piece = parts(self, source.meta["val"], index, **arguments)
        return piece and self.restride(piece, source.meta["val"][index])

    def computed(self, result: Node, new: set[Node]) -> Node | None:
        """The node below the views and roundings of a call's result that computes it; None if the call only views."""
        node = result
        while node.op in VIEWS or is_implicit(node):
            if node.inputs[0] not in new and node.op in VIEWS:
                return None
            node = node.inputs[0]
        return None if node.op == "input" else node

    def recall(self, node: fx.Node, known: Node) -> Node:
        inputs = [self.operand(n) for n in node.args[: len(known.inputs)]]  # behind them are sizes
        result = self.builder.node(known.op, inputs, known.type, **dict(known.attributes))
        self.origins[result] = self.origins.get(result, frozenset()) | node.meta["fusewright_origins"]
        return result

    def lower(self, node: fx.Node) -> Node:
        value = node.meta.get("val")
        target: Any = node.target
        if isinstance(target, torch._ops.OpOverload) and isinstance(value, torch.Tensor):
            arguments = _bind(target, node)
            name = _operator_name(target)
            lowering = LOWERINGS.get(name)
            if self.taken_apart(node, value):
                result = None
                if lowering is not None:
                    result = lowering(self, value, **{k: self.operand(v) for k, v in arguments.items()})
                elif name in ROWS and target.namespace == "aten":
                    result = self.row(name, value, arguments)
                if result is not None:
                    return self.restride(result, value)
        return self.opaque(node)

    def taken_apart(self, node: fx.Node, value: torch.Tensor) -> bool:
        """Whether every tensor involved is a plain one, of a known dtype, and on the graph's device.

        Numbers may be on the CPU, and so may a scalar that is computed of nothing else; those that are arguments come
        with the call, which brings them to the device.
        """
        sources = [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), torch.Tensor)]
        placed = [n.meta["val"] for n in sources if not self.is_number(n)]
        if placed or value.dim():
            placed.append(value)
        return all(t.device == self.device for t in placed) and all(
            t.dtype in DTYPES and t.layout is torch.strided and not t.is_conj()
            for t in (value, *(n.meta["val"] for n in sources))
        )

    def is_number(self, node: fx.Node) -> bool:
        known = self.values[node]
        if known is None or known.op == "aten" or known.op == "item":
            return False
        return known.op == "constant" or is_host_number(node.meta.get("val"))

    def row(self, name: str, value: torch.Tensor, arguments: dict[str, Any]) -> Node | None:
        row = ROWS[name]
        if not row.widens and accumulator_dtype(value.dtype) != value.dtype:
            return None
        operands = {k: self.operand(v) for k, v in arguments.items()}
        if row.computes_in == "bool":
            dtype = torch.bool
        elif row.computes_in == "operands":
            dtype = self.promoted(arguments.values())
        else:
            dtype = value.dtype
        if row.rounds and dtype in (torch.float16, torch.bfloat16):
            operands = {k: _rounded(v, dtype) if isinstance(v, float) else v for k, v in operands.items()}
        dtype = accumulator_dtype(dtype)
        shape = tuple(size_of(s) for s in value.shape)
        if not all(broadcasts(v.tensor.shape, shape) for v in operands.values() if isinstance(v, Node)):
            return None  # sizes that are equal by a guard of torch's alone
        narrow = row.narrow and value.dtype in (torch.float16, torch.bfloat16)
        if row.computes_in == "operands":
            operands = {k: self.stored(v) if isinstance(v, Node) else v for k, v in operands.items()}
        result = row.formula(*(self.prepare(k, v, dtype, shape, narrow) for k, v in operands.items()))
        return result.to(value.dtype).node

    def prepare(
        self, name: str, operand: Any, dtype: torch.dtype, shape: tuple[Size, ...], narrow: bool = False
    ) -> Any:
        """A tensor operand converted to the computation dtype and broadcast to the result's shape."""
        if not isinstance(operand, Node):
            return operand
        if not (name in ("condition", "mask") and operand.tensor.dtype == torch.bool):
            operand = self.convert_to(operand, dtype)
        return Value(self.builder, self.builder.expand(operand, shape), narrow)

    def convert_to(self, x: Node, dtype: torch.dtype) -> Node:
        if dtype == torch.bool and x.tensor.dtype != torch.bool:
            wide = self.builder.cast(self.stored(x), accumulator_dtype(x.tensor.dtype), implicit=True)
            return (Value(self.builder, wide) != 0).node
        return self.builder.cast(x, dtype, implicit=True)

    def stored(self, x: Node) -> Node:
        """A tensor as eager has it in memory, its rounding to 16 bits kept: for what tells the least difference, such
        as a comparison with what ATen made of the tensor, or a test for what is infinite in 16 bits only."""
        base = base_of(x)
        dtype = x.tensor.dtype
        if is_implicit(base) and accumulator_dtype(base.inputs[0].tensor.dtype) == dtype:  # made of 16 bits
            base = base_of(base.inputs[0])
        if not is_implicit(base):
            return x
        wide = self.builder.cast(x, accumulator_dtype(dtype), implicit=True)
        narrow = self.builder.cast(wide, base.tensor.dtype, implicit=False)
        return self.builder.cast(narrow, dtype, implicit=True)

    def operand(self, argument: Any) -> Any:
        """An FX argument as a node (tensor), a size expression or a plain value."""
        if isinstance(argument, fx.Node):
            node = self.values[argument]
            assert node is not None
            return node.attribute("value") if node.op == "size" else node
        if isinstance(argument, (list, tuple)):
            return tuple(self.operand(a) for a in argument)
        return argument

    def promoted(self, arguments: Iterable[Any]) -> torch.dtype:
        """The dtype that ATen's promotion gives these operands."""
        values: list[Any] = [a.meta["val"] if isinstance(a, fx.Node) else a for a in arguments]
        values = [v for v in values if isinstance(v, (torch.Tensor, bool, int, float, torch.SymInt, torch.SymFloat))]
        plain: list[Any] = [
            1 if isinstance(v, torch.SymInt) else 1.0 if isinstance(v, torch.SymFloat) else v for v in values
        ]
        return torch.result_type(*plain) if len(plain) == 2 else plain[0].dtype

    def restride(self, node: Node, value: torch.Tensor) -> Node:
        """The same node with the layout that eager gives the result."""
        wanted = self.type_here(value)
        if node.op in ("input", "constant") or node.type == wanted:
            return node
        return self.builder.node(node.op, node.inputs, wanted, **dict(node.attributes))

    def opaque(self, node: fx.Node) -> Node:
        inputs: list[Node] = []

        def template(argument: Any) -> Any:
            if isinstance(argument, Node):
                inputs.append(argument)
                return Operand(len(inputs) - 1)
            return tuple(template(a) for a in argument) if isinstance(argument, tuple) else argument

        args = template(tuple(self.operand(a) for a in node.args))
        kwargs = tuple((k, template(self.operand(v))) for k, v in node.kwargs.items())
        value = node.meta.get("val")
        return self.builder.node("aten", inputs, type_of(value), target=node.target, args=args, kwargs=kwargs)


def _rounded(number: float, dtype: torch.dtype) -> float:
    with unset_fake_temporarily():
        return float(torch.tensor(number, dtype=torch.float64).to(dtype))


def _device_of(module: fx.GraphModule) -> torch.device:
    """The device of the graph's inputs, of which scalars may be on the CPU."""
    values = [n.meta.get("val") for n in module.graph.find_nodes(op="placeholder")]
    devices = dict.fromkeys(v.device for v in values if isinstance(v, torch.Tensor))
    made = (n.meta.get("val") for n in module.graph.nodes)
    devices |= dict.fromkeys(v.device for v in made if isinstance(v, torch.Tensor))
    return next((d for d in devices if d.type != "cpu"), torch.device("cpu"))


def host_numbers(module: fx.GraphModule) -> list[int]:
    """The arguments that are numbers on the CPU and are used; a graph expects them on its device."""
    placeholders = module.graph.find_nodes(op="placeholder")
    return [i for i, p in enumerate(placeholders) if p.users and is_host_number(p.meta.get("val"))]


def is_host_number(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dim() == 0 and value.device.type == "cpu"


def _bind(target: torch._ops.OpOverload, node: fx.Node) -> dict[str, Any]:
    """Every argument by its schema name, in schema order."""
    declared = target._schema.arguments
    given = {**dict(zip((a.name for a in declared), node.args, strict=False)), **node.kwargs}
    return {a.name: given.get(a.name, a.default_value) for a in declared}


def _checkpoint(node: fx.Node) -> int | None:
    """The number of the activation checkpoint by whose policy the result of a call is to be computed again."""
    again = (CheckpointPolicy.MUST_RECOMPUTE, CheckpointPolicy.PREFER_RECOMPUTE)
    return node.meta.get("ac_graph_id", 0) if node.meta.get("recompute") in again else None


def call_of(node: fx.Node) -> str | None:
    """Dynamo's name of the call that a node is or comes from: it stays when AOTAutograd takes the call apart."""
    calls = node.meta.get("source_fn_stack")
    return calls[-1][0] if calls else None


def _operator_name(target: Any) -> str:
    return target._schema.name.split("::")[1] if isinstance(target, torch._ops.OpOverload) else str(target)


def _bytes(node: fx.Node) -> Size:
    """Bytes of a tensor value; an expanded dimension is read once."""
    type = type_of(node.meta.get("val"))
    if type is None:
        return 0
    return product(n for n, s in zip(type.shape, type.stride, strict=False) if s != 0) * type.dtype.itemsize


def _storage(node: fx.Node) -> Any:
    value = node.meta.get("val")
    if isinstance(value, torch.Tensor) and value.layout is torch.strided:
        return value.untyped_storage()._cdata
    return id(node)
