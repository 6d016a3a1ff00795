"""Writes the tables of README.md and docs/*.md between their markers, from results/*.json.

    python benchmarks/table.py [--check] [FILE ...]

A table named NAME lies between `<!-- NAME:begin -->` and `<!-- NAME:end -->`. --check changes nothing and fails where
a table is not what the results say. Where a program has not run yet, the document says so: "Not measured yet" stands
between the markers. Markers of other names are left to whoever generates what lies between them.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
ZOO = ROOT / "benchmarks" / "zoo"
CASES = ROOT / "tests" / "simulator" / "hopper_cases.py"
MARKER = re.compile(r"<!-- (?P<name>[\w-]+):begin -->\n(?P<body>.*?)<!-- (?P=name):end -->", re.DOTALL)

Result = Mapping[str, Any]


class Stale(Exception):
    """A table is missing, or is not what the results say."""


def grid(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first column is text, the others are figures."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def source(result: Result) -> str:
    """The line under a table that says where its figures come from."""
    e = result["environment"]
    card, versions = e["card"], e["versions"]
    return (
        f"\n{e['device']}, driver {card.get('driver_version', 'unknown')}, SM clock up to "
        f"{card.get('clocks.max.sm', 'unknown')}, torch {versions['torch']}, Python {e['python']}, {e['when'][:10]}.\n"
    )


def _ms(timing: Result | None) -> str:
    return f"{timing['ms']:.3f}" if timing and "ms" in timing else "–"


CANDIDATES = {
    "eager": "eager",
    "inductor": "torch.compile",
    "inductor max-autotune": "max-autotune",
    "fusewright": "**fusewright**",
    "fusewright alone": "our kernels alone",
}


def headline(result: Result) -> str:
    """Milliseconds by dtype and mode."""
    titles = ["÷ eager", "÷ best baseline", "device alone ÷ eager's", "of the floor"]
    header = ["dtype, mode", *CANDIDATES.values(), *titles]
    rows = []
    for dtype, found in result["dtypes"].items():
        for mode, measured in found["modes"].items():
            times = measured["timings"]
            ours = times.get("fusewright", {}).get("ms")
            ratios = [f"{measured[r]:.2f}×" if r in measured else "–" for r in ("over_eager", "over_best")]
            share = f"{measured['floor_ms'] / ours:.0%}" if ours else "–"
            on_device = [times.get(c, {}).get("device_ms") for c in ("fusewright", "eager")]
            alone = f"{on_device[0] / on_device[1]:.2f}×" if all(on_device) else "–"
            rows.append([f"{dtype}, {mode}", *(_ms(times.get(c)) for c in CANDIDATES), *ratios, alone, share])
    rates = result["rates"]
    note = (
        f"\nMilliseconds, median of {_trials(result)} trials. The floor: fp16 products at "
        f"{rates['fp16_flop_per_s'] / 1e12:.0f} TFLOP/s (three of them for float32), "
        f"copies at {rates['copy_bytes_per_s'] / 1e12:.1f} TB/s, both measured in the same run on large ones, which "
        "heat the card: a short call may do better. Device alone: all of a call is queued beforehand, so that the "
        "device never waits for the host.\n"
    )
    return grid(header, rows) + note + source(result)


def _trials(result: Result) -> int:
    modes = next(iter(result["dtypes"].values()))["modes"]
    return int(next(t["trials"] for t in modes["forward"]["timings"].values() if "trials" in t))


def accuracy(result: Result) -> str:
    """The worst error over eager's by dtype, and the kernels that run."""
    header = ["dtype", "output, fusewright", "gradients", "output, alone", "gradients", "kernels forward", "backward"]
    rows = []
    for dtype, found in result["dtypes"].items():
        cells = []
        for name in ("fusewright", "fusewright alone"):
            errors = found["errors"][name]
            failed = "failed" in errors
            groups = [[n for n in errors if (n == "output") == output] for output in (True, False)]
            worst = [max(max(errors[n].values()) for n in names) for names in groups] if not failed else []
            cells += [f"{w:.2f}×" for w in worst] or ["–", "–"]
        counts = [found["kernels"][n] for n in ("eager", "fusewright alone")]
        for phase in ("forward", "backward"):
            cells.append(" → ".join(str(len(c[phase])) if phase in c else "–" for c in counts))
        rows.append([dtype, *cells])
    note = "\nThe largest of several metrics of the error against float64, over eager's. Kernels: eager → ours alone.\n"
    return grid(header, rows) + note + source(result)


