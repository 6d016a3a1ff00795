"""`fusewright bench REFERENCE [CANDIDATE]`: how fast a candidate is beside eager and torch.compile, and the floor.

All take turns in one process, at the same precision, with a cold L2 cache. What a candidate gives is compared with
float64 first: one that is less accurate than eager is not at the same precision, and no ratio is given for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from fusewright.capture import model_file
from fusewright.capture.model_file import SEED, ModelFile, load_candidate
from fusewright.chip import Chip, arch_of, chip_for
from fusewright.errors import EagerFailure, ToolMissing, UnknownArch, UnknownSetting, raised
from fusewright.tools import timing
from fusewright.tools.comparison import Judge
from fusewright.tools.first_call import FirstCall, Job, first_call
from fusewright.tools.flags import torch_flags
from fusewright.tools.floor import Work, backward_work, floor_seconds, forward_work
from fusewright.tools.runner import MODES, Runner
from fusewright.tools.trial import in_double
from fusewright.tools.variations import copies_of, map_floating

EAGER = "eager"
OURS = "fusewright"
# A copy reads and writes; a kernel that only reads may be a little faster than that rate says.
IMPOSSIBLE = 0.9


@dataclass(frozen=True)
class Request:
    """What the user asked for.

    candidate: None is fusewright in process. modes: none is all. tf32: products of float32 may use it, everywhere.
    quick: without max-autotune. cuda_graphs: torch.compile and fusewright replay them.
    """

    reference: Path
    candidate: Path | None = None
    dtype: torch.dtype | None = None
    settings: Mapping[str, object] | None = None
    tf32: bool = False
    modes: tuple[str, ...] = ()
    quick: bool = False
    trials: int = timing.TRIALS
    first_call: bool = False
    cuda_graphs: bool = False


@dataclass(frozen=True)
class Timed:
    """One candidate in one mode. ms: the median; low, high: the 10th and 90th percentile. of_floor: the floor over the
    median. failed: why there is no time."""

    ms: float | None = None
    low: float | None = None
    high: float | None = None
    trials: int = 0
    of_floor: float | None = None
    failed: str | None = None


@dataclass(frozen=True)
class Mode:
    """One mode. bytes, flop, elements: of `Work`. best_baseline: the fastest of what is not the candidate.

    speedup: its time over the candidate's; None where the candidate failed, or is less accurate than eager.
    """

    floor_ms: float
    bytes: int
    flop: int
    elements: int
    timings: dict[str, Timed]
    best_baseline: str | None
    speedup: float | None


@dataclass(frozen=True)
class Accuracy:
    """ratio: the worst error against float64, over eager's. problems: where it is larger than luck allows."""

    ratio: float | None
    problems: list[str]


@dataclass(frozen=True)
class Bench:
    """Everything measured. candidate: its name in `timings`. rates: bytes/s of a copy, FLOP/s of an fp16 product."""

    reference: str
    candidate: str
    inputs: str
    dtype: str
    tf32: bool
    cuda_graphs: bool
    environment: dict[str, Any]
    rates: dict[str, float]
    modes: dict[str, Mode]
    accuracy: dict[str, Accuracy]
    first_call: dict[str, FirstCall]
    not_measured: list[str]


def bench(request: Request, console: Console) -> Bench:
    """Measures. Raises ToolMissing without a GPU, and EagerFailure where the reference itself does not run."""
    require_gpu()
    if unknown := [mode for mode in request.modes if mode not in MODES]:
        raise UnknownSetting(f"unknown mode {unknown[0]!r}; choose one of {', '.join(MODES)}")
    with console.status("loading the model") as status, float32_products(request.tf32):
        return _Session(request, status.update).measure()


def require_gpu() -> None:
    if not torch.cuda.is_available():
        raise ToolMissing(
            "bench measures on an NVIDIA GPU, and torch finds none here; `fusewright doctor` says what is missing. "
            "Without one, `fusewright explain` predicts, and `fusewright optimize` checks"
        )


