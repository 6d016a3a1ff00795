"""Measures competing programs at the first call, on its own arguments, and remembers the winner on disk.

A candidate whose result differs from the first candidate's is rejected before it is timed. After the first call the
choice never changes, so neither do results. It is logged as text, which the setting `tuned` takes: what that names is
not measured then.
"""

from __future__ import annotations

import json
import logging
import math
import statistics
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from fusewright.errors import InvalidSetting
from fusewright.fusion.plan import Encode, Region, Step
from fusewright.ir.size import evaluate
from fusewright.kernels.base import Program
from fusewright.runtime import driver
from fusewright.runtime.cache import Cache, fingerprint
from fusewright.runtime.executable import Environment, Executable, Sizes
from fusewright.settings import tf32_allowed
from fusewright.tuned import Choice, parse, plain, size_range, text

log = logging.getLogger(__name__)

_KIND, _FILE = "tuning", "choice.json"  # of what is remembered

# Of the largest magnitude: far above rounding at any precision that may compete, far below a wrong result.
_TOLERANCE = 1e-2
# Share of a result that rounding may flip: of a mask near its threshold, to infinity near the largest number.
_FLIPPED = 1e-2
_SECONDS = 0.02  # spent on timing one candidate
# What is not our first guess must win by more than the timing's noise. A launch that begins early gains what is not
# timed here, and the library's calls cost the host more.
_NOISE = 1.03
_HEAD_START = 200_000  # clock cycles that the device idles before each trial, while the host queues its launches