def float32_accuracy(result: Result) -> str:
    """Errors of float32 products over cuBLAS's, by inputs and depth."""
    products = result["products"]
    depths = sorted(next(iter(products.values())), key=int)
    parts = []
    titles = {
        "float32": "over cuBLAS SGEMM",
        "float32, by line": "each row its own power of two: over cuBLAS SGEMM",
        "tf32": "TF32 allowed: over cuBLAS's",
        "tf32, by line": "TF32 allowed, each row its own power of two",
        "tf32, as they lie": "TF32 allowed, floats read as they lie",
    }
    for method in next(iter(next(iter(products.values())).values())):
        rows = [[inputs, *(_worst(found[k][method]) for k in depths)] for inputs, found in products.items()]
        parts.append(grid([titles[method], *(f"K = {k}" for k in depths)], rows))
    m, n = result["size"]
    note = (
        f"\nResults of {m} × {n}: the Frobenius error, then the largest componentwise one, as ratios to cuBLAS's on "
        f"the same tensors; the worst of {result['seeds']} seeds. Where cuBLAS is exact, over half an ulp.\n"
    )
    return "\n".join(parts) + note + source(result)


def _worst(found: Result) -> str:
    return f"{found['frobenius']:.2g}, {found['componentwise']:.2g}"


def precision(result: Result) -> str:
    """float32 by what torch's flags allow: milliseconds, and how much faster than the best baseline."""
    header = [
        "precision, mode",
        "eager",
        "torch.compile",
        "**fusewright**",
        "frozen",
        "with CUDA graphs",
        "error ÷ eager's",
    ]
    rows = []
    for flag, found in result["flags"].items():
        for mode, measured in found["modes"].items():
            times, faster = measured["timings"], measured["times_faster"]
            names = ("fusewright", "frozen", "fusewright, CUDA graphs")
            ours = [f"{_ms(times.get(c))} ({faster[c]:.2f}×)" if c in faster else "–" for c in names]
            error = f"{found['errors']['fusewright']['over_eager']:.2f}×"
            rows.append([f"{flag}, {mode}", _ms(times.get("eager")), _ms(times.get("inductor")), *ours, error])
    note = "\nMilliseconds; in brackets times faster than the best baseline, with CUDA graphs where ours has them. "
    note += "Device alone: all of a call is queued beforehand. Error: of forward, Frobenius.\n"
    return grid(header, rows) + note + source(result)


def graphs(result: Result) -> str:
    """The example with CUDA graphs on both sides, by dtype and mode."""
    theirs, ours = "inductor reduce-overhead", "fusewright, CUDA graphs"
    rows = []
    for dtype, found in result["dtypes"].items():
        for mode, measured in found["modes"].items():
            times, faster = measured["timings"], measured.get("times_faster", {})
            if ours in faster:
                candidates = ("eager", "inductor", theirs, ours)
                rows.append([f"{dtype}, {mode}", *(_ms(times.get(c)) for c in candidates), f"{faster[ours]:.2f}×"])
    header = [
        "dtype, mode",
        "eager",
        "torch.compile",
        "reduce-overhead",
        "**fusewright**",
        "times faster than the best",
    ]
    if not rows:
        return f"{NOT_MEASURED}: `python benchmarks/headline.py` does it, on a GPU.\n"
    return grid(header, rows) + f"\nMilliseconds, median of {_trials(result)} trials.\n" + source(result)


