"""NVIDIA's compute-sanitizer finds nothing in our kernels: no bad access, race, wrong barrier or unset memory.

Run as a program, this file is what the sanitizer watches: training steps of small models, every dtype, ragged sizes.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from gpu_support import DTYPES, building, compiled, gradients, headline, random

SANITIZER = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not Path(SANITIZER).is_file(), reason="compute-sanitizer is not installed"),
]

SIZES = [(200, 264, 136), (72, 130, 203)]  # batch, inputs, outputs: tiles that are cut off; lines that are not aligned
TOOLS = {
    # The driver's bindings ask for functions that it may not have, which is no error of a kernel's.
    "memcheck": ["--leak-check", "no", "--report-api-errors", "no"],
    "racecheck": ["--racecheck-report", "all"],
    "synccheck": [],
    "initcheck": [],
}
REFUSALS = ("Device not supported", "not supported on this system")
SECONDS = 170


@pytest.mark.parametrize("tool", TOOLS)
def test_clean(tool: str) -> None:
    command = [SANITIZER, "--tool", tool, *TOOLS[tool], "--error-exitcode", "9", "--print-limit", "3"]
    # Each tensor its own allocation: the caching allocator would hide accesses past a tensor's end.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    ran = subprocess.run(
        [*command, sys.executable, __file__], capture_output=True, text=True, env=environment, timeout=SECONDS
    )
    if any(words in ran.stdout for words in REFUSALS):
        pytest.skip("compute-sanitizer cannot run on this machine")
    assert ran.returncode == 0, ran.stdout[-6000:] + ran.stderr[-2000:]
    assert "ERROR SUMMARY: 0 errors" in ran.stdout or "RACECHECK SUMMARY: 0 hazards" in ran.stdout, ran.stdout[-2000:]
    assert "kernels ran" in ran.stdout


def main() -> None:
    """Inputs are drawn on the host and copied, so that few kernels but ours run."""
    families: set[str] = set()
    for tf32 in (False, True):
        torch.backends.cuda.matmul.fp32_precision = "tf32" if tf32 else "ieee"
        for dtype in (torch.float32,) if tf32 else DTYPES:
            for batch, inputs, outputs in SIZES:
                torch._dynamo.reset()
                model = headline((batch, inputs, outputs), dtype)
                x, g = (random(batch, n, dtype=dtype, device="cpu").cuda() for n in (inputs, outputs))
                with building() as built:
                    gradients(compiled(model, library=False), model, x, g)
                torch.cuda.synchronize()
                families |= {p.family for e in built for p in e.programs.values()}
    print(f"kernels ran: {', '.join(sorted(families))}")


if __name__ == "__main__":
    main()
