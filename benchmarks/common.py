"""What the programs that compare many models share: a time budget, models with inputs, and processes.

Most of the time of such a program would go into compilation, one model after the other. So worker processes compile
first, all at once; then each measures its models when it is told to, with the machine to itself.
"""

from __future__ import annotations

import copy
import ctypes
import inspect
import math
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

import measure
from fusewright.runtime.autotune import Tuned
from fusewright.runtime.executable import Executable
from fusewright.tools.comparison import GRADIENT, Judge
from measure import Candidate

if TYPE_CHECKING:
    from typing_extensions import Self

MODES = ("forward", "forward+backward")
# What takes part where launches matter, on both sides.
GRAPHS: dict[str, dict[str, Any]] = {
    "inductor reduce-overhead": {"backend": "inductor", "mode": "reduce-overhead"},
    "fusewright, CUDA graphs": {"backend": "fusewright", "options": {"cuda_graphs": True}},
}
WORKERS = 14  # each holds a CUDA context and torch's libraries
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
LATE = 15.0  # seconds past a budget's end that what has begun may take


class Budget:
    """The seconds that a program may take; what was measured when they end is kept."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        return self._end - time.monotonic()

    @property
    def spent(self) -> bool:
        return self.left <= 0


def geometric_mean(values: Iterable[float]) -> float:
    logs = [math.log(v) for v in values]
    return math.exp(sum(logs) / len(logs)) if logs else math.nan


def attempt(run: Callable[[], Any]) -> Any:
    """What `run` returns, or {"failed": why}: one candidate's failure does not end a program."""
    try:
        return run()
    except Exception as error:
        return {"failed": f"{type(error).__name__}: {error}"[:2000]}


def times_faster(timed: Mapping[str, Mapping[str, Any]], ours: Iterable[str]) -> dict[str, float]:
    """For each of ours: the best baseline's time over its own. Where ours uses CUDA graphs, so may a baseline."""
    ms = {name: t["ms"] for name, t in timed.items() if "ms" in t}
    baselines = {name: v for name, v in ms.items() if name not in ours}
    plain = [v for name, v in baselines.items() if name not in GRAPHS]
    return {n: min(baselines.values() if n in GRAPHS else plain) / ms[n] for n in ours if n in ms and plain}


@dataclass
class Subject:
    """One candidate: a model of its own with inputs of its own. call: the model or its compilation."""

    model: nn.Module
    inputs: list[Tensor]
    compiled: Mapping[str, Any] | None = None  # arguments of torch.compile; None is eager
    call: Callable[..., Tensor] = field(init=False)
    gradient: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.model = measure.separate(copy.deepcopy(self.model))
        self.call = self.model if self.compiled is None else torch.compile(self.model, dynamic=False, **self.compiled)
        self.y: Tensor | None = None

    def training(self, gradient: Tensor | None = None) -> Self:
        """Prepares for gradients of every input and parameter. gradient: of the output; where none is given, one is
        drawn, the same for every candidate."""
        self.inputs = [x.detach().clone().requires_grad_() for x in self.inputs]
        if gradient is None:
            with torch.no_grad():
                shape = self.model(*self.inputs)
            generator = torch.Generator(shape.device).manual_seed(1)
            gradient = torch.randn(shape.shape, generator=generator, device=shape.device).to(shape.dtype)
        self.gradient = gradient
        return self

    def exact(self) -> Subject:
        """The same model, inputs and gradient in float64."""
        inputs = [x.detach().double() for x in self.inputs]
        return Subject(copy.deepcopy(self.model).double(), inputs).training(self.gradient.double())

    def reset(self) -> None:
        self.y = None
        for tensor in (*self.inputs, *self.model.parameters()):
            tensor.grad = None

    def forward(self) -> Tensor:
        with torch.no_grad():
            return self.call(*self.inputs)

    def both(self) -> None:
        self.y = self.call(*self.inputs)
        self.y.backward(self.gradient)

    def run(self, mode: str) -> Callable[[], Any]:
        return self.forward if mode == "forward" else self.both

    def candidate(self, mode: str) -> Candidate:
        return Candidate(self.run(mode), self.reset)

    def results(self) -> dict[str, Tensor]:
        """The output, and the gradients of one backward, by name."""
        self.reset()
        self.both()
        assert self.y is not None
        named = inspect.signature(self.model.forward).bind(*self.inputs).arguments
        inputs = {GRADIENT + name: x.grad for name, x in named.items()}
        grads = {GRADIENT + name: p.grad for name, p in self.model.named_parameters()}
        found = {"output": self.y.detach(), **inputs, **grads}
        return {name: t.detach().clone() for name, t in found.items() if t is not None}


