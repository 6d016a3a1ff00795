"""float32 products of the example architecture by torch's precision flags. Writes results/precision.json.

    python benchmarks/precision.py [--trials N] [--autotune]

"highest" is true float32; "tf32" lets products round operands to TF32. Everything beside which we are measured runs
under the same flag. forward runs under no_grad; frozen keeps what is made of the weight from call to call. Each mode is
timed as it is called and on the device alone. Errors are against float64, as ratios to eager's under the same flag.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import measure
from common import GRAPHS, times_faster
from headline import BATCH, INPUTS, OUTPUTS, Subject, subjects
from measure import Candidate, Headline

FLAGS = {"highest": "ieee", "tf32": "tf32"}
COMPILED: dict[str, dict[str, Any]] = {
    "inductor": {"backend": "inductor"},
    "inductor max-autotune": {"backend": "inductor", "mode": "max-autotune-no-cudagraphs"},
    "fusewright": {"backend": "fusewright"},
    **GRAPHS,
}
FROZEN = {"backend": "fusewright", "options": {"freeze": True}}
OURS = ("fusewright", "frozen", "fusewright, CUDA graphs")


def one_flag(names: list[str], trials: int) -> dict[str, Any]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    every = subjects(Headline(INPUTS, OUTPUTS).to("cuda"), {**{n: COMPILED[n] for n in names}, "frozen": FROZEN})
    eager, frozen = every["eager"], every.pop("frozen")
    report: dict[str, Any] = {"errors": {}, "modes": {}, "kernels": {}}
    report["errors"] = errors({**every, "frozen": frozen})
    modes = {
        "forward": {n: Candidate(s.forward) for n, s in {**every, "frozen": frozen}.items()},
        "forward+backward": {n: s.candidate("forward+backward") for n, s in every.items()},
    }
    for mode, candidates in modes.items():
        for name, queued in ((mode, False), (f"{mode}, device alone", True)):
            timed = measure.interleaved(candidates, trials, queued=queued)
            report["modes"][name] = {"timings": timed, "times_faster": times_faster(timed, OURS)}
    for name in ("fusewright", "frozen"):
        subject = frozen if name == "frozen" else every[name]
        report["kernels"][name] = kernels(subject.forward)
    report["kernels"]["training"] = kernels(every["fusewright"].both)
    eager.reset()
    return report


def errors(every: dict[str, Subject]) -> dict[str, Any]:
    """By candidate: the relative Frobenius error of the result and the signed bias, the error over eager's first."""
    eager = every["eager"]
    exact = eager.exact().forward()

    def one(found: Tensor) -> tuple[float, float]:
        difference = found.double() - exact
        bias = (difference * exact.sign()).mean() / exact.abs().mean()
        return float(difference.norm() / exact.norm()), float(bias)

    found = {n: one(s.forward()) for n, s in every.items()}
    return {n: {"over_eager": e / found["eager"][0], "frobenius": e, "bias": b} for n, (e, b) in found.items()}


def kernels(run: Callable[[], Any]) -> list[dict[str, Any]]:
    """The kernels of one call on the device, in order, with their microseconds."""
    run()
    return [{"kernel": e.name[:60], "us": round(e.device_time, 1)} for e in measure.profiled(run)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=measure.TRIALS)
    parser.add_argument("--autotune", action="store_true", help="beside max-autotune too, which takes minutes")
    options = parser.parse_args()
    names = [n for n in COMPILED if options.autotune or "autotune" not in n]
    report: dict[str, Any] = {"environment": measure.environment(), "flags": {}}
    report["sizes"] = {"batch": BATCH, "inputs": INPUTS, "outputs": OUTPUTS}
    for name, flag in FLAGS.items():
        torch.backends.cuda.matmul.fp32_precision = flag
        report["flags"][name] = one_flag(names, options.trials)
        measure.write("precision", report)
        for mode, found in report["flags"][name]["modes"].items():
            times = {n: round(t.get("ms", 0), 4) for n, t in found["timings"].items()}
            faster = {n: round(f, 2) for n, f in found["times_faster"].items()}
            print(f"{name} {mode}: {times} times faster {faster}", flush=True)
        for n, of in report["flags"][name]["kernels"].items():
            print(f"{name} {n}:", [(k["kernel"], k["us"]) for k in of], flush=True)
        print({n: round(e["over_eager"], 3) for n, e in report["flags"][name]["errors"].items()}, flush=True)
    report["card_after"] = measure.card()
    measure.write("precision", report)


if __name__ == "__main__":
    main()
