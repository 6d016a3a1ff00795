"""`fusewright report`: one page that shows a model before and after, every kernel, and what was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import jinja2
import torch
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import CudaLexer
from rich.console import Console

from fusewright import __version__
from fusewright.capture.model import CapturedModel
from fusewright.chip import Chip
from fusewright.codegen.launch import LaunchSpec
from fusewright.fusion.expression import Apply, ColumnSum, walk
from fusewright.fusion.plan import Encode, Fallback, FusionPlan, Region, Step
from fusewright.ir.size import Size, evaluate, product
from fusewright.runtime.cache import included
from fusewright.runtime.nvrtc import DEVICE_CODE, compile_all
from fusewright.tools import explain, units
from fusewright.tools.explain import Explanation, RegionRow, Sizes
from fusewright.tools.files import check_output, write
from fusewright.tools.optimize import header, load_and_capture
from fusewright.tools.planned import Planned, plan_model
from fusewright.tools.report_graphs import Picture, kernels, operators, step_numbers, type_name
from fusewright.tools.report_measured import Measured, read_measured
from fusewright.tools.report_roofline import Point, Roofline, roofline

TITLES = {
    "inference": "Inference",
    "forward": "Training: forward",
    "backward": "Training: backward",
}


@dataclass(frozen=True)
class Request:
    """What the user asked for. dtype: None leaves the file's own. measured: files that `bench` or `verify` wrote."""

    path: Path
    out: Path
    chip: Chip
    dtype: torch.dtype | None
    settings: Mapping[str, object]
    library: bool
    measured: Sequence[Path] = ()


@dataclass(frozen=True)
class Kernel:
    """One launch. registers a thread, shared_bytes and threads a block; None where ptxas reports nothing."""

    name: str
    grid: tuple[int, ...]
    threads: int
    registers: int | None
    shared_bytes: int | None
    spill_bytes: int | None
    source: str


@dataclass(frozen=True)
class Moved:
    """A buffer that a region reads or writes."""

    name: str
    type: str
    bytes: int
    written: bool


@dataclass(frozen=True)
class RegionPart:
    """One region of the plan: what `explain` says of it, and its kernels. steps: primitives an element, of the epilogue
    where there is a product. operations: of the product, else of all steps. rate_name: what bounds them.
    bound: what the floor is made of, "memory" or "arithmetic"."""

    number: int
    row: RegionRow
    rate_name: str
    steps: int
    operations: int
    bound: str
    moved: tuple[Moved, ...]
    kernels: tuple[Kernel, ...]
    library: bool


@dataclass(frozen=True)
class FallbackPart:
    number: int
    operator: str
    reason: str


@dataclass(frozen=True)
class GraphPart:
    """Inference, forward or backward."""

    name: str
    title: str
    explanation: Explanation
    regions: tuple[RegionPart, ...]
    fallbacks: tuple[FallbackPart, ...]
    before: Picture
    after: Picture


@dataclass(frozen=True)
class Page:
    """Everything that the page shows. headers: the device code that the kernels include, by name."""

    head: Mapping[str, Any]
    chip: Chip
    graphs: tuple[GraphPart, ...]
    roofline: Roofline | None
    headers: Mapping[str, str]
    measured: tuple[Measured, ...]

    @property
    def name(self) -> str:
        """The model file's, without its folder."""
        return Path(self.head["model"]).name


def report(request: Request, console: Console) -> dict[str, Any]:
    """Plans and compiles the model and writes the page, whole or not at all. Returns its figures.

    Raises OutputNotWritable before any work is done, BadMeasurement, and what loading, tracing and compiling raise.
    """
    check_output(request.out, [request.path, *request.measured])
    measured = tuple(read_measured(path) for path in request.measured)
    with console.status("loading and tracing the model"):
        _, instance, captured = load_and_capture(
            request.path, request.settings, request.dtype, request.chip, library=request.library
        )
        planned = plan_model(captured, request.chip, library=request.library)
    with console.status(f"compiling the kernels for {request.chip.arch}"):
        page = build(header(request.path, instance, request.chip), captured, planned, request.chip, measured)
    write(request.out, render(page).encode(errors="backslashreplace"))  # a file's name may be no text
    console.print(f"wrote {request.out}", markup=False)
    return as_dict(request.out, page)


def build(
    head: Mapping[str, Any],
    captured: CapturedModel,
    planned: Sequence[Planned],
    chip: Chip,
    measured: Sequence[Measured] = (),
) -> Page:
    """Compiles every kernel of the planned graphs and gathers what the page shows. Raises CompileError."""
    launches = [launch for p in planned for program in p.programs.values() for launch in program.launches]
    used: dict[str, Mapping[str, Any]] = {}
    if launches:
        cubins = compile_all([launch.source for launch in launches], chip.arch)
        used = {launch.source: cubin.resources for launch, cubin in zip(launches, cubins, strict=True)}
    graphs = tuple(_graph(p, _results(p, captured), chip, used) for p in planned)
    headers = {name: text for launch in launches for name, text in included(launch.source, DEVICE_CODE).items()}
    texts = {name: headers[name].decode() for name in sorted(headers)}
    return Page(head, chip, graphs, _roofline(graphs, chip, measured), texts, tuple(measured))


def _results(planned: Planned, captured: CapturedModel) -> list[str]:
    """A name for each output of a graph; "" for those that are no tensors or only arguments handed through."""
    names = []
    for place, output in enumerate(planned.graph.outputs):
        if output is None or output.type is None:
            names.append("")
        elif planned.name == "backward":
            name = captured.arguments[place] if place < len(captured.arguments) else None
            names.append(f"gradient of {name}" if name else "gradient")
        elif place < captured.outputs:
            names.append("result" if captured.outputs == 1 else f"result {place + 1}")
        else:
            names.append("saved for backward")
    return names


