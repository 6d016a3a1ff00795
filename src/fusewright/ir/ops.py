"""The operator table: what each pointwise ATen operator computes, one row an operator.

A row's formula is written over `Value`s that already have the operator's shape and computation dtype; arguments that
are not tensors arrive as Python numbers. The formula is at once what kernels compute (through the primitives' CUDA
text), what the reference interpreter computes, and what the rewrite rules see, so a predicate that forward and
backward share (the sign of a pre-activation, say) is one node of the joint graph.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, cast

from fusewright.ir.value import (
    Value,
    absolute,
    constant,
    exp,
    exp2,
    expm1,
    filled,
    floor,
    log,
    log1p,
    maximum,
    minimum,
    normal_cdf,
    rsqrt,
    sqrt,
    tanh,
    trunc,
    unary,
    where,
)


@dataclass(frozen=True)
class Row:
    """formula: values and numbers, in the operator's argument order → value.

    computes_in: the dtype that tensor operands are converted to: that of the result; the one the operands promote to
    (comparisons); or bool (logical operators). Boolean conditions stay as they are where the result is not bool.
    widens: 16-bit floats compute in float32; without it their calls are left to ATen. rounds: numbers are first rounded
    to the dtype of the tensors that they are compared with. narrow: where the result has 16 bits, it is computed by
    narrow primitives.
    """

    formula: Callable[..., Value]
    computes_in: Literal["result", "operands", "bool"] = "result"
    widens: bool = True
    rounds: bool = False
    narrow: bool = False


def _binary(name: str) -> Callable[[Any, Any], Value]:
    """The function of two operands, one of which may be a number, that applies primitive `name`."""

    def formula(a: Any, b: Any) -> Value:
        a, b = _values(a, b)
        return a.apply(name, a, b)  # type: ignore[no-any-return]

    return formula


def _clamp(x: Value, low: Any = None, high: Any = None) -> Value:
    if low is not None:
        x = maximum(x, low)
    return x if high is None else minimum(x, high)


def _divide(a: Any, b: Any, rounding_mode: str | None = None) -> Value:
    divisor = b
    a, b = _values(a, b)
    quotient = a / b
    if rounding_mode is None:
        return cast(Value, quotient)
    if rounding_mode == "trunc":
        return trunc(quotient) if a.dtype.is_floating_point else quotient
    remainder = a.apply("fmod", a, b)
    crossed = _opposed(remainder, divisor)
    if not a.dtype.is_floating_point:
        return where(crossed, quotient - 1, quotient)
    # ATen's floor division: exact where a/b rounds up to an integer that a does not reach.
    exact = (a - remainder) / b
    exact = where(crossed, exact - 1, exact)
    rounded = floor(exact)
    rounded = where(exact - rounded > 0.5, rounded + 1, rounded)
    if not isinstance(divisor, Value):
        return rounded if divisor != 0 else quotient
    return where(b == 0, quotient, rounded)


def _remainder(a: Any, b: Any) -> Value:
    divisor = b
    a, b = _values(a, b)
    r = a.apply("fmod", a, b)
    return where(_opposed(r, divisor), r + b, r)


def _opposed(remainder: Value, divisor: Any) -> Value:
    """Whether a remainder is not zero and has the other sign than the divisor."""
    if isinstance(divisor, Value):
        return (remainder != 0) & ((divisor < 0) ^ (remainder < 0))
    return remainder > 0 if divisor < 0 and remainder.dtype.is_signed else remainder < 0


def _values(a: Any, b: Any) -> tuple[Any, Any]:
    """Both operands as values; one of them may be a number."""
    return (a if isinstance(a, Value) else constant(b, a)), (b if isinstance(b, Value) else constant(a, b))


def _power(x: Any, exponent: Any) -> Value:
    if not isinstance(x, Value):
        return exponent.apply("pow", x, exponent)  # type: ignore[no-any-return]
    by_hand: dict[Any, Callable[[Value], Value]] = {
        1: lambda x: x,
        2: lambda x: x * x,
        3: lambda x: x * x * x,
        0.5: sqrt,
        -0.5: rsqrt,
        -1: lambda x: 1 / x,
        -2: lambda x: 1 / (x * x),
    }
    if isinstance(exponent, (int, float)) and exponent in by_hand and (x.dtype.is_floating_point or exponent in (2, 3)):
        return by_hand[exponent](x)
    return x.apply("pow", x, exponent)


def _sigmoid(x: Value) -> Value:
    return 1 / (1 + exp(-x))


def _elu(x: Value, alpha: float = 1.0, scale: float = 1.0, input_scale: float = 1.0) -> Value:
    return where(x <= 0, expm1(x * input_scale) * (alpha * scale), x * scale)


def _elu_backward(g: Value, alpha: float, scale: float, input_scale: float, is_result: bool, y: Value) -> Value:
    if is_result:
        return where(y <= 0, g * input_scale * (y + alpha * scale), g * scale)
    return where(y <= 0, g * (input_scale * alpha * scale) * exp(y * input_scale), g * scale)


_TANH_SCALE = math.sqrt(2 / math.pi)
_CUBIC = 0.044715


def _gelu(x: Value, approximate: str = "none") -> Value:
    if approximate == "none":
        return x * normal_cdf(x)
    u = _TANH_SCALE * (x + _CUBIC * (x * x * x))
    return x * _sigmoid(2 * u) if x.narrow else 0.5 * x * (1 + tanh(u))


def _gelu_backward(g: Value, x: Value, approximate: str = "none") -> Value:
    if approximate == "none":
        density = exp(x * x * -0.5) * (1 / math.sqrt(2 * math.pi))
        return g * (normal_cdf(x) + x * density)
    u = _TANH_SCALE * (x + _CUBIC * (x * x * x))
    slope = _TANH_SCALE * (1 + 3 * _CUBIC * (x * x))
    if x.narrow:  # (1 + tanh(u)) / 2 is sigmoid(2u), which is cheaper, but in float not as accurate near 0
        s = _sigmoid(2 * u)
        return g * (s + x * (2 * s * (1 - s) * slope))
    t = tanh(u)
    return g * (0.5 * (1 + t) + 0.5 * x * ((1 - t * t) * slope))


def _tanh_softplus(x: Value) -> Value:
    """tanh(log1p(e)) with e = exp(x), as the quotient that it is: half of the instructions.

    Beyond 20 it is 1 in float64, too, and e² would overflow.
    """
    e = exp(minimum(x, 20))
    n = e * (e + 2)
    return n / (n + 2)


def _mish_backward(g: Value, x: Value) -> Value:
    """With t = n / d as above: sigmoid(x) · (1 - t²), where 1 - t² cancels, is 4 e (e + 1) / d²; nothing beyond 20."""
    e = exp(minimum(x, 20))
    n = e * (e + 2)
    d = n + 2
    return g * (n / d + x * where(x < 20, 4 * e * (e + 1) / (d * d), 0))


def _softplus(x: Value, beta: float = 1, threshold: float = 20) -> Value:
    return where(x * beta > threshold, x, log1p(exp(x * beta)) / beta)


def _softplus_backward(g: Value, x: Value, beta: float, threshold: float) -> Value:
    z = exp(x * beta)
    return where(x * beta > threshold, g, g * z / (z + 1))


def _silu_backward(g: Value, x: Value) -> Value:
    s = _sigmoid(x)
    return g * s * (1 + x * (1 - s))


def _lerp(a: Value, b: Value, weight: Value | float) -> Value:
    if isinstance(weight, Value):
        return where(absolute(weight) < 0.5, a + weight * (b - a), b - (b - a) * (1 - weight))
    return a + weight * (b - a) if abs(weight) < 0.5 else b - (b - a) * (1 - weight)


def _round(x: Value, decimals: int = 0) -> Value:
    nearest = unary("round")
    if decimals == 0:
        return nearest(x)
    power = 10.0 ** abs(decimals)
    return nearest(x * power) / power if decimals > 0 else nearest(x / power) * power


def _larger(a: Value, b: Value) -> Value:
    """Of which NaN is no operand: the other one is the result."""
    return a.apply("fmax", a, b) if a.dtype.is_floating_point else maximum(a, b)


def _smaller(a: Value, b: Value) -> Value:
    return a.apply("fmin", a, b) if a.dtype.is_floating_point else minimum(a, b)


def _x_times(function: Callable[[Value], Value]) -> Callable[[Any, Any], Value]:
    """x · function(y), which is 0 where x is 0, unless y is NaN."""

    def formula(x: Any, y: Any) -> Value:
        x, y = (v if isinstance(v, Value) else filled(other, v) for v, other in ((x, y), (y, x)))
        return where(y != y, y, where(x == 0, 0, x * function(y)))

    return formula


def _logaddexp(a: Value, b: Value) -> Value:
    return where((absolute(a) == math.inf) & (a == b), a, maximum(a, b) + log1p(exp(-absolute(a - b))))


def _logaddexp2(a: Value, b: Value) -> Value:
    finite = maximum(a, b) + log1p(exp2(-absolute(a - b))) * (1 / math.log(2))
    return where((absolute(a) == math.inf) & (a == b), a, finite)


def _logit(x: Value, eps: float | None = None) -> Value:
    if eps is None:
        return where(x == 1, math.inf, log(x / (1 - x)))
    x = where(x < eps, eps, where(x > 1 - eps, 1 - eps, x))
    return log(x / (1 - x))


def _logit_backward(g: Value, x: Value, eps: float | None = None) -> Value:
    slope = g / (x * (1 - x))
    if eps is not None and eps >= 0:
        return where((x < eps) | (x > 1 - eps), 0, slope)
    return where((x < 0) | (x > 1), math.nan, slope)


def _log_ndtr(x: Value) -> Value:
    """x²/2 is more accurate than ATen's square of x/√2. Its gradient cancels it against the result."""
    t = x * math.sqrt(0.5)
    return where(x < -1, log(unary("erfcx")(-t) / 2) - x * (x * 0.5), log1p(-unary("erfc")(t) / 2))