def errors(subjects: Mapping[str, Subject], eager: Subject) -> dict[str, dict[str, Any]]:
    """By candidate: the worst ratio of its errors against float64 to eager's by metric, and what is wrong, in words."""
    oracle, theirs = eager.exact().results(), eager.results()
    found = {}
    for name, subject in subjects.items():
        judge = Judge()
        judge.add(subject.results(), theirs, oracle)
        verdict = judge.verdict()
        found[name] = {"ratios": verdict.figures, "problems": list(verdict.problems)}
    return found


def launched(run: Callable[[], Any]) -> list[str]:
    """The names of the kernels that the device ran, in order."""
    noise = ("Memcpy", "Memset", "Context", "Torch-Compiled", "##")
    return [e.name for e in measure.profiled(run) if not e.name.startswith(noise)]


class Compiled(Exception):
    """Raised in the place of a call: its kernels are compiled."""


@contextmanager
def compiling_only(wait: bool = True) -> Iterator[None]:
    """Inside, what fusewright builds is compiled but never run (nor timed by the tuner): a call ends the block.

    wait: until the kernels are compiled, which happens in the background.
    """
    with measure.recorded() as built, suppress(Compiled):

        def call(*_: Any) -> Any:
            for one in built if wait else ():
                _ = measure.executable_of(one).loaded
            raise Compiled

        with patch.object(Executable, "__call__", call), patch.object(Tuned, "__call__", call):
            yield


# Compiles one task and returns what will measure it.
Prepare = Callable[[Any], Callable[[], Any]]


def measured_in_turn(prepare: Prepare, tasks: Sequence[Any], budget: Budget, share: float) -> Iterator[tuple[Any, Any]]:
    """Prepares all tasks at once in worker processes, then measures one after the other; yields each with its result.

    Preparation ends after `share` of the budget; what is not prepared by then is left out, and so is what comes after
    the budget's end. While one worker measures the others are stopped. A task that fails gives {"failed": why}.
    prepare: a function of a module; tasks and results travel between processes.
    """
    count = max(1, min(len(tasks), WORKERS, (os.cpu_count() or 2) - 2))
    shares, end = [list(tasks[i::count]) for i in range(count)], time.monotonic() + share * budget.left
    context, workers = multiprocessing.get_context("spawn"), []
    for own in shares:
        here, there = context.Pipe()
        process = context.Process(target=_work, args=(there, prepare, own, end), daemon=True)
        process.start()
        there.close()
        workers.append((process, here))
    try:
        prepared = [_answer(here, end) for _, here in workers]
        for (process, _), answer in zip(workers, prepared, strict=True):
            _signal(process, signal.SIGSTOP if isinstance(answer, int) else signal.SIGKILL)
        done = sum(p for p in prepared if isinstance(p, int))
        print(f"prepared {done} of {len(tasks)} in {count} processes; {budget.left:.0f} s are left", flush=True)
        for i, task in enumerate(tasks):
            answer, (process, connection), place = prepared[i % count], workers[i % count], i // count
            if not isinstance(answer, int):
                yield task, answer
            elif budget.spent:
                print(f"time is up: {len(tasks) - i} of {len(tasks)} are left out", flush=True)
                return
            elif place < answer:
                _signal(process, signal.SIGCONT)
                with suppress(OSError):
                    connection.send(place)
                found = _answer(connection, time.monotonic() + budget.left)
                _signal(process, signal.SIGSTOP)
                yield task, found
    finally:
        for process, connection in workers:
            _signal(process, signal.SIGCONT)
            with suppress(OSError):
                connection.send(None)
        for process, _ in workers:
            process.join(1.0 if budget.spent else 5.0)
            process.kill()


def _signal(process: BaseProcess, number: int) -> None:
    if process.pid is not None:
        with suppress(ProcessLookupError):
            os.kill(process.pid, number)


def _answer(connection: Connection, end: float) -> Any:
    try:
        if connection.poll(max(0.0, end - time.monotonic()) + LATE):
            return connection.recv()
    except (EOFError, OSError):
        return {"failed": "its process ended"}
    return {"failed": "it took too long"}


def _work(connection: Connection, prepare: Prepare, tasks: Sequence[Any], end: float) -> None:
    """Prepares until `end`, says how many are prepared, then measures those that it is asked for."""
    import torch._inductor.config

    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # stopped, it would outlive a parent that is killed
    torch._inductor.config.compile_threads = 1  # parallel are the processes
    torch.set_num_threads(1)
    ready: list[Any] = []
    for task in tasks:
        if time.monotonic() > end:
            break
        ready.append(attempt(partial(prepare, task)))
    connection.send(len(ready))
    for place in iter(connection.recv, None):
        run, ready[place] = ready[place], None
        connection.send(attempt(run) if callable(run) else run)
        del run
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
