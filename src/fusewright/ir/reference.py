"""What every node means, in torch: the oracle that plans and kernels are held against."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import sympy
import torch

from fusewright.ir.graph import Graph, Node, Operand
from fusewright.ir.primitives import PRIMITIVES
from fusewright.ir.size import evaluate

Sizes = Mapping[sympy.Symbol, int]
_BITS = tuple(1 << i for i in range(8))


def pack_bits(x: torch.Tensor) -> torch.Tensor:
    """bool [..., columns] → uint8 [..., ⌈columns/8⌉]; bit i of a byte is column 8·byte + i."""
    columns = x.shape[-1]
    padded = torch.nn.functional.pad(x.to(torch.uint8), (0, -columns % 8))
    weights = torch.tensor(_BITS, dtype=torch.uint8, device=x.device)
    by_byte = padded.reshape(*padded.shape[:-1], padded.shape[-1] // 8, 8)
    return (by_byte * weights).sum(-1, dtype=torch.uint8)


def unpack_bits(x: torch.Tensor, columns: int) -> torch.Tensor:
    """The inverse of `pack_bits`."""
    weights = torch.tensor(_BITS, dtype=torch.uint8, device=x.device)
    return ((x.unsqueeze(-1) & weights) != 0).flatten(-2)[..., :columns]


def apply(node: Node, inputs: Sequence[Any], sizes: Sizes, dtype_of: Callable[[torch.dtype], torch.dtype]) -> Any:
    """The value of one node. dtype_of: which dtype stands for a node's, so that floats can be widened to float64."""
    if node.op in PRIMITIVES:
        if node.op == "cast":
            return inputs[0].to(dtype_of(node.tensor.dtype))
        return PRIMITIVES[node.op].reference(*inputs)
    return _APPLY[node.op](node, inputs, lambda size: evaluate(size, sizes), dtype_of)


def _shape(node: Node, size: Any) -> list[int]:
    return [size(s) for s in node.tensor.shape]


def _constant(node: Node, x: Any, size: Any, dtype_of: Any) -> Any:
    return torch.tensor(size(node.attribute("value")), dtype=dtype_of(node.tensor.dtype), device=node.tensor.device)


def _slice(node: Node, x: Any, size: Any, dtype_of: Any) -> Any:
    dim, start, step = (node.attribute(n) for n in ("dim", "start", "step"))
    length = _shape(node, size)[dim]
    return x[0][(slice(None),) * dim + (slice(start, start + (length - 1) * step + 1 if length else start, step),)]


def _matmul(node: Node, x: Any, size: Any, dtype_of: Any) -> Any:
    dtype = dtype_of(node.tensor.dtype)
    return x[0].to(dtype) @ x[1].to(dtype)


def _encode(node: Node, x: Any, size: Any, dtype_of: Any) -> Any:
    """Nothing but a product's kernel reads it; the reference of a product reads its operands."""
    return torch.zeros(_shape(node, size), dtype=node.tensor.dtype, device=x[0].device)


def _sum(node: Node, x: Any, size: Any, dtype_of: Any) -> Any:
    dims = node.attribute("dims")
    return x[0].sum(dims, dtype=dtype_of(node.tensor.dtype)) if dims else x[0]


def _aten(node: Node, x: Any, size: Any, dtype_of: Any) -> Any:
    args = [_filled(a, x, size, dtype_of) for a in node.attribute("args")]
    kwargs = {k: _filled(v, x, size, dtype_of) for k, v in node.attribute("kwargs")}
    return node.attribute("target")(*args, **kwargs)


# No closure: one that calls itself is a cycle, which would keep `x` alive until the garbage collector runs.
def _filled(argument: Any, x: Any, size: Any, dtype_of: Any) -> Any:
    if isinstance(argument, Operand):
        return x[argument.index]
    if isinstance(argument, tuple):
        return [_filled(a, x, size, dtype_of) for a in argument]
    if isinstance(argument, torch.dtype):
        return dtype_of(argument)
    return size(argument) if isinstance(argument, sympy.Expr) else argument


_APPLY: dict[str, Callable[..., Any]] = {
    "size": lambda node, x, size, _: size(node.attribute("value")),
    "constant": _constant,
    "reshape": lambda node, x, size, _: x[0].reshape(_shape(node, size)),
    "permute": lambda node, x, size, _: x[0].permute(node.attribute("dims")),
    "expand": lambda node, x, size, _: x[0].expand(_shape(node, size)),
    "slice": _slice,
    "matmul": _matmul,
    "encode": _encode,
    "sum": _sum,
    "pack_bits": lambda node, x, size, _: pack_bits(x[0]),
    "unpack_bits": lambda node, x, size, _: unpack_bits(x[0], size(node.attribute("columns"))),
    "item": lambda node, x, size, _: x[0][node.attribute("index")],
    "aten": _aten,
}


def bind_sizes(graph_inputs: Sequence[Any], arguments: Sequence[Any]) -> dict[sympy.Symbol, int]:
    """The value of every size symbol, read off the arguments. Inputs are `Node`s of kind input or size."""
    sizes: dict[sympy.Symbol, int] = {}
    for node, argument in zip(graph_inputs, arguments, strict=True):
        if node.op == "size":
            if isinstance(node.attribute("value"), sympy.Symbol):
                sizes[node.attribute("value")] = int(argument)
        elif node.type is not None:
            for expression, value in zip(
                (*node.type.shape, *node.type.stride), (*argument.shape, *argument.stride()), strict=True
            ):
                if isinstance(expression, sympy.Symbol):
                    sizes.setdefault(expression, int(value))
    return sizes


def run(graph: Graph, arguments: Sequence[Any], *, widen: bool = False) -> list[Any]:
    """Evaluates the graph. widen: every floating-point value is float64, whatever the graph says."""

    def dtype_of(dtype: torch.dtype) -> torch.dtype:
        return torch.float64 if widen and dtype.is_floating_point else dtype

    sizes = bind_sizes(graph.inputs, arguments)
    values: dict[Node, Any] = {}
    for node, argument in zip(graph.inputs, arguments, strict=True):
        tensor = isinstance(argument, torch.Tensor)
        values[node] = argument.to(dtype_of(argument.dtype)) if tensor else argument
    for node in graph.nodes():
        if node not in values:
            values[node] = apply(node, [values[i] for i in node.inputs], sizes, dtype_of)
    return [None if o is None else values[o] for o in graph.outputs]
