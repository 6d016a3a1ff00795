"""`fusewright optimize`: model file in, fused and checked model file out."""

from __future__ import annotations

import ast
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text
from torch.utils import _pytree as pytree

from fusewright.capture import model_file
from fusewright.capture.model import CapturedModel, capture, check_returned, first_paragraph
from fusewright.capture.model_file import Instance, ModelFile
from fusewright.capture.without_gpu import without_gpu
from fusewright.chip import Chip
from fusewright.codegen.launch import LaunchSpec
from fusewright.errors import CannotCapture, FusewrightError, WrongResult
from fusewright.kernels.choose import capabilities
from fusewright.runtime.nvrtc import compile_all
from fusewright.settings import tf32_allowed
from fusewright.tools import explain, plan_check
from fusewright.tools.emit import emit
from fusewright.tools.files import check_output, write
from fusewright.tools.freeze import kept
from fusewright.tools.modes import check_modes
from fusewright.tools.planned import Planned, plan_model
from fusewright.tools.small import CHECKED, SIMULATED, run_eagerly, small
from fusewright.tools.units import counted, size, times
from fusewright.tools.verify import Subject, render, verify


@dataclass(frozen=True)
class Request:
    """What the user asked for. dtype: None leaves the file's own. schedules: thread orders that the simulator tries."""

    path: Path
    out: Path
    chip: Chip
    dtype: torch.dtype | None
    settings: Mapping[str, object]
    library: bool
    verify: bool
    schedules: int = 1


@dataclass(frozen=True)
class KernelRow:
    """What one compiled kernel uses; None where the compiler does not report it. Registers a thread, bytes a block."""

    graph: str
    kernel: str
    registers: int | None
    shared_bytes: int | None
    spill_bytes: int | None


@dataclass(frozen=True)
class Written:
    """What was done. explanation: as `explain` gives it. check: how the kernels were checked; None if they were not."""

    out: Path
    explanation: dict[str, Any]
    kernels: list[KernelRow]
    check: dict[str, Any] | None

    def as_dict(self) -> dict[str, Any]:
        """The keys of `explain`, and what was made."""
        kernels = [asdict(row) for row in self.kernels]
        return {**self.explanation, "out": str(self.out), "kernels": kernels, "check": self.check}


def optimize(request: Request, console: Console) -> Written:
    """Plans, compiles, checks and writes. Raises WrongResult if a check fails; then no file is written."""
    check_output(request.out, [request.path])
    with console.status("loading and tracing the model"):
        file, instance, captured = load_and_capture(
            request.path, request.settings, request.dtype, request.chip, library=request.library
        )
        check_modes(file, instance.model, request.settings, request.dtype)
        emitted = emit(file, instance.model, captured, request.chip, library=request.library, dtype=request.dtype)
    explanation = _explained(request.path, instance, emitted.planned, request.chip, console)
    with console.status(f"compiling the kernels for {request.chip.arch}"):
        kernels = compiled((*emitted.planned, *emitted.frozen), request.chip)
    console.print(kernel_table(kernels, request.chip))
    if torch.cuda.is_available():
        check = _verify_and_write(request, emitted.text, console)
    else:
        check = _check_without_gpu(request, file, emitted.planned, console) if request.verify else None
        write(request.out, emitted.text)
    console.print(f"wrote {request.out}", markup=False)
    try:
        ast.parse(emitted.text, feature_version=(3, 8))
    except SyntaxError as error:
        console.print(f"it keeps syntax that Python 3.8 does not know: line {error.lineno}: {error.msg}", markup=False)
    if emitted.frozen:
        held = size(kept(emitted.frozen))
        console.print(f"for inference, ModelNew.freeze() splits the parameters once and keeps {held} beside them")
    return Written(request.out, explanation, kernels, check)


def explain_file(
    path: Path,
    chip: Chip,
    dtype: torch.dtype | None,
    settings: Mapping[str, object],
    library: bool,
    console: Console,
) -> dict[str, Any]:
    """What `optimize` would make of a file: prints it, and returns it for JSON."""
    with console.status("loading and tracing the model"):
        _, instance, captured = load_and_capture(path, settings, dtype, chip, library=library)
        planned = plan_model(captured, chip, library=library)
    return _explained(path, instance, planned, chip, console)


def _explained(
    path: Path, instance: Instance, planned: tuple[Planned, ...], chip: Chip, console: Console
) -> dict[str, Any]:
    head = header(path, instance, chip)
    explanations = [explain.explain(p, p.sizes, chip) for p in planned]
    console.print(explain.render(explanations, head, chip))
    return explain.as_dict(explanations, head)


def load_and_capture(
    path: Path, settings: Mapping[str, object], dtype: torch.dtype | None, chip: Chip, *, library: bool = False
) -> tuple[ModelFile, Instance, CapturedModel]:
    """Loads the file and traces its model, for a chip: float32 products by halves, where that pays there, in the
    precision that torch's flags ask for once the file is loaded.

    A model that fails in eager mode raises EagerFailure with its own error. CannotCapture says where forward is.
    """
    file = model_file.load(path, settings)
    instance = file.instantiate(dtype=dtype)
    returned = run_eagerly(file, settings, dtype)
    try:
        check_returned(returned)
        with without_gpu():
            products = capabilities(chip, library=library, tensor_maps=True, tf32=tf32_allowed())
            return file, instance, capture(instance.model, instance.inputs, capabilities=products)
    except CannotCapture as error:
        raise CannotCapture(f"{file.place_of_forward()}: {error}") from error
    except FusewrightError:
        raise
    except Exception as error:
        what = f"torch cannot trace the model: {first_paragraph(error)}"
        raise CannotCapture(f"{file.place_of_forward()}: {what}") from error


