"""What the benchmark programs share: timing on the GPU (fusewright's own, see its docstring), and result files."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fusewright.tools.timing import (
    TRIALS,
    WARM_UPS,
    Candidate,
    Timing,
    card,
    environment,
    host_and_device,
    host_microseconds,
    interleaved,
    rates,
    separate,
)

__all__ = [
    "TRIALS",
    "WARM_UPS",
    "Candidate",
    "Timing",
    "card",
    "environment",
    "host_and_device",
    "host_microseconds",
    "interleaved",
    "rates",
    "separate",
]

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"
# Else the profiler leaves CUPTI attached, and every later launch of the process takes the host twice as long.
os.environ["TEARDOWN_CUPTI"] = "1"
_PROFILED = (torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU)


def write(name: str, result: Mapping[str, Any]) -> Path:
    """Writes results/<name>.json whole: under another name first, then renamed."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(result, indent=1, sort_keys=True) + "\n")
    partial.replace(path)
    return path


def read_same(name: str, environment: Mapping[str, Any]) -> dict[str, Any]:
    """What results/<name>.json has. Raises ValueError where other code or another machine gave it."""
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    then = found["environment"]
    other = [key for key in environment if key not in ("when", "card") and environment[key] != then.get(key)]
    if other:
        raise ValueError(f"{name}.json is of another {', '.join(other)}: measure everything anew")
    return found


def profiled(run: Callable[[], Any]) -> list[Any]:
    """The profiler's events of what one call does on the device, in order: kernels, copies, fills."""
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=_PROFILED) as profile:
        run()
        torch.cuda.synchronize()
    on_device = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    return [e for e in on_device if not e.is_user_annotation]


@contextmanager
def recorded() -> Iterator[list[Any]]:
    """Collects what the compiler builds: an Executable or a Tuned for each graph."""
    from fusewright import compiler

    original, built = compiler.build, []

    def build(*args: Any, **kwargs: Any) -> Any:
        built.append(original(*args, **kwargs))
        return built[-1]

    compiler.build = build
    try:
        yield built
    finally:
        compiler.build = original


def executable_of(built: Any) -> Any:
    return getattr(built, "executable", built)


def families(built: list[Any]) -> list[dict[str, str]]:
    """For each graph: region → the kernel family that runs it."""
    return [{name: p.family for name, p in executable_of(b).programs.items()} for b in built]


class Headline(nn.Module):
    """The example architecture: y = leaky_relu(multiplier · (x·Wᵀ + b))."""

    def __init__(self, inputs: int = 8192, outputs: int = 8192, multiplier: float = 2.0, slope: float = 0.1) -> None:
        super().__init__()
        self.gemm = nn.Linear(inputs, outputs)
        self.multiplier = multiplier
        self.activation = nn.LeakyReLU(slope)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.activation(self.gemm(x) * self.multiplier)
