"""Operator overloading over graph nodes, so that a row of `ir/ops.py` reads as the formula it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import sympy
import torch

from fusewright.ir.graph import Builder, Node, TensorType, contiguous
from fusewright.ir.primitives import PRIMITIVES

Scalar: TypeAlias = bool | int | float | sympy.Expr


@dataclass(frozen=True, eq=False)
class Value:
    """A node under construction. Operands of one operation have one shape and dtype; numbers become constants.

    narrow: it is an operand of an operator whose result ATen rounds to 16 bits, and that may be computed accordingly.
    """

    builder: Builder
    node: Node
    narrow: bool = False

    @property
    def dtype(self) -> torch.dtype:
        return self.node.tensor.dtype

    def apply(self, op: str, *operands: Value | Scalar) -> Value:
        name = PRIMITIVES[op].narrow if self.narrow else ""
        return replace(primitive(self.builder, name or op, *operands), narrow=self.narrow)

    def to(self, dtype: torch.dtype) -> Value:
        return Value(self.builder, self.builder.cast(self.node, dtype, implicit=True))

    def __add__(self, other: Value | Scalar) -> Value:
        return self.apply("add", self, other)

    def __radd__(self, other: Scalar) -> Value:
        return self.apply("add", other, self)

    def __sub__(self, other: Value | Scalar) -> Value:
        return self.apply("sub", self, other)

    def __rsub__(self, other: Scalar) -> Value:
        return self.apply("sub", other, self)

    def __mul__(self, other: Value | Scalar) -> Value:
        return self.apply("mul", self, other)

    def __rmul__(self, other: Scalar) -> Value:
        return self.apply("mul", other, self)

    def __truediv__(self, other: Value | Scalar) -> Value:
        return self.apply("div", self, other)

    def __rtruediv__(self, other: Scalar) -> Value:
        return self.apply("div", other, self)

    def __neg__(self) -> Value:
        return self.apply("neg", self)

    def __gt__(self, other: Value | Scalar) -> Value:
        return self.apply("gt", self, other)

    def __ge__(self, other: Value | Scalar) -> Value:
        return self.apply("ge", self, other)

    def __lt__(self, other: Value | Scalar) -> Value:
        return self.apply("lt", self, other)

    def __le__(self, other: Value | Scalar) -> Value:
        return self.apply("le", self, other)

    def __eq__(self, other: Any) -> Value:  # type: ignore[override]
        return self.apply("eq", self, other)

    def __ne__(self, other: Any) -> Value:  # type: ignore[override]
        return self.apply("ne", self, other)

    def __and__(self, other: Value) -> Value:
        return self.apply("and", self, other)

    def __or__(self, other: Value) -> Value:
        return self.apply("or", self, other)

    def __xor__(self, other: Value) -> Value:
        return self.apply("xor", self, other)

    def __invert__(self) -> Value:
        return self.apply("not", self)


def primitive(builder: Builder, op: str, *operands: Value | Scalar) -> Value:
    """Applies primitive `op`; numbers take the dtype of the operands that are values.

    The result lies as the first operand that is no number does, which is eager's rule too.
    """
    values = [o for o in operands if isinstance(o, Value)]
    # The condition of `where` has its own dtype.
    typed = [o for i, o in enumerate(operands) if isinstance(o, Value) and not (op == "where" and i == 0)]
    dtype = typed[0].dtype if typed else torch.float32
    device = values[0].node.tensor.device
    nodes = [o.node if isinstance(o, Value) else builder.constant(o, dtype, device) for o in operands]
    like = next((n.tensor for n in nodes if n.op != "constant"), TensorType((), (), dtype, device))
    result = torch.bool if PRIMITIVES[op].boolean else dtype
    plain = contiguous(like.shape, result, device)
    type = TensorType(like.shape, like.stride, result, device) if like.dense else plain
    return Value(builder, builder.node(op, nodes, type))


def constant(like: Value, number: Scalar, dtype: torch.dtype | None = None) -> Value:
    """`number` as a value of `like`'s dtype, or of `dtype`."""
    return Value(like.builder, like.builder.constant(number, dtype or like.dtype, like.node.tensor.device))


def filled(like: Value, number: Scalar) -> Value:
    """`number` as a value of `like`'s shape and dtype, of which formulas can compute functions."""
    return Value(like.builder, like.builder.expand(constant(like, number).node, like.node.tensor.shape))


def where(condition: Value, a: Value | Scalar, b: Value | Scalar) -> Value:
    return condition.apply("where", condition, a, b)


def maximum(a: Value, b: Value | Scalar) -> Value:
    return a.apply("maximum", a, b)


def minimum(a: Value, b: Value | Scalar) -> Value:
    return a.apply("minimum", a, b)


def unary(name: str) -> Callable[[Value], Value]:
    """The function of one value that applies primitive `name`."""
    return lambda x: x.apply(name, x)


exp, exp2, log, log1p, expm1, tanh, sqrt, rsqrt, floor, trunc, absolute, normal_cdf = (
    unary(n)
    for n in (
        *("exp", "exp2", "log", "log1p", "expm1", "tanh", "sqrt", "rsqrt", "floor", "trunc", "abs", "normal_cdf"),
    )
)