def _polygamma(n: int, x: Value) -> Value:
    if n < 2:
        return unary("trigamma" if n else "digamma")(x)
    factorial = float(math.factorial(n)) if n <= 170 else math.inf  # of what float64 holds
    return x.apply("zeta", n + 1, x) * (factorial if n % 2 else -factorial)


def _ldexp(x: Value, exponent: Any) -> Value:
    """x · 2^exponent, by the exponent's whole part without overflow on the way."""
    exponent = exponent if isinstance(exponent, Value) else filled(x, exponent)
    whole = trunc(maximum(minimum(exponent, 5000), -5000))  # more than any exponent of float64
    return x.apply("ldexp", x * exp2(exponent - whole), whole)


def _sinc(x: Value) -> Value:
    product = x * math.pi
    return where(x == 0, 1, unary("sin")(product) / product)


def _shifted(name: str) -> Callable[[Any, Any], Value]:
    """Of a polynomial over [-1, 1], the one over [0, 1]."""

    def formula(x: Any, degree: Any) -> Value:
        x = x if isinstance(x, Value) else filled(degree, x)
        return _binary(name)(x + x - 1, degree)

    return formula


def _scaled(x: Any, factor: Any) -> Any:
    return x if factor == 1 else x * factor


ROWS: dict[str, Row] = {
    # arithmetic
    "add": Row(lambda a, b, alpha=1: a + _scaled(b, alpha)),
    "sub": Row(lambda a, b, alpha=1: a - _scaled(b, alpha)),
    "rsub": Row(lambda a, b, alpha=1: b - _scaled(a, alpha)),
    "mul": Row(lambda a, b: a * b),
    "div": Row(_divide),
    "floor_divide": Row(lambda a, b: _divide(a, b, "floor")),
    "neg": Row(lambda x: -x),
    "abs": Row(absolute),
    "sign": Row(unary("sign")),
    "sgn": Row(unary("sign")),
    "reciprocal": Row(lambda x: 1 / x),
    "square": Row(lambda x: x * x),
    "sqrt": Row(sqrt),
    "rsqrt": Row(rsqrt),
    "pow": Row(_power),
    "fmod": Row(_binary("fmod")),
    "remainder": Row(_remainder),
    "addcmul": Row(lambda x, a, b, value=1: x + _scaled(a * b, value)),
    "addcdiv": Row(lambda x, a, b, value=1: x + _scaled(a / b, value)),
    "lerp": Row(_lerp),
    "minimum": Row(minimum),
    "maximum": Row(maximum),
    "clamp": Row(_clamp),
    "clamp_min": Row(lambda x, low: _clamp(x, low)),
    "clamp_max": Row(lambda x, high: _clamp(x, None, high)),
    "fmax": Row(_larger),
    "fmin": Row(_smaller),
    "frac": Row(lambda x: x - trunc(x)),
    "deg2rad": Row(lambda x: x * (math.pi / 180)),
    "rad2deg": Row(lambda x: x * (180 / math.pi)),
    "angle": Row(lambda x: where(x < 0, math.pi, where(x != x, x, 0))),
    "conj_physical": Row(lambda x: x),
    "copysign": Row(_binary("copysign")),
    "heaviside": Row(lambda x, at_zero: where(x == 0, at_zero, (x > 0).to(x.dtype))),
    # The neighbour of a 16-bit float is none of its neighbours in float32.
    "nextafter": Row(_binary("nextafter"), widens=False),
    "gcd": Row(_binary("gcd")),
    "lcm": Row(_binary("lcm")),
    # elementary functions
    **{
        name: Row(unary(name))
        for name in (
            *("exp", "exp2", "expm1", "log", "log2", "log10", "log1p", "erf", "erfc", "floor", "ceil", "trunc"),
            *("sin", "cos", "tan", "asin", "acos", "atan", "sinh", "cosh", "asinh", "acosh", "atanh"),
        )
    },
    "tanh": Row(tanh, narrow=True),
    "round": Row(_round),
    "atan2": Row(_binary("atan2")),
    "hypot": Row(_binary("hypot")),
    "xlogy": Row(_x_times(log)),
    "logaddexp": Row(_logaddexp),
    "logaddexp2": Row(_logaddexp2),
    "logit": Row(_logit),
    "logit_backward": Row(_logit_backward),
    "sinc": Row(_sinc),
    "ldexp": Row(_ldexp),
    # special functions
    **{name: Row(unary(name)) for name in ("erfinv", "lgamma", "digamma", "i0")},
    **{f"special_{name}": Row(unary(name)) for name in ("i0e", "i1", "i1e", "erfcx", "ndtri")},
    **{f"special_chebyshev_polynomial_{kind}": Row(_binary(f"chebyshev_{kind}")) for kind in "tuvw"},
    **{f"special_shifted_chebyshev_polynomial_{kind}": Row(_shifted(f"chebyshev_{kind}")) for kind in "tuvw"},
    "special_hermite_polynomial_h": Row(_binary("hermite_h")),
    "special_hermite_polynomial_he": Row(_binary("hermite_he")),
    "special_laguerre_polynomial_l": Row(_binary("laguerre")),
    "special_legendre_polynomial_p": Row(_binary("legendre")),
    "special_zeta": Row(_binary("zeta")),
    "special_entr": Row(lambda x: where(x < 0, -math.inf, where(x == 0, 0, -x * log(x)))),
    "special_log_ndtr": Row(_log_ndtr),
    "special_xlog1py": Row(_x_times(log1p)),
    "polygamma": Row(_polygamma),
    # comparisons and logic
    **{name: Row(_binary(name), "operands", rounds=True) for name in ("lt", "le", "gt", "ge", "eq", "ne")},
    "where": Row(where),
    "masked_fill": Row(lambda x, mask, value: where(mask, value, x)),
    "isnan": Row(lambda x: x != x, "operands"),
    "isinf": Row(lambda x: absolute(x) == math.inf if x.dtype.is_floating_point else x != x, "operands"),
    "isposinf": Row(lambda x: x == math.inf if x.dtype.is_floating_point else x != x, "operands"),
    "isneginf": Row(lambda x: x == -math.inf if x.dtype.is_floating_point else x != x, "operands"),
    "signbit": Row(lambda x: unary("signbit")(x) if x.dtype.is_floating_point else x < 0, "operands"),
    "logical_and": Row(lambda a, b: a & b, "bool"),
    "logical_or": Row(lambda a, b: a | b, "bool"),
    "logical_xor": Row(lambda a, b: a ^ b, "bool"),
    "logical_not": Row(lambda a: ~a, "bool"),
    **{f"bitwise_{name}": Row(_binary(name)) for name in ("and", "or", "xor", "left_shift", "right_shift")},
    "__lshift__": Row(_binary("left_shift")),
    "__rshift__": Row(_binary("right_shift")),
    "bitwise_not": Row(lambda a: ~a),
    # activations and their gradients
    "relu": Row(lambda x: where(x <= 0, 0, x)),
    "threshold": Row(lambda x, threshold, value: where(x <= threshold, value, x)),
    "threshold_backward": Row(lambda g, x, threshold: where(x <= threshold, 0, g)),
    "leaky_relu": Row(lambda x, slope=0.01: where(x > 0, x, x * slope)),
    "leaky_relu_backward": Row(lambda g, x, slope, _is_result: where(x > 0, g, g * slope)),
    "sigmoid": Row(_sigmoid, narrow=True),
    "sigmoid_backward": Row(lambda g, y: g * (1 - y) * y),
    "tanh_backward": Row(lambda g, y: g * (1 - y * y)),
    "silu": Row(lambda x: x / (1 + exp(-x)), narrow=True),
    "silu_backward": Row(_silu_backward, narrow=True),
    "mish": Row(lambda x: x * _tanh_softplus(x), narrow=True),
    "mish_backward": Row(_mish_backward, narrow=True),
    "gelu": Row(_gelu, narrow=True),
    "gelu_backward": Row(_gelu_backward, narrow=True),
    "elu": Row(_elu, narrow=True),
    "elu_backward": Row(_elu_backward, narrow=True),
    "celu": Row(lambda x, alpha=1.0: _elu(x, alpha, 1.0, 1 / alpha), narrow=True),
    "_prelu_kernel": Row(lambda x, weight: where(x > 0, x, x * weight)),
    "softplus": Row(_softplus, narrow=True),
    "softplus_backward": Row(_softplus_backward, narrow=True),
    "hardtanh": Row(lambda x, low=-1.0, high=1.0: _clamp(x, low, high)),
    "hardtanh_backward": Row(lambda g, x, low, high: where((x <= low) | (x >= high), 0, g)),
    "hardswish": Row(lambda x: x * _clamp(x + 3, 0, 6) / 6),
    "hardswish_backward": Row(lambda g, x: where(x <= -3, 0, where(x < 3, g * (x / 3 + 0.5), g))),
    "hardsigmoid": Row(lambda x: _clamp(x + 3, 0, 6) / 6),
    "hardsigmoid_backward": Row(lambda g, x: where((x > -3) & (x < 3), g / 6, 0)),
    "softshrink": Row(lambda x, l=0.5: where(x > l, x - l, where(x < -l, x + l, x * 0))),
    "softshrink_backward": Row(lambda g, x, l: where((x >= -l) & (x <= l), 0, g), rounds=True),
    "hardshrink": Row(lambda x, l=0.5: where((x >= -l) & (x <= l), 0, x), rounds=True),
    "hardshrink_backward": Row(lambda g, x, l: where((x >= -l) & (x <= l), 0, g), rounds=True),
    "native_dropout_backward": Row(lambda g, mask, scale: g * (mask.to(g.dtype) * scale)),
}
