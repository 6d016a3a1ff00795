"""The example architecture beside eager and Inductor: time, error, kernels and overhead. Writes results/headline.json.

    python benchmarks/headline.py [--quick]

forward runs under no_grad; backward gives the gradients of input, weight and bias. Errors are against float64, as
ratios to eager's.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import common
import measure
from common import GRAPHS, attempt, launched, times_faster
from fusewright.tools.comparison import Errors
from fusewright.tools.comparison import measure as errors_of
from measure import Candidate, Headline

BATCH, INPUTS, OUTPUTS = 1024, 8192, 8192
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
MODES = ("forward", "backward", "forward+backward")
# Where the activation's kink may flip an element by luck, only the bulk of a gradient's elements can be compared.
METRICS = {"output": ("frobenius", "median", "p99.9", "maximum", "bias")}
GRADIENT_METRICS = ("median", "p90", "bias")

COMPILED: dict[str, dict[str, Any]] = {
    "inductor": {"backend": "inductor"},
    "inductor max-autotune": {"backend": "inductor", "mode": "max-autotune-no-cudagraphs"},
    "fusewright": {"backend": "fusewright"},
    "fusewright alone": {"backend": "fusewright", "options": {"library": False}},
    **GRAPHS,
}
OURS = ("fusewright", "fusewright alone", "fusewright, CUDA graphs")


@dataclass
class Subject(common.Subject):
    """A candidate of which backward is timed alone, too."""

    def half_way(self) -> None:
        self.reset()
        self.y = self.call(*self.inputs)

    def backward(self) -> None:
        assert self.y is not None
        self.y.backward(self.gradient)

    def candidate(self, mode: str) -> Candidate:
        return Candidate(self.backward, self.half_way) if mode == "backward" else super().candidate(mode)


def subjects(model: Headline, compiled: Mapping[str, Mapping[str, Any]]) -> dict[str, Subject]:
    """Eager and one for each of `compiled`, arguments of torch.compile, with equal inputs and gradients."""
    like = next(model.parameters())
    x, gradient = (torch.randn(BATCH, n, device=like.device).to(like.dtype) for n in (INPUTS, OUTPUTS))
    every = {"eager": None, **compiled}
    return {name: Subject(model, [x], options).training(gradient) for name, options in every.items()}


def one_dtype(dtype: torch.dtype, names: list[str], trials: int, rates: dict[str, float]) -> dict[str, Any]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    every = subjects(Headline(INPUTS, OUTPUTS).to("cuda", dtype), {name: COMPILED[name] for name in names})
    report: dict[str, Any] = {"modes": {}, "families": {}, "kernels": {}, "errors": {}}
    oracle = every["eager"].exact().results()
    eager_errors = _errors(every["eager"].results(), oracle)
    for name, subject in every.items():
        with measure.recorded() as built:
            report["errors"][name] = attempt(
                lambda s=subject, o=oracle, e=eager_errors: _ratios(_errors(s.results(), o), e)
            )
            attempt(subject.forward)
        report["families"][name] = measure.families(built)
        report["kernels"][name] = attempt(lambda s=subject: _kernels(s))
    del oracle
    for mode in MODES:
        timed = measure.interleaved({n: s.candidate(mode) for n, s in every.items()}, trials)
        for name, subject in every.items():
            timed[name] |= attempt(lambda s=subject, m=mode: measure.host_and_device(s.candidate(m)))
        report["modes"][mode] = {"timings": timed, "floor_ms": _floor(mode, dtype, rates), **_summary(timed)}
    return report


def _errors(results: dict[str, Tensor], oracle: dict[str, Tensor]) -> dict[str, Errors]:
    flat = {n: (t.double().flatten(), oracle[n].flatten(), t.dtype) for n, t in results.items()}
    return {n: errors_of(*arguments) for n, arguments in flat.items()}


def _ratios(ours: dict[str, Errors], eager: dict[str, Errors]) -> dict[str, dict[str, float]]:
    """By tensor and metric: the error over eager's, which counts as at least its floor."""

    def ratio(name: str, metric: str) -> float:
        return ours[name].figures[metric] / max(eager[name].figures[metric], eager[name].floor[metric])

    return {n: {m: ratio(n, m) for m in METRICS.get(n, GRADIENT_METRICS)} for n in ours}


def _kernels(subject: Subject) -> dict[str, list[str]]:
    """The kernels that the device ran, by name, in the forward of training and in the backward."""
    subject.reset()
    runs = {"forward": subject.half_way, "backward": subject.backward}
    return {phase: [name[:100] for name in launched(run)] for phase, run in runs.items()}