def overhead(result: Result) -> str:
    """Host microseconds of a launch and of a call of a tiny model."""
    rows = [[name, f"{t['us']:.1f}"] for name, t in result["overheads"].items() if "us" in t]
    return grid(["on the host", "µs"], rows) + source(result)


def gemm_simt(result: Result) -> str:
    """The SIMT product beside cuBLAS SGEMM."""
    rows = []
    for found in result["products"]:
        chosen, times = found["chosen"], found["timings"]
        m, n, k = found["size"]
        errors = found["error_over_cublas"][chosen].values()
        share = found["share_of_cublas"].get(chosen)
        product = f"{found['layout']}, x {m}×{k}, W {n}×{k}"
        shown = f"{share:.0%}" if share else "–"
        rows.append([product, _ms(times["cublas"]), _ms(times[chosen]), chosen, shown, f"{max(errors):.2f}×"])
    header = ["product", "cuBLAS ms", "gemm_simt ms", "tile", "of cuBLAS's speed", "error ÷ cuBLAS's"]
    return grid(header, rows) + source(result)


def first_call(result: Result) -> str:
    """Seconds of the first call in a new process."""
    rows = []
    for state, s in result["summary"].items():
        times = [f"{s[name]:.2f}" for name in ("inductor_s", "fusewright_s")]
        rows.append([f"{state} cache", *times, f"{s['ratio']:.2f}×", f"{s['own_s']:.2f}"])
    header = ["", "Inductor s", "fusewright s", "ratio", "of which our stages s"]
    return grid(header, rows) + source(result)


def image(name: str, what: str) -> str:
    """A plot that `plot.py` draws, as documents in docs/ show it."""
    return f"\n![{what}](images/{name}.svg)\n"


def _figure(value: float | None, form: str = ".2f") -> str:
    return "–" if value is None else f"{value:{form}}×"


def sweep(result: Result) -> str:
    """By precision: geometric mean and extremes of the speedups; then the worst five of each; a plot."""
    precisions = sorted(result["summary"].items(), key=lambda item: float(item[1]["target"]))
    columns = ("geometric_mean", "device", "target", "least", "most", "floor", "error_over_inductor")
    header = ["precision", "cases", "geometric mean", "device alone", "target", "least", "most", "floor"]
    header.append("worst error ÷ Inductor's")
    rows = [
        [
            name,
            f"{s['cases']}" + (f" ({s['failed']} failed)" if s["failed"] else ""),
            *(_figure(s.get(k)) for k in columns),
        ]
        for name, s in precisions
    ]
    worst = ["precision", "M×N×K", "epilogue", "speedup", "ours ms", "Inductor ms", "kernel", "waves of tiles"]
    note = (
        f"\nSpeedup: the time of `torch.compile` (cuBLAS, then Inductor's fused epilogue) over that of our kernels "
        f"alone, in inference; medians of {result['trials']} trials; shapes and epilogues drawn from seed "
        f"{result['seed']}. Device alone: the same mean where all of a call is queued before the device begins. Floor: "
        "what that would be if fp16 products (three, or one where TF32 is allowed) and the bytes "
        "of splitting operands ran at the rates of a large product and a large copy, and nothing else took time.\n"
    )
    five = [row for name, _ in precisions for row in _worst_five(result["cases"], name)]
    return grid(header, rows) + note + "\nThe worst five of each:\n\n" + grid(worst, five) + source(result)


def _worst_five(cases: Sequence[Result], precision: str) -> Iterator[list[str]]:
    ran = [c for c in cases if "speedup" in c["results"].get(precision, {})]
    for case in sorted(ran, key=lambda c: float(c["results"][precision]["speedup"]))[:5]:
        found = case["results"][precision]
        times = (_ms(found["timings"][name]) for name in ("fusewright alone", "inductor"))
        program = found["program"]
        kernel = " ".join(program.get(k, "") for k in ("family", "tile")).strip()
        size = f"{case['m']}×{case['n']}×{case['k']}"
        epilogue = ", ".join(case["steps"]) or "none"
        yield [precision, size, epilogue, _figure(found["speedup"]), *times, kernel, _waves(case, program)]


