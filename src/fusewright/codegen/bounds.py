"""What is known of the values of expressions: that they are at least 0, or at least 1."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from fusewright.fusion.expression import Apply, Constant, Expression, walk

UNKNOWN = -math.inf


def lower_bounds(roots: Iterable[Expression]) -> dict[Expression, float]:
    """1, 0 or -infinity for every expression under `roots`: no value is less, though it may be NaN.

    These three suffice to tell denominators that are at least 1, and rounding leaves them alone: x + y, x · y and casts
    round monotonically, and 0 and 1 are numbers of every format.
    """
    bounds: dict[Expression, float] = {}
    for expression in walk(roots):
        if isinstance(expression, Constant):
            bounds[expression] = _of_constant(expression)
        elif isinstance(expression, Apply) and expression.dtype.is_floating_point:
            bounds[expression] = _of_result(expression, bounds)
        else:
            bounds[expression] = UNKNOWN
    return bounds


def _of_constant(constant: Constant) -> float:
    if not isinstance(constant.value, (int, float)) or not constant.value >= 0:
        return UNKNOWN
    return 1.0 if constant.value >= 1 else 0.0


def _of_result(expression: Apply, bounds: Mapping[Expression, float]) -> float:
    operands = expression.operands
    low = [bounds[o] for o in operands]
    match expression.op:
        case "exp" | "exp2" | "exp_narrow" | "normal_cdf" | "normal_cdf_narrow":
            return 0.0
        case "abs" | "sqrt":
            return max(low[0], 0.0)
        case "add":
            return max(low) if min(low) >= 0 else UNKNOWN
        case "mul":
            return max(low[0], 0.0) if operands[0] is operands[1] else min(low)
        case "div" | "div_narrow":
            return 0.0 if low[0] >= 0 and low[1] >= 1 else UNKNOWN  # 1 / -0 is -infinity
        case "maximum":
            return max(low)
        case "minimum" | "fmin" | "fmax":  # of NaN and a number fmax gives the number, which may be the lesser bound's
            return min(low)
        case "where":
            return min(low[1:])
        case "cast" | "copy":  # of an integer, which NaN may have become, nothing is known
            return low[0]
    return UNKNOWN