def _floor(mode: str, dtype: torch.dtype, rates: dict[str, float]) -> float:
    """Milliseconds that no version can beat: operations at the measured rate of fp16 products, or bytes moved once.

    float32 counts as three fp16 products, the fastest known way to it.
    """
    products = {"forward": 1, "backward": 2, "forward+backward": 3}[mode]
    x, y, w = BATCH * INPUTS, BATCH * OUTPUTS, INPUTS * OUTPUTS
    moved = {"forward": x + w + y, "backward": 2 * (x + w) + y, "forward+backward": 3 * (x + w) + 2 * y}[mode]
    operations = 2 * BATCH * INPUTS * OUTPUTS * products * (3 if dtype == torch.float32 else 1)
    return 1e3 * max(operations / rates["fp16_flop_per_s"], moved * dtype.itemsize / rates["copy_bytes_per_s"])


def _summary(timed: dict[str, Any]) -> dict[str, Any]:
    """Ours over eager, and over the best baseline: below 1 is faster. times_faster: the inverse, for each of ours."""
    faster = times_faster(timed, OURS)
    ms = {name: t["ms"] for name, t in timed.items() if "ms" in t}
    if "fusewright" not in ms or "eager" not in ms:
        return {"times_faster": faster}
    return {
        "over_eager": ms["fusewright"] / ms["eager"],
        "over_best": 1 / faster["fusewright"],
        "times_faster": faster,
    }


def overheads() -> dict[str, Any]:
    """Host microseconds of one prebuilt launch, and of one call of a tiny compiled model, in inference."""
    torch._dynamo.reset()
    x = torch.randn(32, 32, device="cuda")
    tiny = nn.LeakyReLU(0.1)
    report: dict[str, Any] = {}
    with torch.no_grad(), measure.recorded() as built:
        for name in ("eager", "inductor", "fusewright"):
            model = measure.separate(copy.deepcopy(tiny))
            call = model if name == "eager" else torch.compile(model, backend=name)
            call(x)
            report[f"call: {name}"] = measure.host_microseconds(lambda c=call: c(x))
    out = torch.empty_like(x)
    executable = measure.executable_of(built[-1])
    report["call: executable"] = measure.host_microseconds(lambda: executable(x))
    launch, arguments, grid = _prebuilt(executable, x, out)
    report["launch"] = measure.host_microseconds(lambda: launch(arguments, grid, 0), calls=500)
    return report


def _prebuilt(executable: Any, x: Tensor, out: Tensor) -> tuple[Any, list[int], tuple[int, int, int]]:
    """The launch of a pointwise plan with one input and one output, its arguments and its grid."""
    from fusewright.codegen.launch import BufferArg, evaluate

    (program,) = executable.programs.values()
    (spec,) = program.launches
    tensors = {executable.plan.inputs[0]: x}
    arguments = [
        tensors.get(a.buffer, out).data_ptr() if isinstance(a, BufferArg) else int(evaluate(a.value, {}))
        for a in spec.args
    ]
    return executable.loaded[spec.kernel, spec.source], arguments, tuple(int(evaluate(g, {})) for g in spec.grid)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="leave max-autotune out, which takes minutes")
    parser.add_argument("--trials", type=int, default=measure.TRIALS)
    options = parser.parse_args()
    names = [n for n in COMPILED if not (options.quick and "autotune" in n)]
    report: dict[str, Any] = {"environment": measure.environment(), "rates": measure.rates(), "dtypes": {}}
    report["sizes"] = {"batch": BATCH, "inputs": INPUTS, "outputs": OUTPUTS}
    report["overheads"] = attempt(overheads)
    for name, dtype in DTYPES.items():
        report["dtypes"][name] = one_dtype(dtype, names, options.trials, report["rates"])
        _print(name, report["dtypes"][name])
        measure.write("headline", report)  # what is measured is kept, whatever happens to the rest
    report["card_after"] = measure.card()
    measure.write("headline", report)
    print("overheads, µs:", {k: round(v["us"], 2) for k, v in report["overheads"].items() if "us" in v})


def _shown(timing: dict[str, Any]) -> str:
    if "ms" not in timing:
        return "failed"
    return f"{timing['ms']:.3f} (device {timing.get('device_ms', 0):.3f}, host {timing.get('host_us', 0):.0f} us)"


def _print(name: str, report: dict[str, Any]) -> None:
    for mode, found in report["modes"].items():
        times = {n: _shown(t) for n, t in found["timings"].items()}
        print(f"{name} {mode}: {times} over eager {found.get('over_eager', 0):.3f}", flush=True)
    for candidate, found in report["errors"].items():
        worst = {n: max(v.values()) for n, v in found.items()} if "failed" not in found else found
        print(f"{name} {candidate}: error over eager {worst} kernels", end=" ")
        kernels = report["kernels"][candidate]
        print({k: len(v) for k, v in kernels.items()} if "failed" not in kernels else kernels, flush=True)
    print(f"{name}: {report['families']['fusewright']}", flush=True)


if __name__ == "__main__":
    main()
