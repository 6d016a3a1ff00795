"""What fusewright makes of a model: operators before, regions after, bytes and launches saved, refusals, the floor."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import sympy
import torch
from rich.console import Group
from rich.table import Table
from rich.text import Text

from fusewright.chip import Chip
from fusewright.fusion.plan import Encode, Fallback, FusionPlan, Region, Step
from fusewright.ir.size import evaluate
from fusewright.kernels.base import Program
from fusewright.kernels.gemm_skinny import GemmSkinny
from fusewright.tools.planned import Planned
from fusewright.tools.units import counted
from fusewright.tools.units import flop as _flop
from fusewright.tools.units import size as _size
from fusewright.tools.units import time as _time

Sizes = Mapping[sympy.Symbol, int]


@dataclass(frozen=True)
class RegionRow:
    """One step: the operators that it computes, its family, launches, bytes moved, FLOP of its product, floor (s)."""

    operators: list[str]
    kernel: str
    family: str
    launches: int
    bytes: int
    flop: int
    floor_seconds: float


@dataclass(frozen=True)
class Explanation:
    """One graph of a model (inference, forward or backward). Bytes and FLOP at the sizes of the file's inputs.

    fallbacks: operators that run as ATen. floor_seconds: the sum of the regions' floors at the chip's datasheet rates.
    """

    graph: str
    regions: list[RegionRow]
    fallbacks: list[dict[str, str]]
    refusals: list[dict[str, Any]]
    launches_before: int
    launches_after: int
    bytes_before: int
    bytes_after: int
    floor_seconds: float

    @property
    def apart(self) -> list[tuple[str, str]]:
        """The refusals for a person: operators and the reason."""
        return _once((", ".join(r["operators"]), r["reason"]) for r in self.refusals)

    @property
    def as_aten(self) -> list[tuple[str, str]]:
        """The fallbacks for a person: an operator and the reason."""
        return _once((f["operator"], f["reason"]) for f in self.fallbacks)


def _once(found: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """Each pair once, saying how often it was found: the layers of a model have the same reasons."""
    return [(f"{what} ({n} times)" if n > 1 else what, why) for (what, why), n in Counter(found).items()]


def explain(planned: Planned, sizes: Sizes, chip: Chip) -> Explanation:
    """Describes one planned graph at `sizes`."""
    plan = planned.plan
    steps = [s for s in plan.steps if not isinstance(s, Fallback)]
    rows = [_row(step, planned.programs[step.name], plan, sizes, chip) for step in steps]
    origins = {o for n in planned.graph.nodes() for o in planned.graph.origins.get(n, ())}
    fallback_bytes = sum(_bytes(f, plan, sizes) for f in plan.fallbacks)
    return Explanation(
        graph={"fused": "inference"}.get(planned.name, planned.name),
        regions=rows,
        fallbacks=[{"operator": f.name, "reason": f.reason} for f in plan.fallbacks],
        refusals=[asdict(r) for r in plan.refusals],
        launches_before=len(origins),
        launches_after=sum(r.launches for r in rows) + len(plan.fallbacks),
        bytes_before=sum(int(evaluate(o.bytes, sizes)) for o in origins),
        bytes_after=sum(r.bytes for r in rows) + fallback_bytes,
        floor_seconds=sum(r.floor_seconds for r in rows),
    )


def _row(step: Region | Encode, program: Program, plan: FusionPlan, sizes: Sizes, chip: Chip) -> RegionRow:
    moved = _bytes(step, plan, sizes)
    flop = 0
    if isinstance(step, Region) and step.gemm is not None:
        (m, k), n = step.gemm.a.shape, step.gemm.b.shape[1]
        flop = 2 * int(evaluate(m, sizes)) * int(evaluate(n, sizes)) * int(evaluate(k, sizes))
    return RegionRow(
        operators=step.operators,
        kernel=step.name,
        family=f"{program.family} {program.variant}".strip(),
        launches=len(program.launches) + (program.library is not None),
        bytes=moved,
        flop=flop,
        floor_seconds=max(moved / chip.bandwidth, flop / rates(chip)[rate_name(step, program)]),
    )


def rates(chip: Chip) -> dict[str, float]:
    """Operations per second that bound arithmetic, by name. A product by halves is three of fp16, or one; by TF32 three
    of that."""
    tf32 = chip.fp16 / 2
    halves = {"float32 by halves": chip.fp16 / 3, "TF32 by halves": chip.fp16}
    own = {"float32": chip.fp32, "float16": chip.fp16, "float64": chip.fp64, "TF32": tf32}
    return {**own, **halves, "float32 by TF32": tf32 / 3}


def rate_name(step: Region | Encode, program: Program) -> str:
    """Which of the `rates` bounds a step that is computed so."""
    gemm = step.gemm if isinstance(step, Region) else None
    if gemm is None:
        return "float32"
    if gemm.encoded:
        return "float32 by halves" if gemm.encoded[0].halves.planes == 2 else "TF32 by halves"
    if gemm.tf32:
        return "TF32"
    if gemm.a.dtype == torch.float32 and program.family == GemmSkinny().name:
        return "float32 by TF32"
    return {torch.float16: "float16", torch.bfloat16: "float16", torch.float64: "float64"}.get(gemm.a.dtype, "float32")


def touched(step: Step) -> list[str]:
    """Each buffer that a step reads or writes, once; none that it samples."""
    sampled = step.sampled() if isinstance(step, Encode) else []
    return [name for name in dict.fromkeys((*step.reads(), *step.writes())) if name not in sampled]


def _bytes(step: Step, plan: FusionPlan, sizes: Sizes) -> int:
    return sum(int(evaluate(plan.buffers[name].bytes, sizes)) for name in touched(step))


def as_dict(explanations: Sequence[Explanation], header: Mapping[str, Any]) -> dict[str, Any]:
    """Inference at the top level, the training graphs under `training`."""
    first, *training = (asdict(e) for e in explanations)
    return {**header, **first, "training": training}


def render(explanations: Sequence[Explanation], header: Mapping[str, Any], chip: Chip) -> Group:
    """For a terminal."""
    parts: list[Any] = [Text(f"{header['model']}: {header['inputs']}, for {header['arch']} ({chip.name})", "bold")]
    for e in explanations:
        before = counted(e.launches_before, "operator", "operators")
        after = counted(e.launches_after, "launch", "launches")
        table = Table(title=f"{e.graph}: {before}, {after}", title_justify="left")
        table.add_column("operators", overflow="fold")
        table.add_column("kernel", overflow="fold")
        for figure in ("moves", "computes", "floor"):
            table.add_column(figure, justify="right", no_wrap=True)
        for r in e.regions:
            table.add_row(
                ", ".join(r.operators) or "copy", r.family, _size(r.bytes), _flop(r.flop), _time(r.floor_seconds)
            )
        for f in e.fallbacks:
            table.add_row(f["operator"], Text("ATen", "yellow"), "", "", "")
        parts.append(table)
        # ATen operators have no floor, and a graph of nothing else has none.
        floor = f"; floor {_time(e.floor_seconds)} at {chip.name}'s datasheet rates" if e.regions else ""
        moved = f"  moves {_size(e.bytes_after)} instead of {_size(e.bytes_before)} ({_difference(e)})"
        parts.append(Text(moved + floor))
        parts += [Text(f"  {operator} runs as ATen: {reason}", "yellow") for operator, reason in e.as_aten]
        parts += [Text(f"  {operators} apart: {reason}", "dim") for operators, reason in e.apart]
    return Group(*parts)


def _difference(e: Explanation) -> str:
    saved = e.bytes_before - e.bytes_after
    if saved >= 0:
        return f"{_size(saved)} less"
    halves = any(r.family == "split_f16" for r in e.regions)
    return f"{_size(-saved)} more" + (", since tensor cores read float32 as halves" if halves else "")
