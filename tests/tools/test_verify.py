"""Right candidates pass, errors are told, and the report says what was found."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from candidates import (
    COLUMNS,
    DTYPES,
    INNER,
    Exits,
    Model,
    ModelNew,
    RaisesAlways,
    check,
    check_on_gpu,
    failed,
    inputs,
)
from rich.console import Console
from torch import Tensor, nn

from fusewright.capture.model_file import load
from fusewright.errors import EagerFailure
from fusewright.tools.verify import Subject, render, verify


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_right_candidate_passes(dtype: torch.dtype) -> None:
    report = check(ModelNew, dtype=dtype)
    assert failed(report) == {}
    assert report.passed
    assert {"gradients", "changed parameters", "double backward", "batch sizes"} <= {c.name for c in report.checks}


FACTORS = [(2.0, -0.3), (2.0, 0.0), (-1.5, 0.1), (-1.5, -0.3), (-1.5, 0.0), (0.0, 0.1)]


@pytest.mark.parametrize(("multiplier", "slope"), FACTORS)
def test_a_right_candidate_passes_for_every_sign(multiplier: float, slope: float) -> None:
    assert failed(check(lambda: ModelNew(multiplier, slope), lambda: Model(multiplier, slope))) == {}


class OwnInitialisation(ModelNew):
    def __init__(self) -> None:
        super().__init__()
        nn.init.xavier_uniform_(self.gemm.weight)


class DrawsBefore(ModelNew):
    def __init__(self) -> None:
        torch.rand(1)
        super().__init__()


class OtherNames(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(nn.Linear(INNER, COLUMNS).weight.detach())

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T


@pytest.mark.parametrize("candidate", [OwnInitialisation, DrawsBefore, OtherNames])
def test_initialisation_that_differs(candidate: type[nn.Module]) -> None:
    assert "initialisation" in failed(check(candidate))


class SwitchesTf32(ModelNew):
    def forward(self, x: Tensor) -> Tensor:
        torch.backends.cuda.matmul.allow_tf32 = True
        return super().forward(x)


def test_error_text_of_the_candidate_is_shown() -> None:
    assert "no kernel for this chip" in failed(check(RaisesAlways))["error against float64"]


def test_a_candidate_does_not_end_us() -> None:
    assert "SystemExit" in failed(check(Exits))["error against float64"]


class Interrupts(ModelNew):
    def forward(self, x: Tensor) -> Tensor:
        raise KeyboardInterrupt


class RaisesItsOwn(ModelNew):
    class Stop(BaseException):
        """No Exception, as asyncio's and pytest's."""

    def forward(self, x: Tensor) -> Tensor:
        raise self.Stop("enough")


def test_whatever_a_candidate_raises_is_a_failure_but_an_interrupt() -> None:
    assert "Stop: enough" in failed(check(RaisesItsOwn))["error against float64"]
    with pytest.raises(EagerFailure, match="Stop: enough"):
        check(Model, RaisesItsOwn)
    with pytest.raises(KeyboardInterrupt):
        check(Interrupts)


def test_flags_are_watched() -> None:
    before = torch.backends.cuda.matmul.allow_tf32
    try:
        assert "torch's flags" in failed(check(SwitchesTf32))
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


FILE = """
import torch
from torch import nn

class Model(nn.Module):
    def __init__(self, features):
        super().__init__()
        self.gemm = nn.Linear(features, 5)

    def forward(self, x):
        return torch.relu(self.gemm(x))

def get_inputs():
    return [torch.rand(8, 6)]

def get_init_inputs():
    return [6]
"""


def test_model_files(tmp_path: Path) -> None:
    def subject(name: str, text: str) -> Subject:
        (tmp_path / name).write_text(text)
        return Subject.of_file(name, lambda: load(tmp_path / name))

    reference = subject("model.py", FILE)
    assert failed(verify(reference, subject("same.py", FILE))) == {}
    wrong = verify(reference, subject("other.py", FILE.replace("torch.relu", "torch.abs")))
    assert "error against float64" in failed(wrong)
    broken = verify(reference, subject("broken.py", FILE + "raise RuntimeError('no such chip')"))
    assert "no such chip" in failed(broken)["initialisation"]
    before = torch.get_float32_matmul_precision()
    try:
        switching = verify(reference, subject("switch.py", FILE + "torch.set_float32_matmul_precision('high')"))
        assert "torch's flags" in failed(switching)
    finally:
        torch.set_float32_matmul_precision(before)


def test_reference_that_fails_in_eager() -> None:
    with pytest.raises(EagerFailure, match="no kernel for this chip"):
        check(ModelNew, RaisesAlways)
    with pytest.raises(EagerFailure, match="get_inputs"):
        check(ModelNew, get_inputs=lambda: [1 / 0])


def test_model_that_names_its_dtypes_has_an_oracle() -> None:
    class Names(Model):
        def forward(self, x: Tensor) -> Tensor:
            return (super().forward(x).float() + torch.ones(COLUMNS, dtype=torch.float32)).to(torch.float32)

    report = check(Names, Names)
    assert failed(report) == {}
    assert not any("oracle" in reason for reason in report.not_checked)


def test_report() -> None:
    started: list[tuple[str, int, int]] = []
    subject = Subject("Model", Model, inputs)
    report = verify(subject, Subject("ModelNew", RaisesAlways, inputs), progress=lambda *step: started.append(step))
    assert report.passed is False
    assert [number for _, number, _ in started] == list(range(started[0][2]))
    console = Console(record=True, width=160)
    console.print(render(report))
    text = console.export_text()
    assert "WRONG" in text
    assert "on cpu, dtype the file's own, in training mode" in " ".join(text.split())
    assert "no kernel for this chip" in text
    assert "not checked" in text


@pytest.mark.parametrize(("layer", "mode"), [(lambda: nn.BatchNorm1d(8), "training"), (nn.Dropout, "evaluation")])
def test_the_mode_is_said(layer: Callable[[], nn.Module], mode: str) -> None:
    """Most checks run in one mode: in training, unless eager is random in it."""

    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(8, 8), layer())

    report = verify(*(Subject(name, build, lambda: [torch.rand(6, 8)]) for name in ("Model", "ModelNew")))
    console = Console(record=True, width=160)
    console.print(render(report))
    assert report.passed and report.mode == mode and f"in {mode} mode" in console.export_text()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_right_candidate_passes_on_a_gpu(dtype: torch.dtype) -> None:
    report = check_on_gpu(ModelNew, dtype)
    assert failed(report) == {}
    assert "streams" in {c.name for c in report.checks}
