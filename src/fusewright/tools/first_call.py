"""The first call of a model in a new process: with empty caches (cold), and again with what that left (warm).

The time is from before the model file is loaded until the device has finished one forward, and one backward if the
model has one. So eager is a candidate like the others: what a compiler costs is its time less eager's. CUDA and cuBLAS
are started before.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# Everything that may keep what was compiled.
CACHES = ("FUSEWRIGHT_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "TORCH_EXTENSIONS_DIR",
          "CUDA_CACHE_PATH")  # fmt: skip
SECONDS = 900  # the most that one process may take


@dataclass(frozen=True)
class Job:
    """What a process runs. candidate: whether the class is ModelNew. compiled: arguments of torch.compile, or None.

    inputs: the model file whose inputs are used, where that is another. dtype: its name, or None.
    """

    path: str
    candidate: bool
    inputs: str
    settings: Mapping[str, object]
    dtype: str | None
    tf32: bool
    compiled: Mapping[str, Any] | None
    backward: bool


@dataclass(frozen=True)
class FirstCall:
    """Seconds; None with the reason in `failed`."""

    cold_s: float | None = None
    warm_s: float | None = None
    failed: str | None = None


def first_call(job: Job) -> FirstCall:
    """Runs two new processes, one after the other."""
    try:
        with tempfile.TemporaryDirectory(prefix="fusewright-first-call-") as folder:
            return FirstCall(_process(job, Path(folder)), _process(job, Path(folder)))
    except (RuntimeError, ValueError, OSError, subprocess.SubprocessError) as error:
        return FirstCall(failed=str(error)[:2000])


def caches(folder: Path) -> dict[str, str]:
    """The environment of a process that keeps everything that it compiles below `folder`."""
    return {name: str(folder / name.lower()) for name in CACHES}


def _process(job: Job, folder: Path) -> float:
    (folder / "here").mkdir(exist_ok=True)
    done = subprocess.run(
        [sys.executable, "-m", "fusewright.tools.first_call"],
        input=repr(asdict(job)),
        env=os.environ | caches(folder),
        cwd=folder / "here",  # an empty folder, for -m puts the current one on Python's path
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    if done.returncode or not done.stdout:
        raise RuntimeError(done.stderr.strip()[-1500:] or f"exit code {done.returncode}, and no time")
    return float(done.stdout.splitlines()[-1])


def _child(job: Job) -> float:
    """Seconds of the first call, in a process where nothing was compiled yet."""
    import torch

    from fusewright.capture import model_file
    from fusewright.tools.runner import Runner

    dtype = None if job.dtype is None else getattr(torch, job.dtype)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    inputs = model_file.load(job.inputs, job.settings).instantiate(dtype=dtype).inputs
    square = torch.ones(64, 64, device=device)
    (square @ square).sum().item()
    start = time.perf_counter()
    file = (model_file.load_candidate if job.candidate else model_file.load)(Path(job.path), job.settings)
    torch.set_float32_matmul_precision("high" if job.tf32 else "highest")
    runner = Runner(file.build(model_file.SEED).to(device=device, dtype=dtype), inputs, job.compiled)
    if job.backward:
        runner.half()
        runner.gradients = [torch.ones_like(t) for t in runner.outputs]
        runner.backward()
    else:
        runner.forward()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


if __name__ == "__main__":
    print(_child(Job(**ast.literal_eval(sys.stdin.read()))))
