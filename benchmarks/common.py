"""What the programs that compare many models share: a time budget, models with inputs, and caches filled beforehand.

Most of the time of such a program would go into compilation, one model after the other. So worker processes compile
first, all at once, into the caches on disk (Inductor's, Triton's, fusewright's); the program itself then compiles from
warm caches, one model at a time, and measures with the device to itself.
"""

from __future__ import annotations

import copy
import math
import multiprocessing
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

import measure
from fusewright.runtime.autotune import Tuned
from fusewright.runtime.executable import Executable
from fusewright.tools.comparison import GRADIENT, Judge
from measure import Candidate

MODES = ("forward", "forward+backward")
WORKERS = 14  # each holds a CUDA context and torch's libraries


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

    def training(self) -> Subject:
        """Prepares for gradients of every input and parameter, with the same output gradient for every candidate."""
        self.inputs = [x.detach().clone().requires_grad_() for x in self.inputs]
        with torch.no_grad():
            shape = self.model(*self.inputs)
        generator = torch.Generator(shape.device).manual_seed(1)
        self.gradient = torch.randn(shape.shape, generator=generator, device=shape.device).to(shape.dtype)
        return self

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
        inputs = {f"{GRADIENT}input {i}": x.grad for i, x in enumerate(self.inputs)}
        grads = {GRADIENT + name: p.grad for name, p in self.model.named_parameters()}
        found = {"output": self.y.detach(), **inputs, **grads}
        return {name: t.detach().clone() for name, t in found.items() if t is not None}


def errors(subjects: Mapping[str, Subject], eager: Subject) -> dict[str, dict[str, Any]]:
    """By candidate: the worst ratio of its errors against float64 to eager's by metric, and what is wrong, in words."""
    exact = Subject(copy.deepcopy(eager.model).double(), [x.detach().double() for x in eager.inputs]).training()
    oracle, theirs = exact.results(), eager.results()
    del exact
    found = {}
    for name, subject in subjects.items():
        judge = Judge()
        judge.add(subject.results(), theirs, oracle)
        verdict = judge.verdict()
        found[name] = {"ratios": verdict.figures, "problems": list(verdict.problems)}
    return found


def kernels(run: Callable[[], Any]) -> int:
    """How many kernels the device ran."""
    activities = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=activities) as profile:
        run()
        torch.cuda.synchronize()
    noise = ("Memcpy", "Memset", "Context", "Torch-Compiled", "##")
    on_device = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    return sum(not e.is_user_annotation and not e.name.startswith(noise) for e in on_device)


class Compiled(Exception):
    """Raised in the place of a call: its kernels are compiled."""


@contextmanager
def compiling_only() -> Iterator[None]:
    """Inside, what fusewright builds is compiled but never run (nor timed by the tuner): a call raises Compiled."""
    with measure.recorded() as built, suppress(Compiled):

        def call(*_: Any) -> Any:
            for one in built:
                _ = measure.executable_of(one).loaded
            raise Compiled

        with patch.object(Executable, "__call__", call), patch.object(Tuned, "__call__", call):
            yield


def fill_caches(prepare: Callable[[Any], None], tasks: Sequence[Any], seconds: float) -> int:
    """Runs `prepare` (a function of a module) for each task in worker processes; returns how many ended in time.

    It returns after `seconds` at the latest, with all workers gone: who measures has the device to itself. A task that
    fails counts as done, for the program will meet the failure itself.
    """
    start, done = time.monotonic(), 0
    count = max(1, min(len(tasks), WORKERS, (os.cpu_count() or 2) - 2))
    with multiprocessing.get_context("spawn").Pool(count, _single) as pool:
        finished = pool.imap_unordered(_Quiet(prepare), tasks)
        with suppress(multiprocessing.TimeoutError):
            for _ in tasks:
                finished.next(timeout=max(0.0, start + seconds - time.monotonic()))
                done += 1
    print(f"filled caches: {done} of {len(tasks)} in {time.monotonic() - start:.0f} s by {count} processes", flush=True)
    return done


@dataclass(frozen=True)
class _Quiet:
    prepare: Callable[[Any], None]

    def __call__(self, task: Any) -> None:
        with suppress(Exception):
            self.prepare(task)
        torch._dynamo.reset()


def _single() -> None:
    """One process compiles one model at a time; parallel are the processes."""
    import torch._inductor.config

    torch._inductor.config.compile_threads = 1
    torch.set_num_threads(1)