def _waves(case: Result, program: Result) -> str:
    """Tiles over multiprocessors (an H200 has 132): just above a whole number, the last wave leaves the chip idle."""
    tile = re.match(r"(\d+)×(\d+)", program.get("tile", ""))
    if not tile:
        return "–"
    return f"{-(-case['m'] // int(tile[1])) * -(-case['n'] // int(tile[2])) / 132:.2f}"


def epilogues(result: Result) -> str:
    """What each epilogue adds to the bare product."""
    summary = result["summary"]
    rows = [["bare product", f"{summary['bare_ms']:.4f}", "–"]]
    rows += [[n, f"{result['timings'][n]['ms']:.4f}", f"{cost:+.1%}"] for n, cost in summary["costs"].items()]
    rows.append(["bare product, cuBLAS", f"{result['timings']['cuBLAS']['ms']:.4f}", "–"])
    note = (
        f"\n{result['dtype']}, {result['size']}³, our kernels alone, inference; the target is at most "
        f"{summary['limit']:.0%}; median of {result['timings']['cuBLAS']['trials']} trials.\n"
    )
    return grid(["epilogue", "ms", "over the bare product"], rows) + note + source(result)


def _modes(model: Result, compared: str) -> list[Result]:
    return [c for c in model.get(compared, {}).get("modes", {}).values() if "timings" in c]


def zoo(result: Result) -> str:
    """By model: kernels, and speedups over the best baseline by dtype and mode."""
    modes, dtypes = ("forward", "forward+backward"), list(result["summary"])
    header = [
        "model",
        "kernels forward",
        "with backward",
        *(f"{d}, {m}" for d in dtypes for m in modes),
        "best baseline",
    ]
    rows = []
    for model, by_dtype in result["models"].items():
        found = {d: r for d, r in by_dtype.items() if "modes" in r}
        kernels = found.get(dtypes[0], {}).get("kernels")
        counts = [" → ".join(str(kernels[n][m]) for n in ("eager", "fusewright")) if kernels else "–" for m in modes]
        cells = [found.get(d, {}).get("modes", {}).get(m, {}) for d in dtypes for m in modes]
        best = dict.fromkeys(CANDIDATES.get(c["best"], c["best"]) for c in cells if "best" in c)
        figures = [" · ".join(_figure(c.get(key)) for key in ("speedup", "device_speedup")) for c in cells]
        rows.append([f"`{model}`", *counts, *figures, ", ".join(best)])
    lines = [
        f"{dtype}: geometric mean {s['geometric_mean']:.2f}× (target {s['target']:.2f}×), worst {s['worst'][1]:.2f}× "
        f"({s['worst'][0]}; none may be below {s['least_allowed']:.2f}×)."
        + "".join(
            f" Device alone: {d['geometric_mean']:.2f}×, worst {d['worst'][1]:.2f}× ({d['worst'][0]})."
            for d in [s.get("device")]
            if d
        )
        for dtype, s in result["summary"].items()
    ]
    searched = {
        name: ["inductor max-autotune" in c["timings"] for m in result["models"].values() for c in _modes(m, name)]
        for name in dtypes
    }
    took_part = "; ".join(f"{name} {sum(had)} of {len(had)}" for name, had in searched.items())
    note = (
        "\nSpeedups over the best of eager, `torch.compile` and max-autotune, with CUDA graphs over `reduce-overhead` "
        "as well; after the dot of the device alone. "
        f"Comparisons that max-autotune took part in: {took_part}. "
        f"Kernels as launched in {dtypes[0]}: eager's → ours.\n"
    )
    if left := sorted(path.stem for path in ZOO.glob("*.py") if path.stem not in result["models"]):
        note += f"\nTime was up before: {', '.join(f'`{name}`' for name in left)}.\n"
    return grid(header, rows) + "\n" + "\n".join(lines) + "\n" + note + source(result)


