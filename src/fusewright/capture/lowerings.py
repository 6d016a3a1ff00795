"""ATen operators that are not a pointwise formula: products, sums, views, copies and constants.

Each lowering takes the importer, the result's fake tensor and the operator's arguments by schema name (tensors as
nodes, sizes as expressions), and returns a node, or None to leave this call to ATen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fusewright.capture.metadata import size_of
from fusewright.errors import CannotFuse
from fusewright.ir.graph import Node, accumulator_dtype, contiguous
from fusewright.ir.size import Size, broadcasts, product, same
from fusewright.ir.value import Value, where

if TYPE_CHECKING:
    from fusewright.capture.fx import Importer

Lowering = Callable[..., "Node | None"]
LOWERINGS: dict[str, Lowering] = {}

MATMUL_DTYPES = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})


def no_product(x: Tensor, weight: Tensor) -> CannotFuse | None:
    """The refusal of operands that no kernel multiplies, whatever the epilogue."""
    if weight.dim() == 2 and {x.dtype, weight.dtype} <= MATMUL_DTYPES:
        return None
    given = " and ".join(
        f"{name} {str(t.dtype).removeprefix('torch.')} {list(t.shape)}" for name, t in (("x", x), ("weight", weight))
    )
    dtypes = ", ".join(sorted(str(d).removeprefix("torch.") for d in MATMUL_DTYPES))
    return CannotFuse(f"no kernel multiplies {given}: fusewright.linear takes a weight [N, K], and of dtypes {dtypes}")


def lowering(*names: str) -> Callable[[Lowering], Lowering]:
    """Registers a lowering for the ATen operators of these names."""

    def register(function: Lowering) -> Lowering:
        LOWERINGS.update(dict.fromkeys(names, function))
        return function

    return register


def _shape(value: torch.Tensor) -> tuple[Size, ...]:
    return tuple(size_of(s) for s in value.shape)


def _matmul(g: Importer, value: torch.Tensor, a: Node, b: Node) -> Node | None:
    if value.dtype not in MATMUL_DTYPES or a.tensor.dtype != b.tensor.dtype:
        return None
    if not same(a.tensor.shape[1], b.tensor.shape[0]):
        return None  # equal by a guard of torch's alone
    shape = (a.tensor.shape[0], b.tensor.shape[1])
    return g.builder.node("matmul", (a, b), contiguous(shape, accumulator_dtype(a.tensor.dtype), value.device))


@lowering("mm")
def _mm(g: Importer, value: torch.Tensor, self: Node, mat2: Node, **_: Any) -> Node | None:
    result = _matmul(g, value, self, mat2)
    return result and g.builder.cast(result, value.dtype, implicit=True)


@lowering("addmm")
def _addmm(
    g: Importer, value: torch.Tensor, self: Node, mat1: Node, mat2: Node, beta: Any, alpha: Any, **_: Any
) -> Node | None:
    accumulated = _matmul(g, value, mat1, mat2)
    if accumulated is None or not broadcasts(self.tensor.shape, accumulated.tensor.shape):
        return None
    result = Value(g.builder, accumulated)
    result = result if alpha == 1 else result * alpha
    if beta != 0:  # beta = 0 ignores the bias, NaN in it included
        bias = g.prepare("self", self, result.dtype, accumulated.tensor.shape)
        result = result + (bias if beta == 1 else bias * beta)
    return result.to(value.dtype).node


def _total(g: Importer, value: torch.Tensor, x: Node, dim: Any) -> tuple[Value, Size]:
    """The sum over `dim` in the accumulator's dtype, in the result's shape, and how many elements each one sums."""
    shape = x.tensor.shape
    reduced = range(len(shape)) if dim in (None, ()) else (dim,) if isinstance(dim, int) else dim
    dims = tuple(sorted({d % len(shape) for d in reduced})) if shape else ()
    wide = accumulator_dtype(value.dtype)
    kept = [size for i, size in enumerate(shape) if i not in dims]
    total = g.builder.node(
        "sum", (g.builder.cast(x, wide, implicit=True),), contiguous(kept, wide, value.device), dims=dims
    )
    return Value(g.builder, g.builder.reshape(total, _shape(value))), product(shape[d] for d in dims)


@lowering("sum")
def _sum(g: Importer, value: torch.Tensor, self: Node, dim: Any = None, **_: Any) -> Node | None:
    return _total(g, value, self, dim)[0].to(value.dtype).node


@lowering("mean")
def _mean(g: Importer, value: torch.Tensor, self: Node, dim: Any = None, **_: Any) -> Node | None:
    total, count = _total(g, value, self, dim)
    return (total / count).to(value.dtype).node


@lowering("smooth_l1_loss_backward")
def _smooth_l1_loss_backward(
    g: Importer, value: torch.Tensor, grad_output: Node, self: Node, target: Node, reduction: int, beta: float
) -> Node | None:
    """torch's decomposition loses NaN."""
    dtype, shape = accumulator_dtype(value.dtype), _shape(value)
    grad, x, y = (g.prepare("", operand, dtype, shape) for operand in (grad_output, self, target))
    if reduction == 1:
        grad = grad / product(shape)
    difference = x - y
    steep = where(difference > beta, grad, grad * difference / beta)
    return where(difference < -beta, -grad, steep).to(value.dtype).node


