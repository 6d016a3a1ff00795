"""The model files of benchmarks/zoo/ beside eager and torch.compile, forward and training. Writes results/zoo.json.

    python benchmarks/zoo.py [--quick] [--no-autotune] [--seconds 600] [--only MODEL ...] [--dtypes DTYPE ...] [--add]

forward+backward gives the gradients of every input and parameter. In 16 bits, where the host may take longer than the
device, everything is measured with CUDA graphs on both sides, too. max-autotune searches when its model is measured,
with the card to itself: only its kernels are compiled beforehand. --no-autotune leaves it out; --quick does, too, and
takes fewer trials. --add keeps what else the file has, if the same code was measured on the same machine. Errors are
against float64, as ratios to eager's.
"""

from __future__ import annotations

import argparse
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch._inductor.runtime.benchmarking import benchmarker
from torch._inductor.utils import clear_caches

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
QUEUED = 12  # trials of the device alone, whose spread is small
SHARE = 0.5  # of the time, at most, goes into compilation before anything is measured
INDUCTORS_CACHE = "TORCHINDUCTOR_CACHE_DIR"
# Triton's own default, so that Inductor does not put it into its cache.
os.environ.setdefault("TRITON_CACHE_DIR", str(Path.home() / ".triton" / "cache"))

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
    """With CUDA graphs only where they are compared; without max-autotune."""
    ours = [name for dtype, name, _ in COMPARED.values() if dtype == task[1]]
    return [name for name in COMPILED if name != AUTOTUNE and (name not in GRAPHS or REPLAYED in ours)]


def prepare(task: Task, trials: int, autotune: bool) -> Callable[[], dict[str, Any]]:
    """Compiles every candidate for forward and training, without tuning ours."""
    subjects = {name: subject(task, name).training() for name in candidates(task)}
    for mode in MODES:
        for name, candidate in subjects.items():
            with compiling_only() if name in (OURS, REPLAYED) else nullcontext():
                candidate.run(mode)()
            candidate.reset()
    if autotune:
        with choosing_anew(), patch.object(benchmarker, "benchmark_gpu", lambda *_, **__: 1.0):
            attempt(partial(searched, task))
    torch.cuda.synchronize()
    return partial(one, task, subjects, trials, autotune)


@contextmanager
def choosing_anew() -> Iterator[None]:
    """Inside, max-autotune knows no earlier choice, and none is remembered; Triton's compiled kernels are."""
    with tempfile.TemporaryDirectory() as empty, patch.dict(os.environ, {INDUCTORS_CACHE: empty}):
        clear_caches()
        yield
    clear_caches()


def searched(task: Task) -> Subject:
    """max-autotune, after its search."""
    found = subject(task, AUTOTUNE).training()
    for mode in MODES:
        found.run(mode)()
        found.reset()
    return found


def one(task: Task, subjects: Mapping[str, Subject], trials: int, autotune: bool) -> dict[str, Any]:
    """Timings by mode, errors, and the kernels that eager and ours launch in a forward and a backward."""
    if autotune:
        with choosing_anew():
            subjects = {**subjects, AUTOTUNE: searched(task)}
    others = {name: s for name, s in subjects.items() if name != EAGER}
    found: dict[str, Any] = {"modes": {}, "kernels": {}}
    found["errors"] = attempt(partial(errors, others, subjects[EAGER]))
    for name in (EAGER, OURS):
        found["kernels"][name] = {mode: attempt(partial(_kernels, subjects[name], mode)) for mode in MODES}
    for mode in MODES:
        timed = {name: s.candidate(mode) for name, s in subjects.items()}
        alone = measure.interleaved(timed, QUEUED, queued=True)
        found["modes"][mode] = {"timings": measure.interleaved(timed, trials), "device": alone}
    return found


def _kernels(subject: Subject, mode: str) -> int:
    subject.reset()
    subject.run(mode)()
    subject.reset()
    return len(launched(subject.run(mode)))


def comparisons(dtype: str, found: Mapping[str, Any]) -> dict[str, Any]:
    """What was found for one model and dtype, once for each of `COMPARED`, with the speedups."""

    def beside(ours: str) -> dict[str, Any]:
        return {
            mode: {
                **timed,
                **speedup(timed["timings"], ours),
                "device_speedup": speedup(timed["device"], ours).get("speedup"),
            }
            for mode, timed in found["modes"].items()
        }

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
    """By comparison, over models and modes: the geometric mean of the speedups, the worst, the same of the device
    alone, and the targets."""
    found = {}
    for name, (_, _, target) in COMPARED.items():
        called, device = (_over_all(models, name, key) for key in ("speedup", "device_speedup"))
        if called:
            found[name] = {**called, "device": device, "target": target, "least_allowed": LEAST}
    return found


def _over_all(models: Mapping[str, Mapping[str, Any]], compared: str, key: str) -> dict[str, Any]:
    ratios = {
        f"{model}, {mode}": timed[key]
        for model, found in models.items()
        for mode, timed in found.get(compared, {}).get("modes", {}).items()
        if timed.get(key)
    }
    if not ratios:
        return {}
    worst = min(ratios, key=lambda place: ratios[place])
    return {"geometric_mean": geometric_mean(ratios.values()), "worst": [worst, ratios[worst]]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = sorted(path.stem for path in ZOO.glob("*.py"))
    parser.add_argument("--quick", action="store_true", help="fewer trials, no max-autotune")
    parser.add_argument("--no-autotune", action="store_true", help="no max-autotune, which takes minutes of search")
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--only", nargs="+", choices=known, default=known, metavar="MODEL")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES), metavar="DTYPE")
    parser.add_argument("--add", action="store_true")
    options = parser.parse_args()
    budget, trials = Budget(options.seconds), 12 if options.quick else measure.TRIALS
    tasks = [(model, dtype) for model in options.only for dtype in options.dtypes]
    report: dict[str, Any] = {"environment": measure.environment(), "models": {}, "summary": {}}
    if options.add:
        report["models"] = measure.read_same("zoo", report["environment"])["models"]

    def keep(task: Task, found: dict[str, Any]) -> None:
        compared = {task[1]: found} if "failed" in found else comparisons(task[1], found)
        report["models"].setdefault(task[0], {}).update(compared)
        report["summary"] = summary(report["models"])
        measure.write("zoo", report)
        for name, result in compared.items():
            _print(task[0], name, result)

    preparing = partial(prepare, trials=trials, autotune=not (options.quick or options.no_autotune))
    for task, found in measured_in_turn(preparing, tasks, budget, SHARE):
        keep(task, found)
    print(report["summary"])


def _print(model: str, compared: str, found: Mapping[str, Any]) -> None:
    if "failed" in found:
        print(model, compared, found, flush=True)
        return
    for mode, timed in found["modes"].items():
        times = {n: round(t["ms"], 3) if "ms" in t else t for n, t in timed["timings"].items()}
        faster = f"{timed.get('speedup', 0):.2f}x, on the device {timed.get('device_speedup') or 0:.2f}x"
        print(f"{model} {compared} {mode}: {faster} {times}", flush=True)
    problems = found["errors"].get(OURS, found["errors"])
    print(f"  errors {problems}, kernels {found['kernels']}", flush=True)


if __name__ == "__main__":
    main()
