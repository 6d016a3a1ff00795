"""The promise of `fusewright.linear`: a product and what follows it are one kernel, or an error says what is not."""

from __future__ import annotations

from collections.abc import Sequence

from fusewright.errors import CannotFuse
from fusewright.fusion.plan import Encode, Fallback, FusionPlan, Region, Step

_AT_ITS_PLACE = "the kernel computes results of the product's shape, each element from what lies at its place"


def one_kernel(plan: FusionPlan, backward: bool, *, call: str | None) -> None:
    """Raises CannotFuse if something runs as ATen, or, but in a backward, in another kernel than the product's.

    call: the product's `Origin.call`; an epilogue may have products of its own.
    """
    products = [r for r in plan.regions if r.gemm and any(o.call == call for o in r.origins)]
    product = min(products, key=lambda r: r.origins, default=None)  # a later one reads its result
    apart: Sequence[Step] = plan.fallbacks
    if product and not backward:
        allowed = [product, *_operands(plan, product)]
        apart = [s for s in plan.steps if s not in allowed]
    if apart:
        operators = [o for step in apart for o in step.operators] or [step.name for step in apart]
        told = [(tuple(s.operators), s.reason) for s in apart if isinstance(s, Fallback) and s.operators]
        told += [(r.operators, r.reason) for r in plan.refusals if set(r.operators) & set(operators)]
        # What merely computes with the results of others has a kernel, and is not to blame.
        blamed = [o for names, _ in told for o in names if o in operators] or operators
        raise CannotFuse(_refusal(blamed, [reason for _, reason in told] or [_AT_ITS_PLACE]))
    if not (product or backward):
        raise CannotFuse(
            "the epilogue's results do not depend on the product; let them, or compute them without fusewright.linear"
        )


def _operands(plan: FusionPlan, product: Region) -> list[Step]:
    """The steps that make what the product multiplies: casts under autocast, copies, halves (a backward's as well)."""
    assert product.gemm is not None
    wanted = {product.gemm.a.buffer, product.gemm.b.buffer, *(e.buffer for e in product.gemm.encoded or ())}
    made: list[Step] = []
    for step in reversed(plan.steps):
        makes = isinstance(step, Region) and step is not product and wanted.issuperset(step.writes())
        if makes or isinstance(step, Encode):
            wanted.update(step.reads())
            made.append(step)
    return made


def _refusal(operators: Sequence[str], reasons: Sequence[str]) -> str:
    return (
        f"{', '.join(dict.fromkeys(operators))} cannot be fused with the product: {'; '.join(dict.fromkeys(reasons))}. "
        "Apply it to what fusewright.linear returns, or use fusewright.compile, which lets it run apart"
    )
