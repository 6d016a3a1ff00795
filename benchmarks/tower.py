"""A tower of five Linears at batch 16, ours with CUDA graphs beside torch.compile's. Writes results/tower.json.

    python benchmarks/tower.py [--quick] [--seconds 60]

In inference. Launches, not kernels, take the time of so small a batch: hence CUDA graphs on both sides.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

import measure
from common import GRAPHS, Budget, Subject, attempt, compiling_only, geometric_mean, measured_in_turn
from fusewright.capture import model_file
from zoo import ZOO

BATCH = 16
WIDTHS = (1024, 4096)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
TARGET = 0.8  # of reduce-overhead's time

THEIRS, OURS = GRAPHS
COMPILED: dict[str, dict[str, Any] | None] = {
    "eager": None,
    "inductor": {"backend": "inductor"},
    "fusewright": {"backend": "fusewright"},
    **GRAPHS,
}

Task = tuple[int, str]  # width, dtype


def subject(task: Task, candidate: str) -> Subject:
    width, dtype = task
    file = model_file.load(ZOO / "tower.py", {"batch_size": BATCH, "features": width})
    instance = file.instantiate(dtype=DTYPES[dtype], device="cuda")
    return Subject(instance.model, instance.inputs, COMPILED[candidate])


def prepare(task: Task, trials: int) -> Callable[[], dict[str, Any]]:
    """Compiles what needs no turn of its own: what CUDA graphs record waits, and so does what is tuned."""
    subjects = {name: subject(task, name) for name in COMPILED}
    subjects["inductor"].forward()
    with compiling_only():
        subjects["fusewright"].forward()
    torch.cuda.synchronize()
    return partial(one, subjects, trials)


def one(subjects: Mapping[str, Subject], trials: int) -> dict[str, Any]:
    with measure.recorded() as built:
        timed = measure.interleaved({name: s.candidate("forward") for name, s in subjects.items()}, trials)
    chosen = [f"{p.family} {p.variant}" for b in built for p in measure.executable_of(b).programs.values()]
    weights = sum(p.nbytes for p in subjects[OURS].model.parameters())
    host = {n: attempt(partial(measure.host_microseconds, s.forward, 50, 10)) for n, s in subjects.items()}
    return {"timings": timed, "host": host, "chosen": chosen, "weight_bytes": weights, **ratio(timed)}


def ratio(timed: Mapping[str, Any]) -> dict[str, float]:
    """Ours over theirs, both with CUDA graphs: below 1 is faster."""
    if any("ms" not in timed.get(name, {}) for name in (OURS, THEIRS)):
        return {}
    return {"over_reduce_overhead": timed[OURS]["ms"] / timed[THEIRS]["ms"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer trials")
    parser.add_argument("--seconds", type=float, default=60.0)
    options = parser.parse_args()
    budget = Budget(options.seconds)
    tasks = [(width, dtype) for width in WIDTHS for dtype in DTYPES]
    report: dict[str, Any] = {"environment": measure.environment(), "batch": BATCH, "target": TARGET, "towers": {}}
    trials = 30 if options.quick else 100
    for (width, dtype), found in measured_in_turn(partial(prepare, trials=trials), tasks, budget, 0.6):
        report["towers"][f"{dtype}, {width} wide"] = found
        ratios = [t["over_reduce_overhead"] for t in report["towers"].values() if "over_reduce_overhead" in t]
        report["geometric_mean"] = geometric_mean(ratios) if ratios else None
        measure.write("tower", report)
        print(
            dtype,
            width,
            found.get("over_reduce_overhead"),
            found.get("timings", found),
            found.get("chosen"),
            flush=True,
        )


if __name__ == "__main__":
    main()
