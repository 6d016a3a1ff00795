"""Measures competing programs at the first call, on its own arguments, and remembers the winner on disk.

A candidate whose result differs from the first candidate's is rejected before it is timed. After the first call the
choice never changes, so neither do results.
"""

from __future__ import annotations

import json
import logging
import statistics
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from fusewright.fusion.plan import Region, Step
from fusewright.ir.size import evaluate
from fusewright.kernels.base import Program
from fusewright.runtime import driver
from fusewright.runtime.cache import Cache, fingerprint
from fusewright.runtime.executable import Environment, Executable, Sizes
from fusewright.settings import tf32_allowed

log = logging.getLogger(__name__)

# Of the largest magnitude: far above rounding at any precision that may compete, far below a wrong result.
_TOLERANCE = 1e-2
# Share of a boolean result that rounding near its threshold may flip.
_FLIPPED = 1e-2
_SECONDS = 0.02  # spent on timing one candidate
# What is not our first guess must win by more than the timing's noise. A launch that begins early gains what is not
# timed here, and the library's calls cost the host more.
_NOISE = 1.03
_HEAD_START = 200_000  # clock cycles that the device idles before each trial, while the host queues its launches


class Tuned:
    """An executable whose contested regions are decided by measurement at the first call."""

    def __init__(self, executable: Executable, contested: Mapping[str, Sequence[Program]]) -> None:
        self.executable = executable
        self.contested = dict(contested)
        self._lock = threading.Lock()

    def __call__(self, *arguments: Any) -> list[Any]:
        if self.contested and not torch.cuda.is_current_stream_capturing():
            with self._lock:
                if self.contested:
                    return self._first_call(arguments)
        return self.executable(*arguments)

    def _first_call(self, arguments: Sequence[Any]) -> list[Any]:
        """Runs the plan once, step by step, deciding each contested region when its operands exist."""
        executable = self.executable
        sizes = executable.sizes(arguments)
        environment = executable.environment(arguments)
        for step in executable.plan.steps:
            environment = self._decide(step, sizes, environment)
        self.contested = {}
        executable.prepare.cache_clear()
        return executable.outputs(sizes, environment)

    def _decide(self, step: Step, sizes: Sizes, environment: Environment) -> Environment:
        executable = self.executable
        programs = self.contested.get(step.name, ())
        if programs:
            winner = self._winner(step, programs, sizes, environment)
            executable.use(step.name, programs[winner])
            log.info("%s: %s %s", step.name, programs[winner].family, programs[winner].variant)
        for action in executable.actions(step, sizes):
            action(environment)
        return environment

    def _winner(self, step: Step, programs: Sequence[Program], sizes: Sizes, environment: Environment) -> int:
        def measure() -> dict[str, bytes]:
            seconds = self._measure(step, programs, sizes, environment)
            best = min(seconds, key=lambda i: seconds[i] * (_NOISE if i else 1.0))
            return {"choice.json": json.dumps({"winner": best, "seconds": seconds}).encode()}

        entry = Cache("tuning").fetch(self._key(programs, sizes), measure)
        return int(json.loads(entry.files["choice.json"])["winner"])

    def _key(self, programs: Sequence[Program], sizes: Sizes) -> str:
        # Sizes within a factor of two share a choice.
        region = programs[0].region
        assert isinstance(region, Region), "there is one way to encode"
        extents = [int(evaluate(s, sizes)) for s in (*region.rows, region.columns, *_depth(region))]
        return fingerprint(
            programs=[[p.family, *(launch.source for launch in p.launches)] for p in programs],
            extents=[extent.bit_length() for extent in extents],
            device=torch.cuda.get_device_name(self.executable.device),
            driver=driver.version(),
            torch=torch.__version__,
            tf32=tf32_allowed(),
        )

    def _measure(
        self, step: Step, programs: Sequence[Program], sizes: Sizes, environment: Environment
    ) -> dict[int, float]:
        """Seconds of each program that gives the first one's result."""
        timed: dict[int, Sequence[Any]] = {}
        expected: Environment = {}
        for index, program in enumerate(programs):
            self.executable.load(program)
            actions = self.executable.actions(step, sizes, program)
            trial = dict(environment)
            for action in actions:
                action(trial)
            results = {name: trial[name] for name in step.writes()}
            if index == 0:
                expected = results
            elif not all(_agrees(results[name], expected[name]) for name in results):
                log.warning(
                    "%s: the result of %s %s is not used: it differs", step.name, program.family, program.variant
                )
                continue
            timed[index] = actions
        return _times(timed, environment)


def executable_of(built: Executable | Tuned) -> Executable:
    return built.executable if isinstance(built, Tuned) else built


def _depth(region: Region) -> tuple[Any, ...]:
    return (region.gemm.a.shape[1],) if region.gemm else ()


def _agrees(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.dtype == torch.uint8:
        return bool((a != b).float().mean() <= _FLIPPED) if a.numel() else True
    if not a.numel():
        return True
    a, b = a.double().nan_to_num(), b.double().nan_to_num()
    return bool((a - b).abs().max() <= _TOLERANCE * b.abs().max())


def _times(candidates: Mapping[int, Sequence[Any]], environment: Environment) -> dict[int, float]:
    """Median seconds of one run of each, on the current stream; they take turns, for the chip's clock drifts. Between
    calls of a model its weights leave the L2 cache, so it is filled with something else before each run."""
    other = _as_large_as_the_cache()

    def once(actions: Sequence[Any]) -> float:
        trial = dict(environment)
        torch.cuda._sleep(_HEAD_START)  # type: ignore[no-untyped-call]
        other.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        for action in actions:
            action(trial)
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3

    first = max(once(actions) for actions in candidates.values())
    repeats = int(min(20, max(3, _SECONDS / max(first, 1e-6))))
    rounds = [{index: once(actions) for index, actions in candidates.items()} for _ in range(repeats)]
    return {index: statistics.median(times[index] for times in rounds) for index in candidates}


def _as_large_as_the_cache() -> torch.Tensor:
    """Twice as large, so that writing it leaves nothing else there; nothing where memory is too short for that."""
    size = 2 * torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    try:
        return torch.empty(size, dtype=torch.uint8, device="cuda")
    except torch.OutOfMemoryError:
        return torch.empty(0, dtype=torch.uint8, device="cuda")
