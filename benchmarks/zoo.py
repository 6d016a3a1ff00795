"""The model files of benchmarks/zoo/ beside eager and torch.compile, forward and training. Writes results/zoo.json.

    python benchmarks/zoo.py [--quick] [--seconds 300] [--only MODEL ...]

forward+backward gives the gradients of every input and parameter. In 16 bits, where the host may take longer than the
device, everything is measured with CUDA graphs on both sides, too. max-autotune takes minutes of search: it is added
last, model by model, while time is left, and not at all with --quick. Errors are against float64, as ratios to eager's.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch

import measure
from common import (
    GRAPHS,
    MODES,
    Budget,
    Subject,
    attempt,
    compiling_only,
    errors,
    geometric_mean,
    launched,
    measured_in_turn,
    times_faster,
)
from fusewright.capture import model_file

ZOO = Path(__file__).resolve().parent / "zoo"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
LEAST = 0.97  # no model may be slower than this
TRIALS = 20
SHARE = 0.5  # of the time, at most, goes into compilation before anything is measured

EAGER, OURS, AUTOTUNE = "eager", "fusewright", "inductor max-autotune"
REPLAYED = "fusewright, CUDA graphs"
COMPILED: dict[str, dict[str, Any] | None] = {
    EAGER: None,
    "inductor": {"backend": "inductor"},
    OURS: {"backend": "fusewright"},
    AUTOTUNE: {"backend": "inductor", "mode": "max-autotune-no-cudagraphs"},
    **GRAPHS,
}
# What is compared: by name its dtype, which of ours, and the geometric mean of speedups that is asked for.
COMPARED = {
    "float32": ("float32", OURS, 3.0),
    "bfloat16": ("bfloat16", OURS, 1.05),
    "bfloat16, CUDA graphs": ("bfloat16", REPLAYED, 1.05),
}

Task = tuple[str, str]  # model, dtype


def subject(task: Task, candidate: str) -> Subject:
    model, dtype = task
    instance = model_file.load(ZOO / f"{model}.py").instantiate(dtype=DTYPES[dtype], device="cuda")
    return Subject(instance.model, instance.inputs, COMPILED[candidate])


def candidates(task: Task) -> list[str]:
    """With CUDA graphs only where they are compared."""
    ours = [name for dtype, name, _ in COMPARED.values() if dtype == task[1]]
    return [name for name in COMPILED if name not in GRAPHS or REPLAYED in ours]


def prepare(task: Task, trials: int) -> Callable[[], dict[str, Any]]:
    """Compiles every candidate but max-autotune for forward and training, without tuning ours."""
    subjects = {name: subject(task, name).training() for name in candidates(task) if name != AUTOTUNE}
    for mode in MODES:
        for name, candidate in subjects.items():
            with compiling_only() if name in (OURS, REPLAYED) else nullcontext():
                candidate.run(mode)()
            candidate.reset()
    torch.cuda.synchronize()
    return partial(one, subjects, trials)


def one(subjects: Mapping[str, Subject], trials: int) -> dict[str, Any]:
    """Timings by mode, errors, and the kernels that eager and ours launch in a forward and a backward."""
    others = {name: s for name, s in subjects.items() if name != EAGER}
    found: dict[str, Any] = {"modes": {}, "kernels": {}}
    found["errors"] = attempt(partial(errors, others, subjects[EAGER]))
    for name in (EAGER, OURS):
        found["kernels"][name] = {mode: attempt(partial(_kernels, subjects[name], mode)) for mode in MODES}
    for mode in MODES:
        timed = measure.interleaved({name: s.candidate(mode) for name, s in subjects.items()}, trials)
        found["modes"][mode] = {"timings": timed}
    return found


def searched(task: Task, trials: int) -> dict[str, Any]:
    """The same with max-autotune among the candidates, whose search needs the device to itself."""
    torch._dynamo.reset()
    return one({name: subject(task, name).training() for name in candidates(task)}, trials)


def _kernels(subject: Subject, mode: str) -> int:
    subject.reset()
    subject.run(mode)()
    subject.reset()
    return len(launched(subject.run(mode)))


def comparisons(dtype: str, found: Mapping[str, Any]) -> dict[str, Any]:
    """What was found for one model and dtype, once for each of `COMPARED`, with the speedups."""

    def beside(ours: str) -> dict[str, Any]:
        return {mode: {**timed, **speedup(timed["timings"], ours)} for mode, timed in found["modes"].items()}

    return {name: found | {"modes": beside(ours)} for name, (of, ours, _) in COMPARED.items() if of == dtype}


def speedup(timed: Mapping[str, Any], ours: str) -> dict[str, Any]:
    """The best baseline's time over that of one of ours."""
    faster = times_faster(timed, (OURS, REPLAYED)).get(ours)
    if faster is None:
        return {}
    baselines = [n for n in timed if n not in (OURS, REPLAYED) and (n not in GRAPHS or ours in GRAPHS)]
    best = min(baselines, key=lambda name: timed[name].get("ms", math.inf))
    return {"best": best, "speedup": faster}


def summary(models: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """By comparison, over models and modes: the geometric mean of the speedups, the worst, and the targets."""
    found = {}
    for name, (_, _, target) in COMPARED.items():
        ratios = {
            f"{model}, {mode}": timed["speedup"]
            for model, compared in models.items()
            for mode, timed in compared.get(name, {}).get("modes", {}).items()
            if "speedup" in timed
        }
        if ratios:
            worst = min(ratios, key=lambda place: ratios[place])
            found[name] = {
                "geometric_mean": geometric_mean(ratios.values()),
                "target": target,
                "worst": [worst, ratios[worst]],
                "least_allowed": LEAST,
            }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = sorted(path.stem for path in ZOO.glob("*.py"))
    parser.add_argument("--quick", action="store_true", help="fewer trials, no max-autotune")
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--only", nargs="+", choices=known, default=known, metavar="MODEL")
    options = parser.parse_args()
    budget, trials = Budget(options.seconds), 10 if options.quick else TRIALS
    tasks = [(model, dtype) for model in options.only for dtype in DTYPES]
    report: dict[str, Any] = {"environment": measure.environment(), "models": {}, "summary": {}}

    def keep(task: Task, found: dict[str, Any]) -> None:
        compared = {task[1]: found} if "failed" in found else comparisons(task[1], found)
        report["models"].setdefault(task[0], {}).update(compared)
        report["summary"] = summary(report["models"])
        measure.write("zoo", report)
        for name, result in compared.items():
            _print(task[0], name, result)

    for task, found in measured_in_turn(partial(prepare, trials=trials), tasks, budget, SHARE):
        keep(task, found)
    for task in tasks if not options.quick else ():
        if budget.spent:
            print(f"time is up: no max-autotune for {task}", flush=True)
        elif "failed" not in (found := attempt(partial(searched, task, trials))):
            keep(task, found)
    print(report["summary"])


def _print(model: str, compared: str, found: Mapping[str, Any]) -> None:
    if "failed" in found:
        print(model, compared, found, flush=True)
        return
    for mode, timed in found["modes"].items():
        times = {n: round(t["ms"], 3) if "ms" in t else t for n, t in timed["timings"].items()}
        print(f"{model} {compared} {mode}: {timed.get('speedup', 0):.2f}x {times}", flush=True)
    problems = found["errors"].get(OURS, found["errors"])
    print(f"  errors {problems}, kernels {found['kernels']}", flush=True)


if __name__ == "__main__":
    main()
