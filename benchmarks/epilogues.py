"""What an epilogue costs over the bare product, our kernels alone, bfloat16. Writes results/epilogues.json.

    python benchmarks/epilogues.py [--quick] [--seconds 60]

x·Wᵀ of 4096 × 4096 × 4096 in inference; the bare product by cuBLAS for comparison. The device's time alone: an epilogue
costs the host nothing.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch

import measure
from common import Budget, Subject, compiling_only
from products import EIGHT, made, title

SIZE = 4096
DTYPE = torch.bfloat16
LIMIT = 0.03  # of the bare product's time
BARE: tuple[str, ...] = ()
CASES = (BARE, *EIGHT)
COMPILED = {"backend": "fusewright", "options": {"library": False}}


def subject(steps: tuple[str, ...], compiled: dict[str, Any] | None) -> Subject:
    model, inputs = made(SIZE, SIZE, SIZE, steps, DTYPE, "cuda")
    return Subject(model, inputs, compiled)


def summary(timings: dict[str, Any]) -> dict[str, Any]:
    """By epilogue: its share of the bare product's time, on top."""
    bare = timings[title(BARE)]["ms"]
    costs = {title(s): timings[title(s)]["ms"] / bare - 1 for s in EIGHT if "ms" in timings.get(title(s), {})}
    return {"bare_ms": bare, "limit": LIMIT, "costs": costs, "worst": max(costs.values())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer trials")
    parser.add_argument("--seconds", type=float, default=60.0)
    options = parser.parse_args()
    budget = Budget(options.seconds)
    subjects = {title(steps): subject(steps, COMPILED) for steps in CASES}
    with measure.recorded() as built:
        for one in subjects.values():  # the kernels of all compile in the background, together
            with compiling_only(wait=False):
                one.forward()
    for name in list(subjects):
        if budget.spent and len(subjects) > 2:
            print(f"time is up: {name} is left out", flush=True)
            del subjects[name]
        else:
            subjects[name].forward()
    timed = {name: s.candidate("forward") for name, s in subjects.items()}
    timed["cuBLAS"] = subject(BARE, None).candidate("forward")
    timings = measure.interleaved(timed, 20 if options.quick else 2 * measure.TRIALS, queued=True)
    programs = [next(iter(measure.executable_of(b).programs.values())) for b in built]
    report = {
        "environment": measure.environment(),
        "size": SIZE,
        "dtype": str(DTYPE).removeprefix("torch."),
        "timings": timings,
        "tiles": dict(zip(map(title, CASES), (f"{p.family} {p.variant}" for p in programs), strict=False)),
        "summary": summary(timings),
    }
    measure.write("epilogues", report)
    print({name: f"{cost:+.1%}" for name, cost in report["summary"]["costs"].items()})


if __name__ == "__main__":
    main()
