"""Sizes and types as our graphs have them, read off the fake tensors and symbolic integers of FX nodes."""

from __future__ import annotations

from collections.abc import Container
from typing import Any

import sympy
import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv, free_unbacked_symbols
from torch.utils._sympy.functions import CleanDiv, FloorDiv, Mod

from fusewright.ir.graph import TensorType
from fusewright.ir.size import Size, SizeSymbol


def size_of(value: Any) -> Size:
    """A Python or symbolic integer as a size."""
    if isinstance(value, (torch.SymInt, torch.SymFloat)):
        environment = value.node.shape_env
        expression = _without_remainders(value.node.expr, environment.divisible)
        if expression.is_Integer:
            return int(expression)
        return expression.xreplace({s: _with_value(s, environment) for s in expression.free_symbols})
    return value


def reads_numbers(module: fx.GraphModule) -> bool:
    """Whether a graph has numbers or sizes that a tensor's values give, as `.item()` or `nonzero` do: kernels have none
    of them, as those that they are launched with follow from the sizes of a call's arguments."""
    values = [node.meta.get("val") for node in module.graph.nodes]
    return any(free_unbacked_symbols(v) for v in values if isinstance(v, (torch.SymInt, torch.SymFloat, torch.SymBool)))


def as_torch_has_it(size: Size) -> Size:
    """The expression over torch's own symbols."""
    if not isinstance(size, sympy.Expr):
        return size
    ours = [s for s in size.free_symbols if isinstance(s, SizeSymbol)]
    return size.xreplace({s: sympy.Symbol(s.name, **s._assumptions_orig) for s in ours})


def _with_value(symbol: sympy.Symbol, environment: ShapeEnv) -> sympy.Symbol:
    """The symbol with its value in the example; one that depends on data has none."""
    values = getattr(environment, "backed_var_to_val", None) or environment.var_to_val
    value = values.get(symbol)
    if not isinstance(value, sympy.Integer):
        return symbol
    return SizeSymbol(symbol.name, int(value), **symbol._assumptions_orig)


def _without_remainders(expression: sympy.Expr, divisible: Container[sympy.Expr]) -> sympy.Expr:
    """Marks the floor divisions that torch's guards make exact."""
    if not expression.has(FloorDiv):
        return expression
    return expression.replace(
        lambda e: isinstance(e, FloorDiv) and Mod(*e.args) in divisible, lambda e: CleanDiv(*e.args)
    )


def type_of(value: Any) -> TensorType | None:
    """The type of a fake tensor; None for anything else."""
    if not isinstance(value, torch.Tensor):
        return None
    return TensorType(
        tuple(size_of(s) for s in value.shape),
        tuple(size_of(s) for s in value.stride()) if value.layout is torch.strided else (),
        value.dtype,
        value.device,
    )
