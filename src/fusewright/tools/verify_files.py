"""`fusewright verify REFERENCE CANDIDATE`: on the GPU, on the CPU, or in the simulator."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from fusewright.capture import model_file
from fusewright.capture.model_file import ModelFile
from fusewright.capture.without_gpu import without_gpu
from fusewright.chip import Chip, chip_for
from fusewright.errors import NoKernel, ToolMissing
from fusewright.tools.emit import emit
from fusewright.tools.optimize import checked, load_and_capture, simulated
from fusewright.tools.planned import Planned
from fusewright.tools.verify import Subject, render, verify

_WRITTEN_BY = re.compile(r"^# Written by fusewright .* for (\w+)[:,]", re.MULTILINE)


def verify_files(
    reference: Path,
    candidate: Path,
    dtype: torch.dtype | None,
    settings: Mapping[str, object],
    console: Console,
    schedules: int = 1,
) -> dict[str, Any]:
    """Returns whether the candidate passed, and the report, for JSON; prints the report.

    schedules: thread orders that the simulator tries, where it is used.
    """
    first = model_file.load(reference, settings)  # bad files are told apart from bad results
    second = model_file.load_candidate(candidate, settings)
    written = _WRITTEN_BY.search(second.source)
    if written and not torch.cuda.is_available():
        return _simulated(reference, candidate, written[1], dtype, settings, console, schedules)
    with console.status("verifying") as status, without_gpu():
        report = verify(
            Subject.of_file(str(reference), lambda: first),
            Subject.of_file(str(candidate), lambda: second),
            device="cuda" if torch.cuda.is_available() else "cpu",
            dtype=dtype,
            progress=lambda name, done, total: status.update(f"verifying: {name} ({done + 1} of {total})"),
        )
    console.print(render(report))
    return {"passed": report.passed, "simulated": False, **asdict(report)}


def _simulated(
    reference: Path,
    candidate: Path,
    arch: str,
    dtype: torch.dtype | None,
    settings: Mapping[str, object],
    console: Console,
    schedules: int,
) -> dict[str, Any]:
    """Without a GPU: the candidate has to be what fusewright writes, the kernels of which are then simulated.

    As for `optimize`, kernels of a model that is too large for that are not: nothing that was checked is then wrong.
    """
    chip = chip_for(arch)
    with console.status("simulating the kernels at small sizes"):
        with without_gpu():
            file, planned = _writes(candidate, reference, settings, dtype, chip)
        outcome = simulated(file, settings, dtype, chip, planned, schedules)
    if isinstance(outcome, str):
        raise ToolMissing(f"{candidate} cannot be verified here: {outcome}")
    console.print(f"{candidate} is what fusewright writes for {reference}", markup=False)
    console.print(checked(outcome))
    return {"passed": outcome.wrong is None, "simulated": True, **asdict(outcome)}


def _writes(
    candidate: Path, reference: Path, settings: Mapping[str, object], dtype: torch.dtype | None, chip: Chip
) -> tuple[ModelFile, tuple[Planned, ...]]:
    """The reference and its plan, which make the candidate, with torch's library or without it. Raises ToolMissing."""
    text = candidate.read_text(encoding="utf-8")
    for library in (False, True):
        file, instance, captured = load_and_capture(reference, settings, dtype, chip, library=library)
        try:
            emitted = emit(file, instance.model, captured, chip, library=library, dtype=dtype)
        except NoKernel:
            continue
        if emitted.text == text:
            return file, emitted.planned
    raise ToolMissing(
        f"{candidate} is not what this version writes for {reference} with these options, and there is no GPU "
        "to run it; verify it on a machine with one, or write it again with `fusewright optimize`"
    )