def _graph(planned: Planned, results: Sequence[str], chip: Chip, used: Mapping[str, Mapping[str, Any]]) -> GraphPart:
    explanation = explain.explain(planned, planned.sizes, chip)
    rows = {row.kernel: row for row in explanation.regions}
    regions, fallbacks = [], []
    for number, step in step_numbers(planned.plan):
        if isinstance(step, Fallback):
            fallbacks.append(FallbackPart(number, step.name, step.reason))
        else:
            regions.append(_region(number, step, rows[step.name], planned, chip, used))
    families = {r.number: r.row.family for r in regions}
    links = f"#{explanation.graph}-"
    return GraphPart(
        explanation.graph,
        TITLES.get(explanation.graph, explanation.graph),
        explanation,
        tuple(regions),
        tuple(fallbacks),
        operators(planned, results, links),
        kernels(planned, families, results, links),
    )


def _region(
    number: int,
    step: Region | Encode,
    row: RegionRow,
    planned: Planned,
    chip: Chip,
    used: Mapping[str, Mapping[str, Any]],
) -> RegionPart:
    program = planned.programs[step.name]
    steps, elements = _steps(step)
    return RegionPart(
        number,
        row,
        explain.rate_name(step, program),
        steps,
        row.flop or steps * int(evaluate(elements, planned.sizes)),
        "memory" if row.bytes / chip.bandwidth >= row.floor_seconds else "arithmetic",
        tuple(_moved(step, planned.plan, planned.sizes)),
        tuple(_kernel(launch, planned.sizes, used.get(launch.source, {})) for launch in program.launches),
        program.library is not None,
    )


def _steps(step: Region | Encode) -> tuple[int, Size]:
    """Each primitive but a conversion counts one an element, and so does a sum; a copy counts one as well.

    Returns that count, and how many elements there are.
    """
    if isinstance(step, Encode):
        return 1, sum((product(m.shape) for m in step.matrices), 0)
    distinct = [e for e in walk(s.value for s in step.sinks) if isinstance(e, Apply) and e.op != "cast"]
    count = len(distinct) + sum(isinstance(s, ColumnSum) for s in step.sinks)
    return max(count, 0 if step.gemm else 1), product(step.rows) * step.columns


def _moved(step: Step, plan: FusionPlan, sizes: Sizes) -> list[Moved]:
    buffers = [plan.buffers[name] for name in explain.touched(step)]
    return [
        Moved(b.name, type_name(b.dtype, b.shape, sizes), int(evaluate(b.bytes, sizes)), b.name in step.writes())
        for b in buffers
    ]


def _kernel(launch: LaunchSpec, sizes: Sizes, resources: Mapping[str, Any]) -> Kernel:
    used = resources.get(launch.kernel)
    return Kernel(
        launch.kernel,
        tuple(int(evaluate(g, sizes)) for g in launch.grid),
        launch.block[0] * launch.block[1] * launch.block[2],
        used.registers if used else None,
        used.shared_bytes + launch.shared_bytes if used else None,
        used.spill_bytes if used else None,
        launch.source,
    )


# ---- the roofline


def _roofline(graphs: Sequence[GraphPart], chip: Chip, measured: Sequence[Measured]) -> Roofline | None:
    points, rates = [], explain.rates(chip)
    for graph in graphs:
        for r in graph.regions:
            label = f"{graph.name[0].upper()}{r.number}"
            title = ", ".join(r.row.operators) or "copy"
            seconds = max(r.row.floor_seconds, r.operations / rates[r.rate_name])
            points.append(Point(label, title, graph.name, r.operations, r.row.bytes, seconds))
    by_name = {g.name: g for g in graphs}
    for timing in (t for m in measured for t in m.timings if t.ours):
        found = by_name.get(timing.mode) or (by_name.get("inference") if timing.mode == "forward" else None)
        if found is not None and found.regions:
            operations = sum(r.operations for r in found.regions)
            title = f"all of {found.name}, run by {timing.runner}"
            label = f"{found.name[0].upper()} {timing.runner}"
            moved = found.explanation.bytes_after
            points.append(Point(label, title, found.name, operations, moved, timing.milliseconds / 1e3, measured=True))
    names = dict.fromkeys(r.rate_name for g in graphs for r in g.regions)
    return roofline(chip, {name: rates[name] for name in names}, points)


# ---- the text


def render(page: Page) -> str:
    """The page as HTML. Every text is escaped by the template's engine, highlighted source by pygments."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("fusewright", "tools"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(size=units.size, time=units.time, operations=units.operations, cuda=_highlighted)
    template = environment.get_template("report.html.j2")
    return template.render(page=page, version=__version__, torch=torch.__version__)


def _highlighted(source: str) -> Any:
    from markupsafe import Markup

    return Markup(highlight(source, CudaLexer(), HtmlFormatter(nowrap=True)))


def as_dict(out: Path, page: Page) -> dict[str, Any]:
    """The figures of the page as data; pictures and sources are left out."""
    graphs = []
    for graph in page.graphs:
        regions = []
        for r in graph.regions:
            launched = [{k: v for k, v in asdict(kernel).items() if k != "source"} for kernel in r.kernels]
            regions.append({**asdict(replace(r, kernels=())), "kernels": launched})
        graphs.append({"graph": graph.name, "regions": regions})
    return {"out": str(out), **page.head, "graphs": graphs}
