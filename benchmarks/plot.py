"""Draws the plots in docs/images/ from results/*.json.

    python benchmarks/plot.py [--check]

Needs matplotlib (`pip install fusewright[plots]`). Each file names the results that it shows by their hash; --check
draws nothing, needs nothing, and fails where a plot is missing or shows other results.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
IMAGES = ROOT / "docs" / "images"
COLOURS = {"bfloat16": "#0072b2", "float16": "#009e73", "float32": "#d55e00", "TF32, frozen": "#cc79a7"}
OURS, EAGER = "#d55e00", "#888888"

Result = Mapping[str, Any]


def sweep(result: Result, figure: Any) -> None:
    """Speedup over the number of operations, one point for each case and precision."""
    axes = figure.subplots()
    for name, s in result["summary"].items():
        cases = [c for c in result["cases"] if "speedup" in c["results"].get(name, {})]
        if not cases:
            continue
        operations = [2 * c["m"] * c["n"] * c["k"] for c in cases]
        label = f"{name}: geometric mean {s['geometric_mean']:.2f}×"
        speedups = [c["results"][name]["speedup"] for c in cases]
        axes.scatter(operations, speedups, s=22, alpha=0.8, color=COLOURS.get(name), label=label)
        axes.axhline(s["geometric_mean"], color=COLOURS.get(name), linewidth=0.8, linestyle=":")
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set(xscale="log", yscale="log", xlabel="operations of the product", ylabel="speedup over torch.compile")
    _plain_ratios(axes.yaxis)
    axes.legend(fontsize=8)


def zoo(result: Result, figure: Any) -> None:
    """Speedup over the best baseline by model, dtype and mode."""
    modes, models = ("forward", "forward+backward"), list(result["models"])
    every = figure.subplots(1, len(result["summary"]), sharey=True, squeeze=False)[0]
    for axes, dtype in zip(every, result["summary"], strict=True):
        for i, mode in enumerate(modes):
            found = [result["models"][m].get(dtype, {}).get("modes", {}).get(mode, {}) for m in models]
            places = [j + 0.4 * i - 0.2 for j in range(len(models))]
            axes.barh(places, [f.get("speedup", 0) for f in found], 0.38, color=("#0072b2", "#56b4e9")[i], label=mode)
        axes.axvline(1, color="black", linewidth=0.8)
        axes.set(title=dtype, xlabel="speedup over the best baseline")
        axes.set_yticks(range(len(models)), models, fontsize=8)
    every[0].invert_yaxis()
    figure.legend(*every[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(modes), fontsize=8)


def training(result: Result, figure: Any) -> None:
    """Loss curves: eager's runs in grey, ours over them."""
    runs = {name: found for name, found in result["runs"].items() if "eager" in found}
    for axes, (name, found) in zip(figure.subplots(2, 2, sharex=True).flat, runs.items(), strict=False):
        for i, curve in enumerate(found["eager"]):
            axes.plot(curve, color=EAGER, linewidth=2.5, alpha=0.5, label="eager" if i == 0 else None)
        axes.plot(found["fusewright"], color=OURS, linewidth=0.8, label="fusewright")
        axes.set(title=name, ylabel="loss", xlabel="step")
        axes.legend(fontsize=8)


PLOTS: dict[str, tuple[Callable[[Result, Any], None], tuple[float, float]]] = {
    "sweep": (sweep, (8, 4.5)),
    "zoo": (zoo, (9, 5)),
    "training": (training, (8, 6)),
}


def _plain_ratios(axis: Any) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(10, (1, 2, 3, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}×"))
    axis.set_minor_formatter(NullFormatter())


def stamp(path: Path) -> str:
    """What a plot says of the results that it shows."""
    return f"results {hashlib.sha256(path.read_bytes()).hexdigest()[:16]}"


def draw(name: str, results: Path, images: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    plot, size = PLOTS[name]
    path = results / f"{name}.json"
    images.mkdir(parents=True, exist_ok=True)
    with pyplot.rc_context({"svg.hashsalt": name, "svg.fonttype": "none", "font.size": 9, "axes.grid": True}):
        figure = pyplot.figure(figsize=size, layout="constrained")
        plot(json.loads(path.read_text()), figure)
        figure.savefig(images / f"{name}.svg", metadata={"Description": stamp(path), "Date": None})
        pyplot.close(figure)


def stale(results: Path, images: Path) -> list[str]:
    """The plots whose results have changed since they were drawn."""
    measured = [name for name in PLOTS if (results / f"{name}.json").is_file()]
    paths = {name: images / f"{name}.svg" for name in measured}
    return [n for n, p in paths.items() if not p.is_file() or stamp(results / f"{n}.json") not in p.read_text()]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--results", type=Path, default=RESULTS, help=argparse.SUPPRESS)
    parser.add_argument("--images", type=Path, default=IMAGES, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    names = stale(options.results, options.images)
    if options.check:
        for name in names:
            print(f"the plot {name} is stale; run `python benchmarks/plot.py`", file=sys.stderr)
        return 1 if names else 0
    for name in names:
        draw(name, options.results, options.images)
    return 0


if __name__ == "__main__":
    sys.exit(main())