def header(path: Path, instance: Instance, chip: Chip) -> dict[str, Any]:
    tensors = [x for x in pytree.tree_leaves(instance.inputs) if isinstance(x, torch.Tensor)]
    inputs = ", ".join(f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)}" for x in tensors)
    return {"model": str(path), "inputs": inputs, "arch": chip.arch}


def compiled(planned: tuple[Planned, ...], chip: Chip) -> list[KernelRow]:
    """Compiles every kernel; what each uses, under the first graph that launches it. Raises CompileError."""
    kernels: dict[tuple[str, str], tuple[str, LaunchSpec]] = {}
    for p in planned:
        for launch in (launch for program in p.programs.values() for launch in program.launches):
            graph = {"fused": "inference"}.get(p.name, p.name)
            kernels.setdefault((launch.kernel, launch.source), (graph, launch))
    cubins = compile_all([launch.source for _, launch in kernels.values()], chip.arch)
    rows = []
    for (graph, launch), cubin in zip(kernels.values(), cubins, strict=True):
        used = cubin.resources.get(launch.kernel)
        if used is None:
            rows.append(KernelRow(graph, launch.kernel, None, None, None))
        else:
            shared = used.shared_bytes + launch.shared_bytes
            rows.append(KernelRow(graph, launch.kernel, used.registers, shared, used.spill_bytes))
    return rows


def kernel_table(rows: Sequence[KernelRow], chip: Chip) -> Table:
    """For a terminal."""
    table = Table(title=f"{counted(len(rows), 'kernel', 'kernels')} compiled for {chip.arch}", title_justify="left")
    for column in ("graph", "kernel", "registers", "shared memory", "spills"):
        table.add_column(column, justify="left" if column in ("graph", "kernel") else "right", overflow="fold")
    for row in rows:
        if row.registers is None or row.shared_bytes is None:
            table.add_row(row.graph, row.kernel, *["not reported"] * 3)
        else:
            shared = f"{row.shared_bytes / 1024:.1f} KiB"
            table.add_row(row.graph, row.kernel, str(row.registers), shared, f"{row.spill_bytes} B")
    return table


def _check_without_gpu(
    request: Request, file: ModelFile, planned: tuple[Planned, ...], console: Console
) -> dict[str, Any] | None:
    with console.status("checking the plan and simulating the kernels at small sizes"):
        outcome = simulated(file, request.settings, request.dtype, request.chip, planned, request.schedules)
    if isinstance(outcome, str):
        console.print(Text(f"{outcome}; nothing was checked", "yellow"))
        return None
    console.print(checked(outcome))
    if wrong := outcome.wrong:
        raise WrongResult(f"{wrong.where} is wrong at {outcome.sizes}; nothing was written. Please report this.")
    return {"passed": True, "simulated": True, **asdict(outcome)}


def simulated(
    file: ModelFile,
    settings: Mapping[str, object],
    dtype: torch.dtype | None,
    chip: Chip,
    planned: tuple[Planned, ...],
    schedules: int,
) -> plan_check.PlanCheck | str:
    """What a machine without a GPU can check, at small sizes; or why that is nothing."""
    with without_gpu():
        reduced = small(file, settings, dtype)
        if reduced.parameters > CHECKED:
            return "the model is too large to check without a GPU"
        if not reduced.repeats():
            return "eager itself gives something else each time"
        return plan_check.check(reduced, chip, planned, schedules if reduced.parameters <= SIMULATED else 0)


def checked(outcome: plan_check.PlanCheck) -> Group:
    """What was checked without a GPU, in words that claim no more."""
    plan, kernels = outcome.plan, outcome.kernels
    lines = [
        Text(f"no GPU here, so nothing ran on one; checked at {outcome.sizes}:"),
        Text(
            f"  plan, by reference in float64: {plan.checked} results and gradients, relative difference to the "
            f"model at most {plan.worst:.1e}{'' if plan.passed else ' — WRONG'}",
            "green" if plan.passed else "red",
        ),
    ]
    if kernels is None:
        lines.append(Text("  kernels: too large to simulate at these sizes", "yellow"))
    else:
        lines.append(
            Text(
                f"  kernels, simulated on the CPU: {kernels.checked} results and gradients, error against float64 at "
                f"most {times(kernels.worst)} the larger of eager's and the rounding of plain sums"
                f"{'' if kernels.passed else ' — WRONG'}",
                "green" if kernels.passed else "red",
            )
        )
    return Group(*lines)


def _verify_and_write(request: Request, text: str, console: Console) -> dict[str, Any] | None:
    """Writes beside the target, verifies that file on the GPU, and moves it into place if it is correct."""
    if not request.verify:
        write(request.out, text)
        return None
    with tempfile.TemporaryDirectory(dir=request.out.parent, prefix=".fusewright-") as folder:
        trial = Path(folder) / request.out.name
        write(trial, text)
        with console.status("building the file with nvcc and verifying it") as status:
            report = verify(
                Subject.of_file(str(request.path), lambda: model_file.load(request.path, request.settings)),
                Subject.of_file(str(request.out), lambda: model_file.load_candidate(trial)),
                device="cuda",
                dtype=request.dtype,
                progress=lambda name, done, total: status.update(f"verifying: {name} ({done + 1} of {total})"),
            )
        console.print(render(report))
        if not report.passed:
            raise WrongResult("the written file fails the check above, so it was not kept; please report this")
        write(request.out, text)
    return {"passed": True, "simulated": False, **asdict(report)}
