"""Scalar expressions and literals → C++."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from fusewright.fusion.expression import Apply, Constant
from fusewright.ir.primitives import PRIMITIVES

C_TYPES = {
    torch.float32: "float",
    torch.float64: "double",
    torch.float16: "__half",
    torch.bfloat16: "__nv_bfloat16",
    torch.bool: "bool",
    torch.uint8: "uint8_t",
    torch.int8: "int8_t",
    torch.int16: "int16_t",
    torch.int32: "int32_t",
    torch.int64: "int64_t",
}


def literal(value: bool | int | float, dtype: torch.dtype) -> str:
    """`value` as a C++ constant of `dtype`, exactly."""
    if dtype == torch.bool:
        return "true" if value else "false"
    if not dtype.is_floating_point:
        integer = int(value)
        # C++ has no negative literals, and 2^63 fits no type that could be negated.
        return f"{C_TYPES[dtype]}({integer if integer > -(2**63) else '-9223372036854775807 - 1'})"
    number = float(value)
    single = dtype != torch.float64
    if math.isnan(number):
        text = 'nanf("")' if single else 'nan("")'
    elif math.isinf(number):
        text = f"{'-' if number < 0 else ''}fusewright::infinity<{'float' if single else 'double'}>()"
    else:
        text = repr(number) + ("f" if single else "")
    text = f"({text})" if text.startswith("-") else text
    return text if dtype in (torch.float32, torch.float64) else f"{C_TYPES[dtype]}({text})"


def scalar(expression: Apply, operands: Sequence[str], lower_bound: float = -math.inf) -> str:
    """The C++ of one primitive; its result has the type of `expression.dtype` once assigned.

    lower_bound: of the last operand.
    """
    type = C_TYPES[expression.dtype]
    if expression.op == "cast":
        source = expression.operands[0].dtype
        if expression.dtype == torch.bool:
            return f"{operands[0]} != {C_TYPES[source]}(0)"
        # Out of range, ATen wraps around: an unsigned byte by way of a wide integer.
        wide = expression.dtype == torch.uint8 and source.is_floating_point
        return f"{type}(int64_t({operands[0]}))" if wide else f"{type}({operands[0]})"
    if expression.op in ("div", "div_narrow") and expression.dtype == torch.float32 and lower_bound >= 1:
        namespace = "fusewright::narrow" if expression.op == "div_narrow" else "fusewright::from_one"
        numerator = expression.operands[0]
        if isinstance(numerator, Constant) and numerator.value == 1:
            return f"{namespace}::reciprocal({operands[1]})"
        return f"{namespace}::quotient({operands[0]}, {operands[1]})"
    row = PRIMITIVES[expression.op]
    integer = not expression.operands[-1].dtype.is_floating_point
    text = (row.integer if integer and row.integer else row.cuda).format(*operands)
    # C++ computes narrow integers as int.
    return f"{type}({text})" if not expression.dtype.is_floating_point and not row.boolean else text
