"""What `bench --json` and `verify --json` wrote, for the report to show."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fusewright.errors import BadMeasurement
from fusewright.tools.units import times


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one way to run one mode (forward, backward, both): the median and its spread.

    ours: fusewright ran it."""

    mode: str
    runner: str
    milliseconds: float
    low: float | None
    high: float | None
    ours: bool


@dataclass(frozen=True)
class Checked:
    """One check of correctness."""

    name: str
    passed: bool
    detail: str


@dataclass(frozen=True)
class Measured:
    """One file of measurements. about: what was measured, and on what; results: what came out; in words.

    not_checked: what could not be measured or checked, and why.
    """

    name: str
    about: str
    timings: tuple[Timing, ...] = ()
    checks: tuple[Checked, ...] = ()
    not_checked: tuple[str, ...] = ()
    results: tuple[str, ...] = ()


def read_measured(path: Path) -> Measured:
    """Reads a file that `fusewright bench --json` or `fusewright verify --json` wrote. Raises BadMeasurement."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadMeasurement(f"{path} cannot be read ({error.strerror}); check the path") from None
    except (ValueError, RecursionError):
        raise BadMeasurement(f"{path} is not JSON; {_WANTED}") from None
    try:
        if data.get("simulated"):
            return _simulated(path, data)
        if "checks" in data:
            return _verified(path, data)
        return _timed(path, data)
    except (AttributeError, KeyError, TypeError, ValueError):
        raise BadMeasurement(f"{path} holds neither timings nor checks; {_WANTED}") from None


_WANTED = "give what `fusewright bench --json` or `fusewright verify --json` wrote"


def _verified(path: Path, data: Mapping[str, Any]) -> Measured:
    checks = tuple(Checked(str(c["name"]), bool(c["passed"]), str(c["detail"])) for c in data["checks"])
    about = f"{data['candidate']} against {data['reference']} on {data['device']}, dtype {data['dtype']}"
    return Measured(path.name, about, checks=checks, not_checked=tuple(str(n) for n in data["not_checked"]))


def _simulated(path: Path, data: Mapping[str, Any]) -> Measured:
    """`verify` without a GPU: the plan in float64, and the kernels in the simulator."""
    meaning = {
        "plan": "relative difference to the model in float64 at most {worst:.1e}",
        "kernels": "error against float64 at most {worst:.2f}× the larger of eager's and the rounding of plain sums",
    }
    names = {"plan": "plan, by reference in float64", "kernels": "kernels, simulated on the CPU"}
    checks = tuple(
        Checked(names[k], bool(data[k]["passed"]), meaning[k].format(worst=float(data[k]["worst"])))
        for k in meaning
        if data[k] is not None
    )
    return Measured(path.name, f"without a GPU, at {data['sizes']}", checks=checks)


def _timed(path: Path, data: Mapping[str, Any]) -> Measured:
    timings = tuple(_timings(data["modes"], str(data["candidate"])))
    if not timings:
        raise ValueError("no timings")
    environment = data["environment"]
    about = f"{data['reference']}, {data['inputs']}, dtype {data['dtype']}, on {environment['device']}"
    results = tuple(_speedups(data["modes"]))
    checks = tuple(_accuracies(data["accuracy"]))
    return Measured(path.name, about, timings, checks, tuple(map(str, data["not_measured"])), results)


def _timings(modes: Mapping[str, Any], candidate: str) -> Iterator[Timing]:
    for mode, found in modes.items():
        for runner, timing in found["timings"].items():
            if (milliseconds := _number(timing["ms"])) is not None:
                low, high = _number(timing["low"]), _number(timing["high"])
                yield Timing(str(mode), str(runner), milliseconds, low, high, runner == candidate)


def _speedups(modes: Mapping[str, Any]) -> Iterator[str]:
    for mode, found in modes.items():
        if (speedup := _number(found["speedup"])) is not None:
            yield f"{mode}: {speedup:.2f}× as fast as {found['best_baseline']}, the best baseline"


def _accuracies(accuracy: Mapping[str, Any]) -> Iterator[Checked]:
    """The error of each candidate against float64."""
    for name, found in accuracy.items():
        ratio = _number(found["ratio"])
        detail = [] if ratio is None else [f"worst {times(ratio)} eager's error"]
        yield Checked(f"{name}, against float64", not found["problems"], "; ".join([*detail, *found["problems"]]))


def _number(value: Any) -> float | None:
    return float(value) if value is not None and math.isfinite(value) else None
