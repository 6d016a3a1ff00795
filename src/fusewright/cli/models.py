"""The commands that work on model files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fusewright.cli import options
from fusewright.cli.options import Arch, Dtype, File, Json, Library, Reference, Schedules, Set, flag
from fusewright.cli.output import Output
from fusewright.errors import WrongResult


def optimize(
    file: File,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", metavar="PATH", help="Default: <stem>_new.py beside FILE.")
    ] = None,
    arch: Arch = None,
    dtype: Dtype = None,
    set_: Set = None,
    allow_library: Library = False,
    schedules: Schedules = 1,
    no_verify: Annotated[bool, flag("--no-verify", help="Write the file without checking it.")] = False,
    json_: Json = None,
) -> None:
    """Write a new model file whose class runs fused kernels, after checking it."""
    target = out or file.parent / f"{file.stem}_new.py"
    output = Output("optimize", json_, [file], [target])
    with output.loading():
        from fusewright.tools.optimize import Request
        from fusewright.tools.optimize import optimize as run

        chip, cast = options.chip(arch), options.dtype(dtype)
    request = Request(file, target, chip, cast, options.settings(set_), allow_library, not no_verify, schedules)
    with output.kept():
        written = run(request, output.console)
    output.result(written.as_dict())


def explain(
    file: File,
    arch: Arch = None,
    dtype: Dtype = None,
    set_: Set = None,
    allow_library: Annotated[bool, flag("--allow-library", help="As `optimize --allow-library` would.")] = False,
    json_: Json = None,
) -> None:
    """Show operators before, kernels after, what is saved, what is not fused and why, and the floor."""
    output = Output("explain", json_, [file])
    with output.loading():
        from fusewright.tools.optimize import explain_file

        chip, cast = options.chip(arch), options.dtype(dtype)
    with output.kept():
        found = explain_file(file, chip, cast, options.settings(set_), allow_library, output.console)
    output.result(found)


def report(
    file: File,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", metavar="PATH", help="Default: <stem>_report.html beside FILE.")
    ] = None,
    arch: Arch = None,
    dtype: Dtype = None,
    set_: Set = None,
    allow_library: Annotated[bool, flag("--allow-library", help="As `optimize --allow-library` would.")] = False,
    measured: Annotated[
        list[Path] | None,
        typer.Option(
            "--measured", metavar="PATH", help="Show what `bench --json` or `verify --json` wrote to PATH; repeatable."
        ),
    ] = None,
    json_: Json = None,
) -> None:
    """Write one HTML page: the model before and after, every kernel, the roofline, and what was measured."""
    target = out or file.parent / f"{file.stem}_report.html"
    output = Output("report", json_, [file, *(measured or ())], [target])
    with output.loading():
        from fusewright.tools.report import Request
        from fusewright.tools.report import report as run

        chip, cast = options.chip(arch), options.dtype(dtype)
    request = Request(file, target, chip, cast, options.settings(set_), allow_library, measured or ())
    with output.kept():
        written = run(request, output.console)
    output.result(written)


def verify(
    reference: Reference,
    candidate: Annotated[Path, typer.Argument(metavar="CANDIDATE", help="A model file with class ModelNew.")],
    dtype: Dtype = None,
    set_: Set = None,
    schedules: Schedules = 1,
    json_: Json = None,
) -> None:
    """Check that CANDIDATE is as correct as REFERENCE: values, gradients, layouts, side effects."""
    output = Output("verify", json_, [reference, candidate])
    with output.loading():
        from fusewright.tools.verify_files import verify_files

        cast = options.dtype(dtype)
    with output.kept():
        report = verify_files(reference, candidate, cast, options.settings(set_), output.console, schedules)
    output.result(report)
    if not report["passed"]:
        raise WrongResult(f"{candidate} is not as correct as {reference}")


def bench(
    reference: Reference,
    candidate: Annotated[
        Path | None,
        typer.Argument(metavar="CANDIDATE", help="A model file with class ModelNew. Default: fusewright in process."),
    ] = None,
    dtype: Dtype = None,
    set_: Set = None,
    allow_tf32: Annotated[
        bool, flag("--allow-tf32", help="Let products of float32 use TF32, in the baselines too.")
    ] = False,
    mode: Annotated[
        list[str] | None,
        typer.Option(
            "--mode",
            metavar="MODE",
            autocompletion=options.modes,
            help="forward, backward or both; repeatable. Default: all.",
        ),
    ] = None,
    quick: Annotated[
        bool, flag("--quick", help="Leave out torch.compile's max-autotune, which takes minutes.")
    ] = False,
    cuda_graphs: Annotated[
        bool, flag("--cuda-graphs", help="Let torch.compile and fusewright replay CUDA graphs.")
    ] = False,
    first_call: Annotated[
        bool, flag("--first-call", help="Time the first call too, with empty and with warm caches.")
    ] = False,
    trials: Annotated[
        int,
        typer.Option(
            "--trials",
            min=50,
            metavar="TRIALS",
            show_default=False,
            help="How many trials a median is of, at least 50. Default: 50.",
        ),
    ] = 50,
    plot: Annotated[
        Path | None,
        typer.Option("--plot", metavar="PATH", help="Draw the roofline: a .png, .svg or .pdf; needs matplotlib."),
    ] = None,
    json_: Json = None,
) -> None:
    """Time a model on the GPU beside eager and torch.compile at the same precision, and beside the floor."""
    inputs = [reference, *([candidate] if candidate else [])]
    output = Output("bench", json_, inputs, [plot] if plot else [])
    with output.loading():
        from fusewright.tools import bench as tool
        from fusewright.tools import bench_show as show
        from fusewright.tools.files import check_output

        cast = options.dtype(dtype)
    tool.require_gpu()
    if plot is not None:
        show.require_plot(plot)
        check_output(plot, inputs, "--plot")
    given = options.settings(set_)
    request = tool.Request(
        reference, candidate, cast, given, allow_tf32, tuple(mode or ()), quick, trials, first_call, cuda_graphs
    )
    with output.kept():
        measured = tool.bench(request, output.console)
        output.console.print(show.render(measured))
    output.result(measured)
    if plot is not None:
        show.plot(measured, plot)
