"""Random shapes and epilogues, our kernels alone beside cuBLAS with Inductor's epilogue. Writes results/sweep.json.

    python benchmarks/sweep.py [--quick] [--seconds 150] [--cases 40] [--seed S]

The seed is chosen at each run and recorded; --seed repeats a run. M and N lie between 512 and 8192, K between 512 and
8192, evenly on a logarithmic scale; half of the sizes are multiples of 128, a quarter multiples of 8, and a quarter any
number, but K stays a multiple of 8. Each case runs in inference in every precision. Errors are against float64, in the
Frobenius norm, as ratios to Inductor's. float32 has a floor for each case: its fp16 products and the bytes of splitting
its operands, at the rates of a large product and a large copy in the same run. Beside the time of the call, as a user
has it, stands the device's alone: most of these products are shorter than either compiler's call on the host.
"""

from __future__ import annotations

import argparse
import dataclasses
import random
import secrets
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

import measure
from common import Budget, Subject, attempt, compiling_only, geometric_mean, measured_in_turn
from fusewright.errors import UnknownSetting
from fusewright.fusion.plan import Region
from fusewright.settings import Settings
from measure import Candidate
from products import ACTIVATIONS, BIAS, OTHERS, PRECISIONS, Precision, flags, made, title

LEAST, MOST = 512, 8192
TRIALS = 10
SHARE = 0.5  # of the time, at most, goes into compilation
TARGETS = {"bfloat16": 1.0, "float16": 1.0, "float32": 3.5, "TF32, frozen": 1.6}
OURS, THEIRS = "fusewright alone", "inductor"


@dataclasses.dataclass(frozen=True)
class Case:
    """y [m, n] = steps(x [m, k] · Wᵀ)."""

    m: int
    n: int
    k: int
    steps: tuple[str, ...]


Task = tuple[Case, str]  # a case and a precision


def draw(seed: int, count: int) -> list[Case]:
    generator = random.Random(seed)
    return [_case(generator) for _ in range(count)]


def _case(r: random.Random) -> Case:
    def size(steps: Sequence[int]) -> int:
        value, step = LEAST * (MOST / LEAST) ** r.random(), r.choice(steps)
        return max(LEAST, round(value / step) * step)

    bias = [BIAS] if r.random() < 0.7 else []
    activation = [r.choice(list(ACTIVATIONS))] if r.random() < 0.7 else []
    other = [r.choice(list(OTHERS))] if r.random() < 0.6 else []
    rest = [*activation, *other] if r.random() < 0.5 else [*other, *activation]
    steps = (128, 128, 8, 1)
    return Case(size(steps), size(steps), size((128, 128, 8, 8)), (*bias, *rest))


def available() -> dict[str, Precision]:
    """The precisions whose options this version of fusewright has."""
    found = {}
    for name, precision in PRECISIONS.items():
        try:
            Settings.of(precision.options)
        except UnknownSetting as error:
            print(f"{name}: not measured: {error}", flush=True)
        else:
            found[name] = precision
    return found


def compilations(precision: Precision) -> dict[str, dict[str, Any]]:
    ours = {"backend": "fusewright", "options": {"library": False, **precision.options}}
    return {THEIRS: {"backend": "inductor"}, OURS: ours}


def prepare(task: Task, trials: int) -> Callable[[], dict[str, Any]]:
    """Compiles both candidates of a case, without tuning ours, which needs the device to itself."""
    case, precision = task[0], PRECISIONS[task[1]]
    model, inputs = made(case.m, case.n, case.k, case.steps, precision.dtype, "cuda")
    subjects = {name: Subject(model, inputs, compiled) for name, compiled in compilations(precision).items()}
    with flags(precision.tf32), measure.recorded() as built:
        with compiling_only():
            subjects[OURS].forward()
        subjects[THEIRS].forward()
    torch.cuda.synchronize()
    return partial(one, task, subjects, built, trials)


def one(task: Task, subjects: Mapping[str, Subject], built: list[Any], trials: int) -> dict[str, Any]:
    case, precision = task[0], PRECISIONS[task[1]]
    model, inputs = made(case.m, case.n, case.k, case.steps, precision.dtype, "cuda")
    with flags(precision.tf32):
        errors = _errors(subjects, Subject(model.double(), [x.double() for x in inputs]).forward())
        del model, inputs
        candidates = {name: Candidate(s.forward) for name, s in subjects.items()}
        timed, device = (measure.interleaved(candidates, trials, queued=queued) for queued in (False, True))
    found: dict[str, Any] = {"timings": timed, "device": device, "errors": errors, "program": _program(built)}
    if all("ms" in t for t in (*timed.values(), *device.values())):
        found["speedup"] = timed[THEIRS]["ms"] / timed[OURS]["ms"]
        found["device_speedup"] = device[THEIRS]["ms"] / device[OURS]["ms"]
        found["tflop_per_s"] = 2e-9 * case.m * case.n * case.k / device[OURS]["ms"]
    if all(isinstance(e, float) for e in errors.values()):
        found["error_over_inductor"] = errors[OURS] / max(errors[THEIRS], 1e-30)
    return found


