"""The examples: the written one is what fusewright writes today, and what the public judge accepts."""

from __future__ import annotations

from pathlib import Path

from fusewright.capture.without_gpu import without_gpu
from fusewright.chip import DEFAULT_ARCH, chip_for
from fusewright.tools.emit import emit
from fusewright.tools.optimize import load_and_capture
from judge import complaints

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def test_the_written_example_is_current() -> None:
    with without_gpu():
        chip = chip_for(DEFAULT_ARCH)
        file, instance, captured = load_and_capture(EXAMPLES / "gemm_multiply_leakyrelu.py", {}, None, chip)
        text = emit(file, instance.model, captured, chip, library=False).text
    committed = (EXAMPLES / "optimized" / "gemm_multiply_leakyrelu_new.py").read_text()
    assert committed == text, "write it again with `make examples`"


def test_the_judge_accepts_the_written_example() -> None:
    assert complaints((EXAMPLES / "optimized" / "gemm_multiply_leakyrelu_new.py").read_text()) == []
