"""What `bench` measured, for a terminal and as a picture."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from fusewright.errors import OutputNotWritable, ToolMissing
from fusewright.tools.bench import IMPOSSIBLE, Bench, Mode, Timed
from fusewright.tools.files import write
from fusewright.tools.units import flop, size, times
from fusewright.tools.units import time as time_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SUFFIXES = (".png", ".svg", ".pdf")
MARKERS = {"forward": "o", "backward": "s", "both": "^"}


def render(bench: Bench) -> Group:
    """A table of each mode, then accuracy, first calls, and what was not measured."""
    products = "TF32" if bench.tf32 else "float32 products in full"
    graphs = ", CUDA graphs" if bench.cuda_graphs else ""
    title = f"{bench.reference}: {bench.inputs}, {products}{graphs}, on {bench.environment['device']}"
    parts: list[Any] = [Text(title, "bold")]
    for name, mode in bench.modes.items():
        parts += [_table(name, mode, bench), *_lines(mode, bench)]
    parts += [Text(f"{name} is not at the same precision: {p}", "yellow") for name, p in _problems(bench)]
    if bench.first_call:
        parts.append(_first_calls(bench))
    return Group(*parts, *(Text(f"not measured: {reason}", "dim") for reason in bench.not_measured))


def _table(name: str, mode: Mode, bench: Bench) -> Table:
    table = Table(title={"both": "forward and backward"}.get(name, name), title_justify="left")
    table.add_column("", overflow="fold")
    for column in ("median", "10 % to 90 %", "of the floor", "error / eager's"):
        table.add_column(column, justify="right")
    for runner, timed in mode.timings.items():
        style = "bold" if runner == bench.candidate else ""
        if timed.ms is None or timed.low is None or timed.high is None:
            table.add_row(Text(runner, style), Text("failed", "red"), "", "", "")
            continue
        accuracy = bench.accuracy.get(runner)
        error = "" if accuracy is None or accuracy.ratio is None else times(accuracy.ratio)
        spread = f"{timed.low:.4g} – {timed.high:.4g} ms"
        table.add_row(Text(runner, style), Text(f"{timed.ms:.4g} ms", style), spread, _share(timed), error)
    return table


def _share(timed: Timed) -> str:
    return "" if timed.of_floor is None else f"{100 * timed.of_floor:.3g} %"


def _lines(mode: Mode, bench: Bench) -> Iterator[Text]:
    rates = bench.rates
    yield Text(
        f"  floor {time_text(mode.floor_ms / 1e3)}: {size(mode.bytes)} to move at "
        f"{size(int(rates['copy_bytes_per_s']))}/s"
        + (
            f", {flop(mode.flop)} to compute; fp16 at {rates['fp16_flop_per_s'] / 1e12:.3g} TFLOP/s"
            if mode.flop
            else ""
        )
        + " (rates measured in this run)"
    )
    if mode.speedup is not None:
        style = "green" if mode.speedup >= 1 else "yellow"
        yield Text(
            f"  {bench.candidate}: {mode.speedup:.2f}× as fast as {mode.best_baseline}, the best of the others", style
        )
    for name, timed in mode.timings.items():
        if timed.failed:
            yield Text(f"  {name} failed: {timed.failed.splitlines()[0]}", "red")
        if timed.of_floor is not None and timed.of_floor * IMPOSSIBLE > 1:
            yield Text(
                f"  {name} is faster than is possible, so its measurement is wrong: does it compute anything?", "red"
            )


def _problems(bench: Bench) -> Iterator[tuple[str, str]]:
    for name, accuracy in bench.accuracy.items():
        for problem in accuracy.problems[:3]:
            yield name, problem


def _first_calls(bench: Bench) -> Table:
    table = Table(title="first call, from loading the file, in a new process", title_justify="left")
    table.add_column("", overflow="fold")
    for column in ("cold: empty caches", "warm", "steady"):
        table.add_column(column, justify="right")
    steady = bench.modes.get("both") or bench.modes.get("forward")
    for name, first in bench.first_call.items():
        if first.cold_s is None or first.warm_s is None:
            table.add_row(name, Text(f"failed: {(first.failed or '').splitlines()[-1][:80]}", "red"), "", "")
            continue
        ms = steady.timings[name].ms if steady and name in steady.timings else None
        table.add_row(name, f"{first.cold_s:.2f} s", f"{first.warm_s:.2f} s", "" if ms is None else f"{ms:.4g} ms")
    return table


# ---- the picture


def require_plot(path: Path) -> None:
    """Raises ToolMissing without matplotlib, and OutputNotWritable for a format that it is not asked to write."""
    if path.suffix.lower() not in SUFFIXES:
        raise OutputNotWritable(f"{path}: the picture's format is told by its name; end it in {', '.join(SUFFIXES)}")
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise ToolMissing("--plot draws with matplotlib, which is not installed: pip install matplotlib") from None


def plot(bench: Bench, path: Path) -> None:
    """Draws the roofline and writes it: where each candidate stands in each mode, under the measured rates."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, NullFormatter

    figure = Figure(figsize=(9.5, 5), layout="constrained")
    axes = figure.add_subplot()
    points = [(mode, name, *_point(m, t)) for mode, m in bench.modes.items() for name, t in m.timings.items() if t.ms]
    _roofs(axes, bench, [x for _, _, x, _ in points])
    names = list(dict.fromkeys(name for _, name, _, _ in points))
    for mode, name, x, y in points:
        ours = name == bench.candidate
        axes.plot(
            x, y, MARKERS[mode], color=f"C{names.index(name)}", ms=9 if ours else 7, mec="black" if ours else "none"
        )
    for name in names:
        axes.plot([], [], "o", color=f"C{names.index(name)}", label=name)
    for mode in bench.modes:
        axes.plot(
            [], [], MARKERS[mode], color="grey", mfc="none", label={"both": "forward and backward"}.get(mode, mode)
        )
    axes.set(xscale="log", yscale="log", xlabel="operations per byte", ylabel="operations per second")
    axes.set_title(f"{Path(bench.reference).name} on {bench.environment['device']}\n{bench.inputs}", fontsize=10)
    axes.grid(which="major", alpha=0.3)
    axes.yaxis.set_major_formatter(EngFormatter())
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    image = io.BytesIO()
    figure.savefig(image, format=path.suffix[1:].lower(), dpi=160)
    write(path, image.getvalue())