def floor_ms(m: int, n: int, k: int, precision: Precision, rates: Mapping[str, float]) -> float:
    """Milliseconds that no float32 product by halves can beat; frozen weights are split beforehand."""
    assert precision.halves is not None
    products, written = precision.halves
    split = m * k + (0 if precision.options.get("freeze") else n * k)
    multiplying = products * 2 * m * n * k / rates["fp16_flop_per_s"]
    return 1e3 * (multiplying + split * (4 + written) / rates["copy_bytes_per_s"])


def _errors(subjects: Mapping[str, Subject], exact: Tensor) -> dict[str, Any]:
    def error(subject: Subject) -> float:
        return float((subject.forward().double() - exact).norm() / exact.norm())

    return {name: attempt(partial(error, subject)) for name, subject in subjects.items()}


def _program(built: list[Any]) -> dict[str, str]:
    """The kernel that was chosen for the product."""
    programs = [p for b in built for p in measure.executable_of(b).programs.values()]
    product = next((p for p in programs if isinstance(p.region, Region) and p.region.gemm is not None), None)
    return {"family": product.family, "tile": product.variant} if product else {}


def summary(cases: Sequence[dict[str, Any]], precisions: Sequence[str]) -> dict[str, Any]:
    """By precision: the geometric mean of the speedups, and of those of the device alone, the target, the extremes, the
    worst error and failures. floor: the geometric mean of what the floors would be in speedups."""
    found = {}
    for name in precisions:
        results = [case["results"][name] for case in cases if name in case["results"]]
        ratios = [r["speedup"] for r in results if "speedup" in r]
        if not results:
            continue
        found[name] = {
            "cases": len(ratios),
            "failed": len(results) - len(ratios),
            "geometric_mean": geometric_mean(ratios) if ratios else None,
            "device": geometric_mean(r["device_speedup"] for r in results if "speedup" in r) if ratios else None,
            "target": TARGETS[name],
            "least": min(ratios, default=None),
            "most": max(ratios, default=None),
            "floor": geometric_mean(r["floor"] for r in results if "floor" in r) if PRECISIONS[name].halves else None,
            "error_over_inductor": max(
                (r["error_over_inductor"] for r in results if "error_over_inductor" in r), default=None
            ),
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="eight cases, six trials")
    parser.add_argument("--seconds", type=float, default=150.0)
    parser.add_argument("--cases", type=int, default=40)
    parser.add_argument("--seed", type=int, default=None)
    options = parser.parse_args()
    budget, trials = Budget(options.seconds), 6 if options.quick else TRIALS
    seed = secrets.randbelow(1 << 32) if options.seed is None else options.seed
    cases = draw(seed, min(options.cases, 8) if options.quick else options.cases)
    precisions = available()
    report: dict[str, Any] = {"environment": measure.environment(), "seed": seed, "trials": trials, "cases": []}
    report["rates"] = measure.rates(trials)
    tasks = [(case, name) for case in cases for name in precisions]
    for (case, name), found in measured_in_turn(partial(prepare, trials=trials), tasks, budget, SHARE):
        if not report["cases"] or report["cases"][-1]["case"] != cases.index(case):
            report["cases"].append({"case": cases.index(case), **dataclasses.asdict(case), "results": {}})
        if PRECISIONS[name].halves and "speedup" in found:
            floor = floor_ms(case.m, case.n, case.k, PRECISIONS[name], report["rates"])
            found["floor"] = found["device"][THEIRS]["ms"] / floor
        report["cases"][-1]["results"][name] = found
        report["summary"] = summary(report["cases"], list(precisions))
        measure.write("sweep", report)
        speedup = f"{found['speedup']:.2f} ({found['device_speedup']:.2f})" if "speedup" in found else found
        print(f"{case.m}×{case.n}×{case.k} {title(case.steps)}, {name}: {speedup} {found.get('program')}", flush=True)
    print({n: (s["geometric_mean"], s["device"]) for n, s in report.get("summary", {}).items()}, "seed", seed)


if __name__ == "__main__":
    main()