class Tuned:
    """An executable whose contested regions are decided at the first call: by the user, else by measurement.

    choices: of the user. named: all programs of the regions that these name.
    """

    def __init__(
        self,
        executable: Executable,
        contested: Mapping[str, Sequence[Program]],
        choices: Sequence[Choice] = (),
        named: Mapping[str, Sequence[Program]] | None = None,
    ) -> None:
        self.executable = executable
        self.contested = dict(contested)
        self.choices = {choice.served: choice for choice in choices}
        self.named = dict(named or {})
        self.made: list[Choice] = []
        self._lock = threading.Lock()

    def __call__(self, *arguments: Any) -> list[Any]:
        """Raises InvalidSetting at the first call where the user's choice is no program of its region."""
        if self.named or self.contested:
            with self._lock:
                if self.named:
                    self._take(self.executable.sizes(arguments))
                if self.contested and not torch.cuda.is_current_stream_capturing():
                    return self._first_call(arguments)
        return self.executable(*arguments)

    def _take(self, sizes: Sizes) -> None:
        """Decides the regions that the user's choices name at these sizes."""
        for name, programs in self.named.items():
            wanted = self.choices.get(_choice(programs[0], sizes).served)
            if wanted is None:
                continue
            program = next((p for p in programs if title(p) == wanted.program), None)
            if program is None:
                known = ", ".join(dict.fromkeys(repr(title(p)) for p in programs))
                raise InvalidSetting(f"setting 'tuned' has {str(wanted)!r}; the programs there are {known}")
            self._use(name, program, sizes)
            self.contested.pop(name, None)
        self.named = {}
        self.executable.prepare.cache_clear()
        if not self.contested:
            self._tell()

    def _use(self, name: str, program: Program, sizes: Sizes) -> None:
        self.executable.use(name, program)
        self.made.append(_choice(program, sizes))

    def _tell(self) -> None:
        if self.made:
            log.info("tuned; the setting `tuned` takes this text and then measures nothing:\n%s", text(self.made))

    def _first_call(self, arguments: Sequence[Any]) -> list[Any]:
        """Runs the plan once, step by step, deciding each contested region when its operands exist."""
        executable = self.executable
        sizes = executable.sizes(arguments)
        environment = executable.environment(arguments)
        for step in executable.plan.steps:
            environment = self._decide(step, sizes, environment)
        self.contested = {}
        executable.prepare.cache_clear()
        self._tell()
        return executable.outputs(sizes, environment)

    def _decide(self, step: Step, sizes: Sizes, environment: Environment) -> Environment:
        executable = self.executable
        programs = self.contested.get(step.name, ())
        if programs:
            self._use(step.name, programs[self._winner(step, programs, sizes, environment)], sizes)
        for action in executable.actions(step, sizes):
            action(environment)
        return environment

    def _winner(self, step: Step, programs: Sequence[Program], sizes: Sizes, environment: Environment) -> int:
        def measure() -> dict[str, bytes]:
            seconds = self._measure(step, programs, sizes, environment)
            best = min(seconds, key=lambda i: seconds[i] * (_NOISE if i else 1.0))
            made = {"winner": best, "seconds": seconds, "choice": str(_choice(programs[best], sizes))}
            device = torch.cuda.get_device_name(self.executable.device)
            return {_FILE: json.dumps({**made, "device": device}).encode()}

        entry = Cache(_KIND).fetch(self._key(programs, sizes), measure)
        return int(json.loads(entry.files[_FILE])["winner"])

    def _key(self, programs: Sequence[Program], sizes: Sizes) -> str:
        return fingerprint(
            programs=[[p.family, *(launch.source for launch in p.launches)] for p in programs],
            extents=size_range(_extents(programs[0], sizes)),
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
        there = next(iter(environment.values()))  # which may not be the caller's current device
        with torch.cuda.device_of(there):  # type: ignore[no-untyped-call]
            return _times(timed, environment)


def executable_of(built: Executable | Tuned) -> Executable:
    return built.executable if isinstance(built, Tuned) else built


def remembered() -> dict[str, list[Choice]]:
    """The choices on disk, by the GPU that they were measured on; the latest for each range of sizes."""
    found: dict[str, dict[object, Choice]] = {}
    for entry in Cache(_KIND).entries():
        made = json.loads(entry.files.get(_FILE, b"{}"))
        for choice in parse(made.get("choice", "")):
            found.setdefault(made["device"], {})[choice.served] = choice
    return {device: sorted(choices.values(), key=str) for device, choices in sorted(found.items())}


def title(program: Program) -> str:
    """The program's family and variant, as a choice names it; of the library's, the operator that is called."""
    call = program.library
    variant = program.variant if call is None else "mm" if call.bias is None else "addmm"
    return plain(f"{program.family} {variant}".strip())


def _choice(program: Program, sizes: Sizes) -> Choice:
    region = program.region
    return Choice(" ".join((region.name, *_computed(region))), _extents(program, sizes), title(program))


def _computed(region: Region | Encode) -> Iterator[str]:
    """What the region computes with: its dtype, or the products of halves that make one; the layout of operands."""
    gemm = region.gemm if isinstance(region, Region) else None
    if gemm is None:
        return
    planes = gemm.encoded[0].halves.planes if gemm.encoded else 0
    plain = "tf32" if gemm.tf32 else str(gemm.a.dtype).removeprefix("torch.")
    yield {0: plain, 1: "f16x1", 2: "f16x3"}[planes]
    yield "".join("n" if matrix.stride[1] == 1 else "t" for matrix in (gemm.a, gemm.b))


def _extents(program: Program, sizes: Sizes) -> tuple[int, ...]:
    region = program.region
    assert isinstance(region, Region), "there is one way to encode"
    depth = (region.gemm.a.shape[1],) if region.gemm else ()
    return tuple(int(evaluate(s, sizes)) for s in (*region.rows, region.columns, *depth))


def _agrees(a: torch.Tensor, b: torch.Tensor) -> bool:
    """With few operators: to load each of torch's kernels for the first time takes longer than to run it."""
    if not a.numel():
        return True
    if a.dtype in (torch.bool, torch.uint8):
        return int(torch.count_nonzero(a != b)) <= _FLIPPED * a.numel()
    if not a.is_floating_point():
        a, b = a.double(), b.double()
    difference = _largest(a - b)
    if not math.isfinite(difference):
        finite = a.isfinite(), b.isfinite()
        if torch.count_nonzero(finite[0] != finite[1]) > _FLIPPED * a.numel():
            return False
        a, b = (torch.where(finite[0] & finite[1], x, 0) for x in (a, b))
        difference = _largest(a - b)
    return difference <= _TOLERANCE * _largest(b)


def _largest(x: torch.Tensor) -> float:
    """The largest magnitude; NaN where there is one."""
    return float(torch.linalg.vector_norm(x, math.inf))


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