@contextmanager
def float32_products(tf32: bool) -> Iterator[None]:
    """The precision of float32 products in torch, for everybody, whatever a model file has switched."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(_precision(tf32))
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _precision(tf32: bool) -> str:
    return "high" if tf32 else "highest"


def baselines(quick: bool, cuda_graphs: bool) -> dict[str, Mapping[str, Any] | None]:
    """Name → arguments of torch.compile; None is eager."""
    if cuda_graphs:
        compiled = {"torch.compile": {}, "torch.compile reduce-overhead": {"mode": "reduce-overhead"}}
        tuned = {"torch.compile max-autotune": {"mode": "max-autotune"}}
    else:
        compiled = {"torch.compile": {}}
        tuned = {"torch.compile max-autotune": {"mode": "max-autotune-no-cudagraphs"}}
    return {EAGER: None, **compiled, **({} if quick else tuned)}


def ours(cuda_graphs: bool) -> Mapping[str, Any]:
    """Arguments of torch.compile."""
    return {"backend": "fusewright", **({"options": {"cuda_graphs": True}} if cuda_graphs else {})}


class _Session:
    """One measurement. say: shows what goes on."""

    def __init__(self, request: Request, say: Callable[[str], None]) -> None:
        self.request, self.say = request, say
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.skipped: list[str] = []
        self.failed: dict[str, str] = {}
        self.file = model_file.load(request.reference, request.settings)
        self.other = None if request.candidate is None else load_candidate(request.candidate, request.settings)
        self.name = OURS if request.candidate is None else str(request.candidate)
        self.compiled = baselines(request.quick, request.cuda_graphs)
        if request.candidate is None:
            self.compiled[OURS] = ours(request.cuda_graphs)
        torch.set_float32_matmul_precision(_precision(request.tf32))  # the files may have switched it

    def measure(self) -> Bench:
        instance = self.file.instantiate(dtype=self.request.dtype)
        self.file.run(instance, self.request.dtype)  # raises EagerFailure
        eager = Runner(instance.model, instance.inputs)
        modes = self._modes(eager)
        firsts = self._first_calls(backward="both" in modes or "backward" in modes)
        self.say("measuring what the card can do")
        rates = timing.rates()
        self.say("counting the least that has to be done")
        work = self._work(eager, modes)
        runners = self._runners(eager, instance.inputs)
        self._start(runners, modes)
        self.say("comparing with float64")
        accuracy = self._accuracy(runners)
        measured = {mode: self._time(mode, runners, work[mode], rates, accuracy) for mode in modes}
        return Bench(
            reference=str(self.request.reference),
            candidate=self.name,
            inputs=_describe(instance.inputs),
            dtype=str(self.request.dtype or "the file's own").removeprefix("torch."),
            tf32=self.request.tf32,
            cuda_graphs=self.request.cuda_graphs,
            environment=timing.environment(),
            rates=rates,
            modes=measured,
            accuracy=accuracy,
            first_call=firsts,
            not_measured=self.skipped,
        )

    def _modes(self, eager: Runner) -> list[str]:
        """The modes that were asked for, less those that eager has not."""
        wanted = [mode for mode in MODES if mode in (self.request.modes or MODES)]
        if wanted == ["forward"]:
            return wanted
        try:
            reason = "" if eager.draw_gradients() else "no output requires a gradient"
            if not reason:
                eager.both()
        except BaseException as error:
            reason = f"eager raises {raised(error)}"
        eager.reset()
        if not reason:
            return wanted
        if "forward" not in wanted:
            raise EagerFailure(f"{self.request.reference} has no backward to measure: {reason}")
        self.skipped.append(f"backward: {reason}")
        eager.gradients = []
        return ["forward"]

    def _first_calls(self, backward: bool) -> dict[str, FirstCall]:
        if not self.request.first_call:
            return {}
        r = self.request
        reference = str(r.reference.resolve())
        dtype = None if r.dtype is None else str(r.dtype).removeprefix("torch.")
        shared = (reference, dict(r.settings or {}), dtype, r.tf32)
        jobs = {name: Job(reference, False, *shared, c, backward) for name, c in self.compiled.items()}
        if r.candidate is not None:
            jobs[self.name] = Job(str(r.candidate.resolve()), True, *shared, None, backward)
        found = {}
        for name, job in jobs.items():
            self.say(f"first call of {name}: cold and warm, each in a new process")
            found[name] = first_call(job)
        return found

    def _work(self, eager: Runner, modes: list[str]) -> dict[str, Work]:
        found = {"forward": forward_work(eager.forward, eager.leaves)}
        if len(modes) > 1 or modes != ["forward"]:
            eager.reset()
            eager.half()
            found["backward"] = backward_work(eager.backward, eager.leaves, eager.gradients)
            found["both"] = found["forward"] + found["backward"]
        eager.reset()
        return found

    def _runners(self, eager: Runner, inputs: list[Any]) -> dict[str, Runner]:
        """Every candidate by name, with the reference's inputs."""
        runners = {EAGER: eager}
        for name, compiled in self.compiled.items():
            if name != EAGER:
                replays = self.request.cuda_graphs and name != "torch.compile"
                runners[name] = Runner(self._build(self.file), inputs, compiled, replays, eager.gradients)
        if self.other is not None:
            self.say(f"building {self.name}")
            runners[self.name] = Runner(self._build(self.other), inputs, gradients=eager.gradients)
        return runners

    def _build(self, file: ModelFile) -> torch.nn.Module:
        return file.build(SEED).to(device=self.device, dtype=self.request.dtype)

    def _start(self, runners: Mapping[str, Runner], modes: list[str]) -> None:
        """Compiles everything. A candidate that raises, or switches torch's flags, is out."""
        for name, runner in runners.items():
            self.say(f"compiling {name}" + (", which takes minutes" if "autotune" in name else ""))
            before = _flags()
            try:
                for mode in modes:
                    candidate = runner.candidate(mode)
                    candidate.prepare()
                    candidate.run()
                runner.reset()
            except BaseException as error:
                self.failed[name] = raised(error)[:2000]
            after = _flags()
            if changed := [f"{n} from {before[n]} to {after[n]}" for n in before if after[n] != before[n]]:
                torch.set_float32_matmul_precision(_precision(self.request.tf32))
                self.failed[name] = f"switches {', '.join(changed)}, for all others too"
        if EAGER in self.failed:
            raise EagerFailure(f"{self.request.reference} cannot be measured: {self.failed[EAGER]}")

    def _accuracy(self, runners: Mapping[str, Runner]) -> dict[str, Accuracy]:
        eager = runners[EAGER]
        theirs = self._seeded(eager, 0)
        again = self._seeded(eager, 1)
        if any(_differ(t, again[name]) for name, t in theirs.items()):
            self.skipped.append("accuracy: eager gives other results with another random seed")
            return {}
        oracle = self._oracle(eager)
        found = {}
        for name, runner in runners.items():
            if name == EAGER or name in self.failed:
                continue
            judge = Judge()
            judge.add(self._seeded(runner, 0), theirs, oracle)
            verdict = judge.verdict()
            found[name] = Accuracy(max(verdict.figures.values(), default=None), list(verdict.problems))
        return found

    def _seeded(self, runner: Runner, seed: int) -> dict[str, Any]:
        torch.manual_seed(seed)
        return runner.results()

    def _oracle(self, eager: Runner) -> dict[str, Any]:
        """The same in float64; empty where the model cannot do that, and then eager's result serves instead."""
        try:
            model = self.file.build(SEED).to(self.device).double()
            model.load_state_dict(eager.model.state_dict())
            inputs = map_floating(copies_of(eager.inputs), lambda t: t.detach().double())
            exact = Runner(model, inputs, gradients=[g.double() for g in eager.gradients])
            with in_double():
                return self._seeded(exact, 0)
        except BaseException as error:
            self.skipped.append(f"float64 oracle: {raised(error).partition(chr(10))[0][:200]}")
            return {}

    def _time(
        self,
        mode: str,
        runners: Mapping[str, Runner],
        work: Work,
        rates: Mapping[str, float],
        accuracy: Mapping[str, Accuracy],
    ) -> Mode:
        candidates = {name: r.candidate(mode) for name, r in runners.items() if name not in self.failed}
        progress: timing.Progress = lambda done, total: self.say(f"{mode}: trial {done + 1} of {total}")  # noqa: E731
        self.say(f"{mode}: warming up")
        measured = timing.interleaved(candidates, self.request.trials, progress)
        floor = 1e3 * floor_seconds(work, self._chip(), rates, self.request.tf32)
        timings = {name: Timed(failed=why) for name, why in self.failed.items()}
        for name, found in measured.items():
            timings[name] = Timed(**found, of_floor=floor / found["ms"]) if "ms" in found else Timed(**found)
        timings = {name: timings[name] for name in runners}
        for runner in runners.values():
            runner.reset()
        best, speedup = self._summary(timings, accuracy)
        return Mode(floor, work.bytes, sum(work.flop.values()), work.elements, timings, best, speedup)

    def _summary(
        self, timings: Mapping[str, Timed], accuracy: Mapping[str, Accuracy]
    ) -> tuple[str | None, float | None]:
        ms = {name: t.ms for name, t in timings.items() if t.ms is not None}
        others = [name for name in ms if name != self.name]
        best = min(others, key=lambda name: ms[name], default=None)
        unequal = self.name in accuracy and bool(accuracy[self.name].problems)
        if best is None or self.name not in ms or unequal:
            return best, None
        return best, ms[best] / ms[self.name]

    def _chip(self) -> Chip | None:
        try:
            return chip_for(arch_of(torch.cuda.get_device_capability()))
        except (UnknownArch, RuntimeError, AssertionError):
            return None


def _flags() -> dict[str, str]:
    """Those of torch's settings that decide precision, and so speed."""
    words = ("torch.backends", "matmul", "autocast", "default_dtype", "deterministic")
    return {name: value for name, value in torch_flags().items() if any(word in name for word in words)}


def _differ(a: Any, b: Any) -> bool:
    """Whether two results of eager differ by more than the order of a sum can make them."""
    if a is None or b is None or a.shape != b.shape:
        return a is not b
    a, b = (torch.view_as_real(t) if t.is_complex() else t for t in (a, b))
    a, b = a.double().nan_to_num(), b.double().nan_to_num()
    return bool((a - b).norm() > 1e-2 * b.norm())


def _describe(inputs: list[Any]) -> str:
    tensors = [x for x in torch.utils._pytree.tree_leaves(inputs) if isinstance(x, torch.Tensor)]
    return ", ".join(f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)}" for x in tensors)