def training(result: Result) -> str:
    """How far our loss curve is from eager's, beside eager's own spread."""
    rows = []
    for name, found in result["runs"].items():
        if "failed" in found:
            rows.append([name, "–", "–", "–", "failed"])
            continue
        figures = [f"{found[k]:.3g}" for k in ("distance", "spread", "last_loss")]
        rows.append([name, *figures, "yes" if found["passed"] else "**no**"])
    header = ["", "distance to eager", "eager's own spread", "last loss", "within the spread"]
    note = (
        f"\n{result['steps']} steps at batch {result['batch']}; layers {' → '.join(map(str, result['layers']))}. "
        f"Distance: the largest difference of two curves' means over {result['window']} steps; ours to the nearest of "
        f"eager's {result['eager_runs']} runs; spread: the largest between two of those. They differ by the order of "
        f"rows in a batch and an ulp in the initial weights.\n"
    )
    return grid(header, rows) + note + source(result)


def tower(result: Result) -> str:
    """A small batch with CUDA graphs."""
    names = ("eager", "inductor", "inductor reduce-overhead", "fusewright", "fusewright, CUDA graphs")
    rows = [
        [name, *(_ms(found.get("timings", {}).get(n)) for n in names), _figure(found.get("over_reduce_overhead"))]
        for name, found in result["towers"].items()
    ]
    note = (
        f"\nMilliseconds at batch {result['batch']}, inference. The last column is to be at most "
        f"{result['target']:.1f}×; its geometric mean is {_figure(result['geometric_mean'])}.\n"
    )
    header = [
        "five Linears",
        "eager",
        "torch.compile",
        "reduce-overhead",
        "fusewright",
        "with CUDA graphs",
        "÷ reduce-overhead",
    ]
    return grid(header, rows) + note + source(result)


def parity(result: Result) -> str:
    """Operations by how far the simulator's results are from the GPU's."""
    functions = result["functions"]
    apart: dict[int, dict[str, list[str]]] = {}
    for dtype, found in functions.items():
        for name, difference in found.items():
            apart.setdefault(difference["ulps"], {}).setdefault(dtype, []).append(name)
    rows = [
        [_ulps(ulps), *(", ".join(f"`{n}`" for n in sorted(names.get(d, []))) or "–" for d in functions)]
        for ulps, names in sorted(apart.items())
    ]
    host = result["host"]
    note = (
        f"\nThe most over {result['operands']:,} operands, the host's functions from {host['libc']}. "
        f"{_same(result['exact'])}\n"
    )
    return grid(["apart by at most", *functions], rows) + note + source(result)


def _ulps(count: int) -> str:
    return {0: "nothing", 1: "1 ulp"}.get(count, f"{count} ulps")


def _same(exact: Mapping[str, Result]) -> str:
    """Which of the operations that must give the same bits do."""
    parts = []
    for dtype, found in exact.items():
        wrong = [f"`{name}`" for name, difference in found.items() if difference["same"] < 1]
        parts.append(
            f"{len(found) - len(wrong)} of {len(found)} in {dtype}" + (f", not {', '.join(wrong)}" * bool(wrong))
        )
    return f"Of the operations that must give the same bits these do: {'; '.join(parts)}."


def hopper(result: Result) -> str:
    """Which cases of Hopper's instructions gave the simulator's bits on a GPU."""
    found = result["hopper"]
    wrong = [f"`{name}`" for name, difference in found.items() if difference]
    verdict = f"all but {', '.join(wrong)}" if wrong else "all"
    left = [f"`{name}`" for name in re.findall(r"^@case\ndef (\w+)", CASES.read_text(), re.M) if name not in found]
    rest = f"\nNot compared with a GPU yet: {', '.join(left)}." if left else ""
    return f"Of {len(found)} cases {verdict} gave the simulator's bits.{rest}\n{source(result)}"


