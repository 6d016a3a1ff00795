"""Writes `docs/operators.md`: every pointwise operator of ATen, and whether it is fused.

The operators are those that torch tags as pointwise; what Inductor's decompositions leave of them comes first. The
status is read off the operator table, the lowerings and the decompositions, so that the page cannot promise more than
capture does. Run `python -m fusewright.tools.operator_table FILE`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch._inductor.decomposition import select_decomp_table

from fusewright.capture.backend import decompositions
from fusewright.capture.lowerings import LOWERINGS
from fusewright.ir.ops import ROWS

_BESSEL = "several approximations, chosen by the element; ATen has no gradient for it"
_GAMMA = "series and continued fractions, chosen by the element"
# Why ATen computes an operator.
REASONS = {
    "equal": "one answer for a whole tensor",
    "frexp": "two results, of two dtypes",
    "igamma": _GAMMA,
    "igammac": _GAMMA,
    **dict.fromkeys(("special_airy_ai", "special_spherical_bessel_j0"), _BESSEL),
    **{f"special_modified_bessel_i{n}": _BESSEL for n in (0, 1)},
    **{f"special_bessel_{kind}": _BESSEL for kind in ("j0", "j1", "y0", "y1")},
    **{f"special_{scaled}modified_bessel_k{n}": _BESSEL for scaled in ("", "scaled_") for n in (0, 1)},
}

FORMULA, LOWERED, APART, ATEN = "fused", "fused: a rule of capture", "fused: torch takes it apart", "runs as ATen"


@dataclass(frozen=True)
class Operator:
    """An ATen operator. left: Inductor's decompositions leave at least one of its overloads."""

    name: str
    overloads: tuple[str, ...]
    left: bool
    status: str
    note: str


def operators() -> list[Operator]:
    """Every functional operator with torch's tag `pointwise`, in order of name."""
    inductor, ours = select_decomp_table(), decompositions()
    found = []
    for name in sorted(dir(torch.ops.aten)):
        packet = getattr(torch.ops.aten, name)
        overloads = [getattr(packet, o) for o in packet.overloads()] if hasattr(packet, "overloads") else []
        overloads = [o for o in overloads if torch.Tag.pointwise in o.tags and _functional(o)]
        if overloads:
            left = any(o not in inductor and not _composite(o) for o in overloads)
            status, note = _status(name, overloads, ours)
            found.append(Operator(name, tuple(o._overloadname for o in overloads), left, status, note))
    return found


def gradients() -> list[str]:
    """The rows that are the gradient of an operator, which torch does not tag."""
    return sorted(name for name in ROWS if name.endswith("_backward"))


def _functional(overload: Any) -> bool:
    return not overload._schema.is_mutable and not any(a.name == "out" for a in overload._schema.arguments)


def _composite(overload: Any) -> bool:
    """Whether torch itself takes the operator apart before any compiler sees it."""
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(overload.name(), "CompositeImplicitAutograd"))


def _status(name: str, overloads: Sequence[Any], ours: Any) -> tuple[str, str]:
    if name in ROWS:
        return FORMULA, "" if ROWS[name].widens else "16-bit floats run as ATen"
    if name in LOWERINGS:
        return LOWERED, ""
    if all(_composite(o) or o in ours for o in overloads):
        return APART, ""
    return ATEN, REASONS[name]


def page() -> str:
    """The whole page."""
    every = operators()
    left = [o for o in every if o.left]
    fused = sum(o.status != ATEN for o in left)
    return "\n".join(
        [
            "# Pointwise operators",
            "",
            f"Written by `python -m fusewright.tools.operator_table` with torch {_version()}; do not edit.",
            "",
            f"Of the {len(left)} pointwise operators that Inductor's decompositions leave, {fused} are fused: computed "
            "in a kernel together with",
            "whatever is next to them, forward and backward. The others run as ATen's own kernels, with the rest of "
            "the model fused around them.",
            "",
            "- dtypes: float16, bfloat16 (both computed in float32 and rounded once), float32, float64, bool, uint8, "
            "int8, int16, int32, int64.",
            "  Complex and quantised tensors run as ATen.",
            "- Promotion of dtypes, broadcasting, NaN, infinities and signed zeros are ATen's; functions are CUDA's "
            "accurate ones, as in ATen",
            "  (activations in 16 bits: [precision](precision.md)).",
            "- Not covered: random operators (`bernoulli`, `rand_like`, dropout in training, `rrelu` in training). "
            "They run as ATen and draw",
            "  from torch's generator; the gradient of dropout is fused.",
            "",
            "## What Inductor's decompositions leave",
            "",
            *_table(left),
            "",
            "## What they take apart",
            "",
            "fusewright has a formula of its own for most of these.",
            "",
            *_table([o for o in every if not o.left]),
            "",
            "## Gradients",
            "",
            "Operators of backward passes, all fused. The gradient of any other operator is made of operators above.",
            "",
            ", ".join(f"`{name}`" for name in gradients()),
            "",
        ]
    )


def _table(rows: Sequence[Operator]) -> list[str]:
    lines = ["| operator | overloads | status |", "|---|---|---|"]
    for o in rows:
        status = f"{o.status}: {o.note}" if o.note else o.status
        lines.append(f"| `{o.name}` | {', '.join(o.overloads)} | {status} |")
    return lines


def _version() -> str:
    return ".".join(torch.__version__.split(".")[:2])


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(page())