@lowering("view", "_unsafe_view", "reshape", "squeeze", "unsqueeze")
def _reshape(g: Importer, value: torch.Tensor, self: Node, **_: Any) -> Node | None:
    # `view` to another dtype of the same width reads bits, not values.
    return g.builder.reshape(self, _shape(value)) if self.tensor.dtype == value.dtype else None


@lowering("permute")
def _permute(g: Importer, value: torch.Tensor, self: Node, dims: Sequence[int]) -> Node | None:
    return g.builder.permute(self, dims)


@lowering("t")
def _t(g: Importer, value: torch.Tensor, self: Node) -> Node | None:
    return g.builder.permute(self, tuple(reversed(range(len(self.tensor.shape)))))


@lowering("transpose")
def _transpose(g: Importer, value: torch.Tensor, self: Node, dim0: int, dim1: int) -> Node | None:
    dims = list(range(len(self.tensor.shape)))
    if dims:
        dims[dim0], dims[dim1] = dims[dim1], dims[dim0]
    return g.builder.permute(self, dims)


@lowering("expand")
def _expand(g: Importer, value: torch.Tensor, self: Node, **_: Any) -> Node | None:
    return g.builder.expand(self, _shape(value))


@lowering("slice")
def _slice(g: Importer, value: torch.Tensor, self: Node, dim: int, start: Any, step: int, **_: Any) -> Node | None:
    dim, start = dim % len(self.tensor.shape), start or 0
    length = self.tensor.shape[dim]
    if not isinstance(start, int) or (start and not isinstance(length, int)):
        return None
    if isinstance(length, int):
        start = min(max(start + length if start < 0 else start, 0), length)
    sliced = contiguous(_shape(value), value.dtype, value.device)
    return g.builder.view("slice", self, sliced, dim=dim, start=start, step=step)


@lowering("select")
def _select(g: Importer, value: torch.Tensor, self: Node, dim: int, index: Any) -> Node | None:
    shape = list(self.tensor.shape)
    dim = dim % len(shape)
    if not isinstance(index, int) or (index < 0 and not isinstance(shape[dim], int)):
        return None
    start = index + shape[dim] if index < 0 else index
    shape[dim] = 1
    row = contiguous(shape, value.dtype, value.device)
    return g.builder.reshape(g.builder.view("slice", self, row, dim=dim, start=start, step=1), _shape(value))


def _piece(g: Importer, values: Sequence[torch.Tensor], index: int, self: Node, dim: int = 0, **_: Any) -> Node | None:
    """Piece `index` of a tensor cut along `dim`."""
    dim = dim % len(self.tensor.shape)
    start = sum(_shape(v)[dim] for v in values[:index])
    shape = _shape(values[index])
    if not isinstance(start, int):
        return None
    piece = contiguous(shape, self.tensor.dtype, self.tensor.device)
    return g.builder.view("slice", self, piece, dim=dim, start=start, step=1)


