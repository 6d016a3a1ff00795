"""The model files of benchmarks/zoo/ beside eager and torch.compile, forward and training. Writes results/zoo.json.

    python benchmarks/zoo.py [--quick] [--seconds 300] [--only MODEL ...]

forward+backward gives the gradients of every input and parameter. max-autotune takes minutes of search: it is added
last, model by model, while time is left, and not at all with --quick. Errors are against float64, as ratios to eager's.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch

import measure
from common import MODES, Budget, Subject, attempt, compiling_only, errors, geometric_mean, launched, measured_in_turn
from fusewright.capture import model_file

ZOO = Path(__file__).resolve().parent / "zoo"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
TARGETS = {"float32": 3.0, "bfloat16": 1.05}
LEAST = 0.97  # no model may be slower than this
TRIALS = 20
SHARE = 0.5  # of the time, at most, goes into compilation before anything is measured

EAGER, OURS, AUTOTUNE = "eager", "fusewright", "inductor max-autotune"
COMPILED: dict[str, dict[str, Any] | None] = {
    EAGER: None,
    "inductor": {"backend": "inductor"},
    OURS: {"backend": "fusewright"},
    AUTOTUNE: {"backend": "inductor", "mode": "max-autotune-no-cudagraphs"},
}

Task = tuple[str, str]  # model, dtype


def subject(task: Task, candidate: str) -> Subject:
    model, dtype = task
    instance = model_file.load(ZOO / f"{model}.py").instantiate(dtype=DTYPES[dtype], device="cuda")
    return Subject(instance.model, instance.inputs, COMPILED[candidate])


def prepare(task: Task, trials: int) -> Callable[[], dict[str, Any]]:
    """Compiles every candidate but max-autotune for forward and training, without tuning ours."""
    subjects = {name: subject(task, name).training() for name in COMPILED if name != AUTOTUNE}
    for mode in MODES:
        for name, candidate in subjects.items():
            with compiling_only() if name == OURS else nullcontext():
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
        found["modes"][mode] = {"timings": timed, **speedup(timed)}
    return found


def searched(task: Task, trials: int) -> dict[str, Any]:
    """The same with max-autotune among the candidates, whose search needs the device to itself."""
    torch._dynamo.reset()
    return one({name: subject(task, name).training() for name in COMPILED}, trials)


def _kernels(subject: Subject, mode: str) -> int:
    subject.reset()
    subject.run(mode)()
    subject.reset()
    return len(launched(subject.run(mode)))


def speedup(timed: Mapping[str, Any]) -> dict[str, Any]:
    """The best baseline's time over ours."""
    ms = {name: t["ms"] for name, t in timed.items() if "ms" in t}
    baselines = {name: t for name, t in ms.items() if name != OURS}
    if OURS not in ms or not baselines:
        return {}
    best = min(baselines, key=lambda name: baselines[name])
    return {"best": best, "speedup": baselines[best] / ms[OURS]}


def summary(models: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """By dtype, over models and modes: the geometric mean of the speedups, the worst, and the targets."""
    found = {}
    for dtype in DTYPES:
        ratios = {
            f"{model}, {mode}": timed["speedup"]
            for model, by_dtype in models.items()
            for mode, timed in by_dtype.get(dtype, {}).get("modes", {}).items()
            if "speedup" in timed
        }
        if ratios:
            worst = min(ratios, key=lambda name: ratios[name])
            found[dtype] = {
                "geometric_mean": geometric_mean(ratios.values()),
                "target": TARGETS[dtype],
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
        report["models"].setdefault(task[0], {})[task[1]] = found
        report["summary"] = summary(report["models"])
        measure.write("zoo", report)
        _print(task, found)

    for task, found in measured_in_turn(partial(prepare, trials=trials), tasks, budget, SHARE):
        keep(task, found)
    for task in tasks if not options.quick else ():
        if budget.spent:
            print(f"time is up: no max-autotune for {task}", flush=True)
        elif "failed" not in (found := attempt(partial(searched, task, trials))):
            keep(task, found)
    print(report["summary"])


def _print(task: Task, found: Mapping[str, Any]) -> None:
    if "failed" in found:
        print(*task, found, flush=True)
        return
    for mode, timed in found["modes"].items():
        times = {n: round(t["ms"], 3) if "ms" in t else t for n, t in timed["timings"].items()}
        print(f"{task[0]} {task[1]} {mode}: {timed.get('speedup', 0):.2f}x {times}", flush=True)
    problems = found["errors"].get(OURS, found["errors"])
    print(f"  errors {problems}, kernels {found['kernels']}", flush=True)


if __name__ == "__main__":
    main()
