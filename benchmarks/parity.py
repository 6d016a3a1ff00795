"""How far the simulator's results are from the GPU's, operation by operation. Writes results/parity.json.

    python benchmarks/parity.py

The same CUDA source runs in both places: every scalar operation of which kernels are made, over a million operands in
float32 and float64, and every Hopper instruction that the simulator models. Nothing is timed.
"""

from __future__ import annotations

import platform
import sys
from dataclasses import asdict
from typing import Any

import torch

import measure
from common import attempt

sys.path.insert(0, str(measure.ROOT / "tests" / "simulator"))

import arithmetic
import hopper_cases

from fusewright.simulator.toolchain import find_toolchain


def of_functions(dtype: torch.dtype) -> tuple[dict[str, Any], dict[str, Any]]:
    """What should be the same bits, and what need not be: by name, the difference."""
    exact, close = arithmetic.of_dtype(dtype)
    found = {n: _entry(d) for n, d in arithmetic.differences({**exact, **close}, dtype).items()}
    return {n: found[n] for n in exact}, {n: found[n] for n in close}


def _entry(difference: arithmetic.Difference) -> dict[str, Any]:
    # As text: JSON knows no NaN.
    return asdict(difference) | {"at": [str(value) for value in difference.at]}


def hopper(name: str) -> str:
    """What differs, in words, or nothing."""
    mine, _ = hopper_cases.CASES[name]("cpu")
    theirs, _ = hopper_cases.CASES[name]("cuda")
    return hopper_cases.differences(mine, theirs)


def main() -> None:
    host = {"compiler": find_toolchain().version, "libc": " ".join(platform.libc_ver())}
    report: dict[str, Any] = {"environment": measure.environment(), "host": host, "operands": arithmetic.COUNT}
    report |= {"exact": {}, "functions": {}, "hopper": {}}
    for name, dtype in arithmetic.DTYPES.items():
        report["exact"][name], report["functions"][name] = of_functions(dtype)
        measure.write("parity", report)
        print(name, "not the same:", {n: d for n, d in report["exact"][name].items() if d["same"] < 1}, flush=True)
        print(name, "ulps:", {n: d["ulps"] for n, d in report["functions"][name].items()}, flush=True)
    if torch.cuda.get_device_capability() == (9, 0):
        report["hopper"] = {name: attempt(lambda n=name: hopper(n)) for name in hopper_cases.CASES}
        print("Hopper's instructions that differ:", {n: d for n, d in report["hopper"].items() if d}, flush=True)
    measure.write("parity", report)


if __name__ == "__main__":
    main()