def _row(g: Importer, values: Sequence[torch.Tensor], index: int, self: Node, dim: int = 0) -> Node | None:
    return _select(g, values[index], self, dim, index)


# Operators with several results, each a view: (importer, all results, index, arguments) → that result.
PARTS: dict[str, Callable[..., Node | None]] = {"split": _piece, "split_with_sizes": _piece, "unbind": _row}


@lowering("alias", "detach")
def _identity(g: Importer, value: torch.Tensor, self: Node, **_: Any) -> Node | None:
    return self


@lowering("lift_fresh_copy")
def _lift(g: Importer, value: torch.Tensor, self: Node) -> Node | None:
    """Of a tensor that the graph holds: a number needs no copy."""
    return self if self.op == "constant" else _copy(g, value, self)


@lowering("clone")
def _copy(g: Importer, value: torch.Tensor, self: Node, **_: Any) -> Node | None:
    return g.builder.node("copy", (self,), contiguous(_shape(value), value.dtype, value.device))


@lowering("_to_copy")
def _to_copy(g: Importer, value: torch.Tensor, self: Node, **_: Any) -> Node | None:
    """A conversion that the user wrote: its rounding is kept."""
    source, dtype = self.tensor.dtype, value.dtype
    if source == dtype:
        return _copy(g, value, self)
    if dtype == torch.bool:
        return g.convert_to(self, torch.bool)
    # 16-bit floats compute as float32, so a conversion between one of them and anything else goes through it.
    through = g.builder.cast(self, accumulator_dtype(source), implicit=True)
    through = g.builder.cast(through, accumulator_dtype(dtype), implicit=False)
    return g.builder.cast(through, dtype, implicit=False)


@lowering("convert_element_type")
def _convert_element_type(g: Importer, value: torch.Tensor, a: Node, dtype: torch.dtype) -> Node | None:
    return a if a.tensor.dtype == dtype else _to_copy(g, value, a)


@lowering("nan_to_num")
def _nan_to_num(
    g: Importer,
    value: torch.Tensor,
    self: Node,
    nan: float | None = None,
    posinf: float | None = None,
    neginf: float | None = None,
) -> Node | None:
    """The numbers that stand for infinity, unless given, are the dtype's own: no formula, which computes in float32."""
    if not value.dtype.is_floating_point:
        return _copy(g, value, self)
    most = torch.finfo(value.dtype).max
    x = Value(g.builder, g.builder.cast(g.stored(self), accumulator_dtype(value.dtype), implicit=True))
    finite = where(x == -math.inf, -most if neginf is None else neginf, where(x != x, nan or 0.0, x))
    return where(x == math.inf, most if posinf is None else posinf, finite).to(value.dtype).node


def _filled(g: Importer, value: torch.Tensor, number: Any) -> Node:
    return g.builder.expand(g.builder.constant(number, value.dtype, g.device), _shape(value))


@lowering("full", "full_like", "new_full")
def _full(g: Importer, value: torch.Tensor, fill_value: Any, **_: Any) -> Node | None:
    return _filled(g, value, fill_value)


@lowering("fill")
def _fill(g: Importer, result: torch.Tensor, /, self: Node, value: Any) -> Node | None:
    if not isinstance(value, Node):
        return _filled(g, result, value)
    return g.builder.expand(g.builder.cast(value, result.dtype, implicit=False), _shape(result))


@lowering("zeros", "zeros_like", "new_zeros", "_efficientzerotensor")
def _zeros(g: Importer, value: torch.Tensor, **_: Any) -> Node | None:
    return _filled(g, value, 0)


@lowering("ones", "ones_like", "new_ones")
def _ones(g: Importer, value: torch.Tensor, **_: Any) -> Node | None:
    return _filled(g, value, 1)


@lowering("scalar_tensor")
def _scalar_tensor(g: Importer, value: torch.Tensor, s: Any, **_: Any) -> Node | None:
    return g.builder.constant(s, value.dtype, g.device)
