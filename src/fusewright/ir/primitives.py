"""The scalar primitives: everything that is computed element by element is made of these.

A primitive is a row: its CUDA expression over operands named {0}, {1}, … and its reference in torch. Overloaded names
(`exp`, `fmod`) and those of `scalar.cuh`, `integer.cuh` and `special.cuh` resolve by operand type, so one row serves
float32 and float64. Operands have one common dtype unless a row says otherwise; 16-bit floats never reach a primitive
(chains compute in float32).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Primitive:
    """One scalar operation.

    cuda: a C++ expression. reference: the same on tensors. boolean: the result is bool whatever the operands are.
    integer: the expression for integers and bool, where it is another. narrow: the primitive that takes its place in
    operators whose results ATen rounds to 16 bits.
    """

    name: str
    arity: int
    cuda: str
    reference: Callable[..., Any]
    boolean: bool = False
    integer: str = ""
    narrow: str = ""


def _divide_integers(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.div(a, b, rounding_mode="trunc") if not a.is_floating_point() else a / b


def _normal_cdf(x: torch.Tensor) -> torch.Tensor:
    return 0.5 * (1 + torch.erf(x * math.sqrt(0.5)))


PRIMITIVES: dict[str, Primitive] = {
    p.name: p
    for p in (
        Primitive("add", 2, "{0} + {1}", torch.add),
        Primitive("sub", 2, "{0} - {1}", lambda a, b: torch.add(a, b, alpha=-1)),
        Primitive("mul", 2, "{0} * {1}", torch.mul),
        Primitive(
            "div",
            2,
            "{0} / {1}",
            _divide_integers,
            integer="fusewright::integer::quotient({0}, {1})",
            narrow="div_narrow",
        ),
        Primitive("div_narrow", 2, "{0} / {1}", torch.div),
        Primitive("neg", 1, "-{0}", torch.neg),
        Primitive("abs", 1, "fusewright::absolute({0})", torch.abs),
        Primitive("sign", 1, "fusewright::sign({0})", torch.sign),
        Primitive("fmod", 2, "fmod({0}, {1})", torch.fmod, integer="fusewright::integer::remainder({0}, {1})"),
        Primitive("pow", 2, "pow({0}, {1})", torch.pow, integer="fusewright::integer::power({0}, {1})"),
        Primitive("minimum", 2, "fusewright::minimum({0}, {1})", torch.minimum),
        Primitive("maximum", 2, "fusewright::maximum({0}, {1})", torch.maximum),
        # Of a NaN and a number, the number.
        Primitive("fmin", 2, "fmin({0}, {1})", torch.fmin),
        Primitive("fmax", 2, "fmax({0}, {1})", torch.fmax),
        Primitive("copysign", 2, "copysign({0}, {1})", torch.copysign),
        Primitive("nextafter", 2, "nextafter({0}, {1})", torch.nextafter),
        Primitive("hypot", 2, "hypot({0}, {1})", torch.hypot),
        # The exponent is a whole number in the operands' dtype.
        Primitive("ldexp", 2, "ldexp({0}, int({1}))", torch.ldexp),
        Primitive("gcd", 2, "fusewright::integer::greatest_divisor({0}, {1})", torch.gcd),
        Primitive("lcm", 2, "fusewright::integer::least_multiple({0}, {1})", torch.lcm),
        Primitive("sqrt", 1, "sqrt({0})", torch.sqrt),
        Primitive("rsqrt", 1, "rsqrt({0})", torch.rsqrt),
        Primitive("exp", 1, "exp({0})", torch.exp, narrow="exp_narrow"),
        Primitive("exp_narrow", 1, "fusewright::narrow::exp({0})", torch.exp),
        Primitive("exp2", 1, "exp2({0})", torch.exp2),
        Primitive("expm1", 1, "expm1({0})", torch.expm1, narrow="expm1_narrow"),
        Primitive("expm1_narrow", 1, "fusewright::narrow::expm1({0})", torch.expm1),
        Primitive("log", 1, "log({0})", torch.log),
        Primitive("log2", 1, "log2({0})", torch.log2),
        Primitive("log10", 1, "log10({0})", torch.log10),
        Primitive("log1p", 1, "log1p({0})", torch.log1p, narrow="log1p_narrow"),
        # Of what is at least 0.
        Primitive("log1p_narrow", 1, "fusewright::narrow::log1p({0})", torch.log1p),
        Primitive("sin", 1, "sin({0})", torch.sin),
        Primitive("cos", 1, "cos({0})", torch.cos),
        Primitive("tan", 1, "tan({0})", torch.tan),
        Primitive("asin", 1, "asin({0})", torch.asin),
        Primitive("acos", 1, "acos({0})", torch.acos),
        Primitive("atan", 1, "atan({0})", torch.atan),
        Primitive("atan2", 2, "atan2({0}, {1})", torch.atan2),
        Primitive("sinh", 1, "sinh({0})", torch.sinh),
        Primitive("cosh", 1, "cosh({0})", torch.cosh),
        Primitive("tanh", 1, "tanh({0})", torch.tanh, narrow="tanh_narrow"),
        Primitive("tanh_narrow", 1, "fusewright::narrow::tanh({0})", torch.tanh),
        Primitive("asinh", 1, "asinh({0})", torch.asinh),
        Primitive("acosh", 1, "acosh({0})", torch.acosh),
        Primitive("atanh", 1, "atanh({0})", torch.atanh),
        Primitive("erf", 1, "erf({0})", torch.erf),
        Primitive("normal_cdf", 1, "fusewright::normal_cdf({0})", _normal_cdf, narrow="normal_cdf_narrow"),
        Primitive("normal_cdf_narrow", 1, "fusewright::narrow::normal_cdf({0})", torch.special.ndtr),
        Primitive("erfc", 1, "erfc({0})", torch.erfc),
        Primitive("erfinv", 1, "erfinv({0})", torch.erfinv),
        Primitive("erfcx", 1, "erfcx({0})", torch.special.erfcx),
        Primitive("ndtri", 1, "normcdfinv({0})", torch.special.ndtri),
        Primitive("lgamma", 1, "lgamma({0})", torch.lgamma),
        Primitive("digamma", 1, "fusewright::special::digamma({0})", torch.digamma),
        Primitive("trigamma", 1, "fusewright::special::trigamma({0})", lambda a: torch.polygamma(1, a)),
        Primitive("zeta", 2, "fusewright::special::zeta({0}, {1})", torch.special.zeta),
        *(
            Primitive(
                f"chebyshev_{kind}",
                2,
                f"fusewright::special::chebyshev_polynomial<'{kind}'>({{0}}, {{1}})",
                getattr(torch.special, f"chebyshev_polynomial_{kind}"),
            )
            for kind in "tuvw"
        ),
        Primitive("hermite_h", 2, "fusewright::special::hermite_h({0}, {1})", torch.special.hermite_polynomial_h),
        Primitive("hermite_he", 2, "fusewright::special::hermite_he({0}, {1})", torch.special.hermite_polynomial_he),
        Primitive("laguerre", 2, "fusewright::special::laguerre({0}, {1})", torch.special.laguerre_polynomial_l),
        Primitive("legendre", 2, "fusewright::special::legendre({0}, {1})", torch.special.legendre_polynomial_p),
        Primitive("i0", 1, "fusewright::special::i0({0})", torch.special.i0),
        Primitive("i0e", 1, "fusewright::special::i0e({0})", torch.special.i0e),
        Primitive("i1", 1, "fusewright::special::i1({0})", torch.special.i1),
        Primitive("i1e", 1, "fusewright::special::i1e({0})", torch.special.i1e),
        Primitive("floor", 1, "floor({0})", torch.floor, integer="{0}"),
        Primitive("ceil", 1, "ceil({0})", torch.ceil, integer="{0}"),
        Primitive("trunc", 1, "trunc({0})", torch.trunc, integer="{0}"),
        # Halves go to the even neighbour, as in ATen.
        Primitive("round", 1, "rint({0})", torch.round, integer="{0}"),
        Primitive("lt", 2, "{0} < {1}", torch.lt, boolean=True),
        Primitive("le", 2, "{0} <= {1}", torch.le, boolean=True),
        Primitive("gt", 2, "{0} > {1}", torch.gt, boolean=True),
        Primitive("ge", 2, "{0} >= {1}", torch.ge, boolean=True),
        Primitive("eq", 2, "{0} == {1}", torch.eq, boolean=True),
        Primitive("ne", 2, "{0} != {1}", torch.ne, boolean=True),
        Primitive("signbit", 1, "signbit({0})", torch.signbit, boolean=True),
        Primitive("and", 2, "{0} & {1}", torch.bitwise_and),
        Primitive("or", 2, "{0} | {1}", torch.bitwise_or),
        Primitive("xor", 2, "{0} ^ {1}", torch.bitwise_xor),
        Primitive("not", 1, "fusewright::bitwise_not({0})", torch.bitwise_not),
        # By as many bits as the type has or more, or by a negative number: 0 (to the right: the sign).
        Primitive("left_shift", 2, "fusewright::integer::left_shift({0}, {1})", torch.bitwise_left_shift),
        Primitive("right_shift", 2, "fusewright::integer::right_shift({0}, {1})", torch.bitwise_right_shift),
        # where(condition: bool, a, b)
        Primitive("where", 3, "{0} ? {1} : {2}", torch.where),
        # To the node's dtype; float to bool is `!= 0`, float to integer truncates.
        Primitive("cast", 1, "", lambda a: a),
        # A value of its own although it is equal to another: two results that must not share memory.
        Primitive("copy", 1, "{0}", torch.clone),
    )
}


def is_pointwise(op: str) -> bool:
    return op in PRIMITIVES
