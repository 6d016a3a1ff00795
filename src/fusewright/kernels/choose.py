"""Regions → programs, ranked by the families' cost models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain, pairwise

import sympy

from fusewright.chip import Chip
from fusewright.errors import UnsupportedDtype
from fusewright.fusion.plan import FusionPlan, Gemm, Region
from fusewright.ir.size import TYPICAL_SIZE, Size
from fusewright.kernels.base import Family, Program, Refused
from fusewright.kernels.gemm_simt import GemmSimt
from fusewright.kernels.gemm_skinny import GemmSkinny, with_more_rows
from fusewright.kernels.gemm_sm90 import ARCH, GemmSm90, HalfProducts
from fusewright.kernels.library import Library
from fusewright.kernels.pointwise import Pointwise
from fusewright.kernels.split_f16 import encode_program
from fusewright.passes.format import Capabilities

# Those whose launches run everywhere: on the GPU, in the simulator and in written files.
_SKINNY = GemmSkinny()
PORTABLE: tuple[Family, ...] = (GemmSimt(), _SKINNY, Pointwise())

# A program that is predicted to take this many times the best one's time is not worth measuring; nor is another of its
# family that is predicted to take so many times the family's best, or comes after so many.
_HOPELESS, _CLOSE, _FEW = 3.0, 1.2, 3


def capabilities(chip: Chip, *, library: bool, tensor_maps: bool = False, tf32: bool = False) -> Capabilities | None:
    """What the format stage may count on; None where no product reads halves. The arguments are as for `candidates`.

    tf32: float32 products need no more than TF32's precision.
    """
    return HalfProducts(chip, tf32, library) if tensor_maps and chip.arch == ARCH else None


def candidates(
    plan: FusionPlan, chip: Chip, *, library: bool, tensor_maps: bool = False
) -> Mapping[str, Sequence[Program]]:
    """The programs of every region and encoding by its name, our own best first; library: torch's products compete as
    the last one. tensor_maps: launches may take tensor maps.
    """
    families: Sequence[Family] = (GemmSm90(), *PORTABLE) if tensor_maps else PORTABLE
    found: dict[str, Sequence[Program]] = {step.name: [encode_program(step, chip)] for step in plan.encodes}
    for region in plan.regions:
        # The format stage has decided for halves: what does not read them does not compete.
        encoded = region.gemm is not None and region.gemm.encoded is not None
        found[region.name] = _programs(region, chip, (GemmSm90(),) if encoded else families, library and not encoded)
    ahead = _may_read_ahead(plan)
    return {n: programs if n in ahead else [_in_order(p) for p in programs] for n, programs in found.items()}


def contenders(found: Sequence[Program]) -> list[Program]:
    """Of a region's programs those to be measured: each family's best few, and the library's."""
    by_family: dict[str, list[Program]] = {}
    for program in found:
        by_family.setdefault(program.family, []).append(program)
    close = [p for several in by_family.values() for p in several[:_FEW] if p.cost <= _CLOSE * several[0].cost]
    return [p for p in close if p.library or p.cost <= _HOPELESS * found[0].cost]


def _may_read_ahead(plan: FusionPlan) -> set[str]:
    """Regions whose launch may read before the one before it has ended: that one is of the same call, where both have
    something to do, and what is read ahead was there before the call. What runs before a call, such as an optimizer,
    may have written anything."""
    written = {name for step in plan.steps for name in step.writes()}
    return {
        step.name
        for before, step in pairwise(plan.steps)
        if isinstance(before, Region) and isinstance(step, Region) and step.gemm and step.gemm.b.buffer not in written
        if _changing(before) <= _changing(step)
    }


def _changing(region: Region) -> set[Size]:
    """The sizes that may be 0, so that nothing is launched."""
    return {n for n in (*region.rows, region.columns) if not isinstance(n, int)}


def _in_order(program: Program) -> Program:
    """The program with launches that read ahead only when those before them have ended."""
    if not any(launch.ahead for launch in program.launches):
        return program
    in_order = [replace(launch, early=False, ahead=()) if launch.ahead else launch for launch in program.launches]
    return replace(program, launches=tuple(in_order))


def _programs(region: Region, chip: Chip, own: Sequence[Family], library: bool) -> list[Program]:
    families: Sequence[Family] = (*own, Library()) if library else own
    refusals = {f.name: f.supports(region, chip) for f in families}
    found = list(chain.from_iterable(f.programs(region, chip) for f in families if refusals[f.name] is None))
    found.sort(key=lambda p: (p.library is not None, p.cost))
    if region.gemm and isinstance(region.gemm.a.shape[0], sympy.Expr) and refusals.get(_SKINNY.name, _SKINNY) is None:
        many = _for_many_rows(region, region.gemm, chip, own, found)
        found = [with_more_rows(p, many) if p.family == _SKINNY.name else p for p in found]
    if not found:
        reasons = "; ".join(f"{r.family}: {r.reason}" for r in refusals.values() if isinstance(r, Refused))
        raise UnsupportedDtype(f"no kernel computes {', '.join(region.operators)} ({reasons})")
    return found


def _for_many_rows(
    region: Region, gemm: Gemm, chip: Chip, families: Sequence[Family], found: Sequence[Program]
) -> Program:
    """Which of a region's programs is the best where rows, of which there may be any number, are many."""
    larger = replace(region, gemm=replace(gemm, a=replace(gemm.a, shape=(TYPICAL_SIZE, gemm.a.shape[1]))))
    supporting = [f for f in families if f.supports(larger, chip) is None]
    best = min(chain.from_iterable(f.programs(larger, chip) for f in supporting), key=lambda p: p.cost)
    return next(p for p in found if (p.family, p.variant) == (best.family, best.variant))