# marker → the results that it shows, and how
TABLES: dict[str, tuple[str, Callable[[Result], str]]] = {
    "headline": ("headline", headline),
    "accuracy": ("headline", accuracy),
    "overhead": ("headline", overhead),
    "graphs": ("headline", graphs),
    "precision": ("precision", precision),
    "float32_accuracy": ("accuracy", float32_accuracy),
    "gemm_simt": ("gemm_simt", gemm_simt),
    "first_call": ("first_call", first_call),
    "sweep": ("sweep", lambda r: sweep(r) + image("sweep", "Speedups of the sweep by size and precision")),
    "epilogues": ("epilogues", epilogues),
    "zoo": ("zoo", lambda r: zoo(r) + image("zoo", "Speedups of the zoo's models")),
    "training": ("training", lambda r: training(r) + image("training", "Loss curves with and without fusewright")),
    "tower": ("tower", tower),
    "parity": ("parity", parity),
    "hopper_parity": ("parity", hopper),
}
NOT_MEASURED = "Not measured yet"


def render(name: str, results: Path = RESULTS, body: str = "") -> str:
    """The table for a marker. body: what stands there now; where it says so, a program need not have run.

    Raises Stale where there are no results.
    """
    program, table = TABLES[name]
    path = results / f"{program}.json"
    if not path.is_file() and body.startswith(NOT_MEASURED):
        return f"{NOT_MEASURED}: `python benchmarks/{program}.py` does it, on a GPU.\n"
    if not path.is_file():
        wanted = f"run `python benchmarks/{program}.py` on a GPU, or write {NOT_MEASURED!r} between its markers"
        raise Stale(f"the table {name!r} needs {path}; {wanted}")
    return table(json.loads(path.read_text()))


def filled(text: str, results: Path = RESULTS) -> str:
    """`text` with every table written anew."""

    def replace(match: re.Match[str]) -> str:
        name = match["name"]
        if name not in TABLES:
            return match[0]
        return f"<!-- {name}:begin -->\n{render(name, results, match['body'])}<!-- {name}:end -->"

    return MARKER.sub(replace, text)


def without_tables(text: str) -> str:
    """What a person wrote."""
    return MARKER.sub("", text)


def documents(root: Path = ROOT) -> list[Path]:
    """What users read; docs/lab holds notes of single experiments."""
    docs = [path for path in sorted(root.glob("docs/**/*.md")) if root / "docs" / "lab" not in path.parents]
    return [path for path in (root / "README.md", *docs) if path.is_file()]


def unmarked(texts: Sequence[str], results: Path = RESULTS) -> Iterator[str]:
    """The programs that have results which no table of any document shows."""
    shown = {TABLES[m["name"]][0] for text in texts for m in MARKER.finditer(text) if m["name"] in TABLES}
    for program in dict.fromkeys(program for program, _ in TABLES.values()):
        if (results / f"{program}.json").is_file() and program not in shown:
            yield program


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE", help="default: README.md and docs/**/*.md")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--results", type=Path, default=RESULTS, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    paths, wrong = options.files or documents(), []
    texts = {path: path.read_text() for path in paths}
    for path, text in texts.items():
        try:
            new = filled(text, options.results)
        except Stale as error:
            wrong.append(f"{path}: {error}")
            continue
        if new != text and options.check:
            wrong.append(f"{path}: its tables are stale; run `python benchmarks/table.py`")
        elif new != text:
            path.write_text(new)
    for program in unmarked(list(texts.values()), options.results):
        names = [f"`<!-- {n}:begin -->`" for n, (p, _) in TABLES.items() if p == program]
        wrong.append(f"no document shows results/{program}.json: it needs a marker, one of {', '.join(names)}")
    print("\n".join(wrong), file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
