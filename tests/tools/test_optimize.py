"""`optimize` on a machine without a GPU: compiled, checked, simulated, written; or nothing written."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from rich.console import Console

from fusewright.chip import chip_for
from fusewright.errors import CannotCapture, ToolMissing, WrongResult
from fusewright.tools import optimize as tool
from fusewright.tools import plan_check
from fusewright.tools.optimize import Request, optimize
from fusewright.tools.verify_files import verify_files
from model_files import model

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU, tests/gpu builds and runs the file")

TEXT = "batch = 300\n" + model(
    """
    def __init__(self):
        super().__init__()
        self.gemm = nn.Linear(20, 16)

    def forward(self, x):
        return torch.relu(self.gemm(x) * -1.5)
""",
    inputs="torch.rand(batch, 20).cuda()",
)


def request_for(folder: Path, **changes: object) -> Request:
    (folder / "model.py").write_text(TEXT)
    values = {
        "path": folder / "model.py",
        "out": folder / "model_new.py",
        "chip": chip_for("sm_80"),
        "dtype": None,
        "settings": {},
        "library": False,
        "verify": True,
    }
    return Request(**{**values, **changes})  # type: ignore[arg-type]


def console() -> tuple[Console, io.StringIO]:
    stream = io.StringIO()
    return Console(file=stream, width=140), stream


def test_optimize_then_verify(tmp_path: Path) -> None:
    """It says what it compiled and simulated, at which sizes, and claims no run; the file then verifies."""
    request = request_for(tmp_path)
    shown, stream = console()
    optimize(request, shown)
    text = stream.getvalue()
    for words in ("kernels compiled for sm_80", "registers", "spills", "no GPU here, so nothing ran on one", "wrote"):
        assert words in text
    assert "checked at batch = 200" in text and "kernels, simulated on the CPU: 5 results and gradients" in text
    assert request.out.read_text().count("for sm_80:") == 1
    report = verify_files(request.path, request.out, None, {}, shown)
    assert report["passed"] is True and report["simulated"] is True


def test_a_wrong_kernel_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = plan_check.Outcome(False, 3.0, "gradient of x", 5)
    outcome = plan_check.PlanCheck("batch = 3", plan_check.Outcome(True, 0.0, "", 5), wrong)
    monkeypatch.setattr(tool.plan_check, "check", lambda *_, **__: outcome)
    shown, stream = console()
    with pytest.raises(WrongResult, match="gradient of x is wrong at batch = 3; nothing was written"):
        optimize(request_for(tmp_path), shown)
    assert "WRONG" in stream.getvalue()
    assert [p.name for p in tmp_path.iterdir()] == ["model.py"]


def test_without_a_check_nothing_is_claimed(tmp_path: Path) -> None:
    shown, stream = console()
    optimize(request_for(tmp_path, verify=False, settings={"batch": 7}), shown)
    assert "checked" not in stream.getvalue() and "simulated" not in stream.getvalue()
    assert "batch = 7\n" in (tmp_path / "model_new.py").read_text()


def test_of_what_torch_says_only_what_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no such thing\n\nfrom user code: https://advice")

    monkeypatch.setattr(tool, "capture", fail)
    with pytest.raises(CannotCapture, match=r"model.py:12: torch cannot trace the model: no such thing$"):
        optimize(request_for(tmp_path), console()[0])


def test_a_tensor_that_is_neither_parameter_nor_buffer(tmp_path: Path) -> None:
    request = request_for(tmp_path)
    text = TEXT.replace("nn.Linear(20, 16)\n", "nn.Linear(20, 16)\n        self.gamma = torch.full((16,), 2.5)\n")
    request.path.write_text(text.replace("* -1.5", "* self.gamma"))
    assert optimize(request, console()[0]).check is not None
    assert request.out.is_file()


def test_newer_syntax_is_told(tmp_path: Path) -> None:
    request = request_for(tmp_path, verify=False)
    request.path.write_text(TEXT + "\n\ndef other(x):\n    match x:\n        case _:\n            return x\n")
    shown, stream = console()
    optimize(request, shown)
    assert "Python 3.8 does not know: line" in stream.getvalue()


def test_a_random_model_is_not_judged(tmp_path: Path) -> None:
    request = request_for(tmp_path, library=True)
    request.path.write_text(TEXT.replace("* -1.5)", "* -1.5) + torch.rand_like(self.gemm(x))"))
    shown, stream = console()
    assert optimize(request, shown).check is None
    assert "nothing was checked" in stream.getvalue() and request.out.is_file()


def test_what_is_too_large_to_simulate_is_no_wrong_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    request, (shown, stream) = request_for(tmp_path), console()
    monkeypatch.setattr(tool, "SIMULATED", 0)
    written = optimize(request, shown).check
    assert written is not None and written["passed"] is True and written["kernels"] is None
    assert "kernels: too large to simulate" in stream.getvalue()
    report = verify_files(request.path, request.out, None, {}, shown)
    assert report["passed"] is True and report["kernels"] is None
    monkeypatch.setattr(tool, "CHECKED", 0)
    assert optimize(request, shown).check is None
    with pytest.raises(ToolMissing, match="too large to check"):
        verify_files(request.path, request.out, None, {}, shown)