def _point(mode: Mode, timed: Timed) -> tuple[float, float]:
    """Operations per byte, and per second. An operator that is no product counts one for each element it gives."""
    operations = max(1, mode.flop + mode.elements)
    return operations / max(1, mode.bytes), operations / (timed.ms or math.inf) * 1e3


def _roofs(axes: Axes, bench: Bench, intensities: list[float]) -> None:
    """The measured copy as a slope; the measured fp16 product as a ceiling, and what float32 can make of it."""
    bandwidth, peak = bench.rates["copy_bytes_per_s"], bench.rates["fp16_flop_per_s"]
    ceilings = {"fp16": peak, "TF32": peak / 2, "float32 as three fp16": peak / 3}
    ridge = peak / bandwidth
    low, high = min([*intensities, ridge]) / 20, max([*intensities, ridge]) * 4
    axes.plot([low, ridge], [low * bandwidth, peak], color="black", lw=1)
    axes.annotate(f"copy, {bandwidth / 1e12:.2f} TB/s", (low * 1.3, low * bandwidth), fontsize=8)
    for name, rate in ceilings.items():
        axes.plot([rate / bandwidth, high], [rate, rate], color="black", lw=1, ls="-" if rate == peak else ":")
        axes.annotate(f"{name}, {rate / 1e12:.0f} TFLOP/s", (high, rate), fontsize=8, ha="right", va="bottom")
