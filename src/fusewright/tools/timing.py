"""Timing on a GPU, the rates that floors are made of, and a record of the machine.

Candidates take turns within one process, in an order that is drawn anew for every round: what ran before a candidate
heats the chip, so it must not always be the same one. Each trial writes 256 MB first, so that nothing of the
candidate's is left in the L2 cache; a median of at least 50 trials is given with its spread. Calls are timed as they
are in a loop: one after the other of the same candidate, without a wait between them, and after one that does not
count. (A host that has just waited for the device is slow to begin again, whatever it calls.)
"""

from __future__ import annotations

import hashlib
import os
import platform
import random
import statistics
import subprocess
import time
import types
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fusewright.errors import raised

WARM_UPS = 10
TRIALS = 50
IN_A_ROW = 4  # trials of a candidate's turn
FLUSH_BYTES = 256 << 20
DEVICE = "cuda"
_HEAD_START = 20_000_000  # clock cycles, about 10 ms, that the device idles while the host queues work

Progress = Callable[[int, int], None]  # trials done, and how many there are


def nothing() -> None:
    """The preparation of a candidate that needs none."""


@dataclass(frozen=True)
class Candidate:
    """What is timed. prepare: runs before each trial, outside the time."""

    run: Callable[[], Any]
    prepare: Callable[[], Any] = nothing


@dataclass(frozen=True)
class Timing:
    """Milliseconds. low, high: the 10th and the 90th percentile."""

    ms: float
    low: float
    high: float
    trials: int

    @classmethod
    def of(cls, times: list[float]) -> Timing:
        tenths = statistics.quantiles(times, n=10)
        return cls(statistics.median(times), tenths[0], tenths[-1], len(times))


def interleaved(
    candidates: Mapping[str, Candidate],
    trials: int = TRIALS,
    progress: Progress = lambda done, total: None,
    *,
    queued: bool = False,
) -> dict[str, dict[str, Any]]:
    """Times every candidate, in turns. A candidate that raises is reported as {"failed": why}.

    queued: the device idles until all of a call is queued: the time is the device's alone, whatever the host does.
    Otherwise what the host does counts as far as the device waits for it.
    """
    failed = {name: why for name, c in candidates.items() if (why := _warm_up(c))}
    names = [name for name in candidates if name not in failed]
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=DEVICE)
    times: dict[str, list[float]] = {name: [] for name in names}
    order = random.Random(0)
    for done in range(0, trials, IN_A_ROW):
        progress(done, trials)
        for name in order.sample(names, len(names)):
            times[name] += _turn(candidates[name], flush, min(IN_A_ROW, trials - done), queued)
    measured = {name: asdict(Timing.of(times[name])) for name in names}
    return measured | {name: {"failed": why} for name, why in failed.items()}


def _warm_up(candidate: Candidate) -> str | None:
    try:
        for _ in range(WARM_UPS):
            candidate.prepare()
            candidate.run()
        torch.cuda.synchronize()
    except BaseException as error:
        return raised(error)[:2000]
    return None


def _turn(candidate: Candidate, flush: torch.Tensor, trials: int, queued: bool) -> list[float]:
    events = []
    torch.cuda.synchronize()
    for _ in range(1 + trials):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        candidate.prepare()
        if queued:
            torch.cuda.synchronize()
            torch.cuda._sleep(_HEAD_START)  # type: ignore[no-untyped-call]
        flush.zero_()
        start.record()
        result = candidate.run()
        end.record()
        del result
        events.append((start, end))
    torch.cuda.synchronize()
    return [float(start.elapsed_time(end)) for start, end in events[1:]]


def host_microseconds(run: Callable[[], Any], calls: int = 200, batches: int = 25) -> dict[str, float]:
    """Microseconds that one call keeps the host busy, in batches that the launch queue holds."""
    times = []
    for _ in range(batches):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            run()
        times.append((time.perf_counter() - start) / calls * 1e6)
    return {"us": statistics.median(times), "low": min(times), "high": max(times)}


def host_and_device(candidate: Candidate, trials: int = 15) -> dict[str, float]:
    """Where a call's time goes. host_us: microseconds until it has queued its work. device_ms: milliseconds that the
    device takes for it when all of it is queued beforehand, gaps that wait for the host left out.

    A call whose host time exceeds its device time is limited by the host.
    """
    times = []
    for _ in range(trials):
        candidate.prepare()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()
        torch.cuda._sleep(_HEAD_START)  # type: ignore[no-untyped-call]
        start.record()
        began = time.perf_counter()
        result = candidate.run()
        host = time.perf_counter() - began
        end.record()
        end.synchronize()
        del result
        times.append((host * 1e6, float(start.elapsed_time(end))))
    hosts, devices = zip(*times, strict=True)
    return {"host_us": statistics.median(hosts), "device_ms": statistics.median(devices)}


def rates(trials: int = 20) -> dict[str, float]:
    """Measured in this run: bytes/s of a large copy (read and written) and FLOP/s of a large fp16 product."""
    # 2 GiB each where that fits; a card that has little left measures the same rate on less.
    count = min(1 << 29, int(torch.cuda.mem_get_info()[0]) // 32)
    n = 8192
    source = torch.randn(count, device=DEVICE)
    target = torch.empty_like(source)
    a, b = (torch.randn(n, n, device=DEVICE, dtype=torch.float16) for _ in range(2))
    timed = interleaved({"copy": Candidate(lambda: target.copy_(source)), "product": Candidate(lambda: a @ b)}, trials)
    return {
        "copy_bytes_per_s": 2 * source.nbytes / timed["copy"]["ms"] * 1e3,
        "fp16_flop_per_s": 2 * n**3 / timed["product"]["ms"] * 1e3,
    }


def environment() -> dict[str, Any]:
    """The machine and the versions that results were had with."""
    names = ("torch", "triton", "fusewright", "cuda-core", "cuda-bindings", "nvidia-cuda-nvrtc")
    found = card()
    return {
        "when": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name(),
        "capability": ".".join(map(str, torch.cuda.get_device_capability())),
        "driver": found.get("driver_version"),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "cpus": os.cpu_count(),
        "versions": {name: version(name) for name in names},
        "sources": _sources(),
        "card": found,
    }


def _sources() -> str:
    """Tells one state of fusewright's own code from another, where there is no commit to name."""
    digest = hashlib.sha256()
    folder = Path(__file__).parents[1]
    for path in sorted(p for p in folder.rglob("*") if p.suffix in (".py", ".cuh", ".hpp", ".cpp", ".j2")):
        digest.update(f"{path.relative_to(folder)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def card() -> dict[str, str]:
    """Driver, clocks, temperature and power as nvidia-smi states them now."""
    fields = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,temperature.gpu,power.draw,memory.total"
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader", f"--id={torch.cuda.current_device()}"]
    try:
        line = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.SubprocessError, IndexError) as error:
        return {"unknown": str(error)}
    return dict(zip(fields.split(","), (part.strip() for part in line.split(",")), strict=True))


def version(package: str) -> str | None:
    """The installed version; None if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def separate(module: nn.Module) -> nn.Module:
    """Gives a module a `forward` of its own. Dynamo keeps what it compiles by code object; candidates that share one
    would check each other's guards at every call."""
    kind = type(module)
    shared = kind.forward
    if not isinstance(shared, types.FunctionType):
        return module
    own = types.FunctionType(
        shared.__code__.replace(), shared.__globals__, "forward", shared.__defaults__, shared.__closure__
    )
    own.__kwdefaults__ = shared.__kwdefaults__
    module.__class__ = types.new_class(kind.__name__, (kind,), exec_body=lambda body: body.update(forward=own))
    return module
