"""The first call in a new process, beside Inductor's, with empty and with warm caches. Writes results/first_call.json.

    python benchmarks/first_call.py [--rounds 3]

One forward and backward of the example architecture, timed from before the compiler is imported until the device has
finished. The model is on the device and has run in eager, so that neither CUDA's nor cuBLAS's start is counted; a
process before the first has used both compilers, so that their own files are not read from disk for the first time.
`fusewright bench --first-call` starts before the model is made, so its rows are longer, by about eager's.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

BACKENDS = ("fusewright", "inductor")
SECONDS = 120


class Phases:
    """Seconds by phase, each without the phases inside it."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._stack: list[str] = []
        self._since = 0.0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        if threading.current_thread().name.startswith("fusewright-"):
            yield  # helpers work while the thread that waits for them is counted
            return
        self._switch()
        self._stack.append(name)
        try:
            yield
        finally:
            self._switch()
            self._stack.pop()

    def _switch(self) -> None:
        now = time.perf_counter()
        if self._stack:
            self.seconds[self._stack[-1]] = self.seconds.get(self._stack[-1], 0.0) + now - self._since
        self._since = now

    def wrap(self, owner: Any, attribute: str, name: str) -> None:
        """Replaces a function of a module or class by one whose time counts as phase `name`."""
        original: Callable[..., Any] = getattr(owner, attribute)

        @wraps(original)
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.phase(name):
                return original(*args, **kwargs)

        setattr(owner, attribute, timed)


OURS = ("partition", "import graph", "rewrite and fuse", "choose", "compile", "build", "tune", "run")


def instrument(phases: Phases) -> None:
    """Sorts the time of the first call: our stages, imports, and torch's share inside our partition."""
    import importlib._bootstrap as bootstrap

    # The interpreter looks this up each time it imports a module that is not loaded yet.
    phases.wrap(bootstrap, "_find_and_load", "imports")
    with phases.phase("imports"):
        from torch._functorch import partitioners

        from fusewright import compiler
        from fusewright.capture import backend
        from fusewright.runtime import autotune, executable, target
    phases.wrap(backend, "partition_joint", "partition")
    phases.wrap(partitioners, "_extract_fwd_bwd_modules", "torch's partition")
    phases.wrap(backend, "from_fx", "import graph")
    phases.wrap(compiler, "build", "build")
    phases.wrap(compiler, "plan", "rewrite and fuse")
    phases.wrap(compiler, "candidates", "choose")
    phases.wrap(target.GpuTarget, "load", "compile")
    phases.wrap(autotune.Tuned, "_first_call", "tune")
    phases.wrap(executable.Executable, "__call__", "run")


def rehearse() -> None:
    """Runs in a new process, unmeasured."""
    import torch

    model, x = torch.nn.Linear(64, 64).cuda(), torch.randn(64, 64, device="cuda")
    for backend in BACKENDS:
        torch.compile(model, backend=backend)(x).sum().backward()
        torch._dynamo.reset()


def child(backend: str) -> dict[str, Any]:
    """Runs in a new process."""
    import torch

    model, x, gradient = _subject()
    model(x).backward(gradient)
    x.grad = None
    model.zero_grad()
    torch.cuda.synchronize()
    phases = Phases()
    start = time.perf_counter()
    if backend == "fusewright":
        instrument(phases)
    y = torch.compile(model, backend=backend)(x)
    torch.cuda.synchronize()
    forward = time.perf_counter() - start
    y.backward(gradient)
    torch.cuda.synchronize()
    total = time.perf_counter() - start
    own = {name: s for name, s in phases.seconds.items() if name in OURS}
    return {"total": total, "forward": forward, "own": sum(own.values()), "phases": phases.seconds}


def _subject() -> Any:
    import torch

    from measure import Headline

    with torch.device("cuda"):
        model, x, gradient = Headline(), torch.randn(1024, 8192), torch.randn(1024, 8192)
    return model, x.requires_grad_(), gradient


def run(what: str, folder: Path) -> dict[str, Any]:
    """One new process. Raises RuntimeError with the end of what it printed if it fails."""
    from fusewright.tools.first_call import caches

    command = [sys.executable, __file__, "--child", what]
    done = subprocess.run(command, env=os.environ | caches(folder), capture_output=True, text=True, timeout=SECONDS)
    if done.returncode:
        raise RuntimeError(f"{what}: {done.stderr[-3000:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def rounds(count: int) -> dict[str, dict[str, list[dict[str, Any]]]]:
    found: dict[str, dict[str, list[dict[str, Any]]]] = {b: {"cold": [], "warm": []} for b in BACKENDS}
    with tempfile.TemporaryDirectory() as caches:
        run("rehearse", Path(caches))
    for _ in range(count):
        with tempfile.TemporaryDirectory() as caches:
            for state in ("cold", "warm"):
                for backend in BACKENDS:
                    found[backend][state].append(run(backend, Path(caches)))
                    print(
                        backend,
                        state,
                        {k: round(v, 3) for k, v in _flat(found[backend][state][-1]).items()},
                        flush=True,
                    )
    return found


def _flat(one: dict[str, Any]) -> dict[str, float]:
    return {k: v for k, v in one.items() if k != "phases"} | one["phases"]


def summary(found: dict[str, dict[str, list[dict[str, Any]]]]) -> dict[str, Any]:
    """Medians in seconds, and ours over Inductor's."""

    def median(backend: str, state: str, what: str) -> float:
        return statistics.median(one[what] for one in found[backend][state])

    return {
        state: {
            **{f"{b}_s": median(b, state, "total") for b in BACKENDS},
            "own_s": median("fusewright", state, "own"),
            "ratio": median("fusewright", state, "total") / median("inductor", state, "total"),
        }
        for state in ("cold", "warm")
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--child", choices=(*BACKENDS, "rehearse"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child == "rehearse":
        rehearse()
        print("{}")
        return
    if options.child:
        print(json.dumps(child(options.child)))
        return
    import measure

    found = rounds(options.rounds)
    report = {"environment": measure.environment(), "runs": found, "summary": summary(found)}
    measure.write("first_call", report)
    for state, figures in report["summary"].items():
        print(state, {name: round(value, 3) for name, value in figures.items()})


if __name__ == "__main__":
    main()
