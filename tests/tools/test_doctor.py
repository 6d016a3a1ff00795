"""`doctor`: what is broken is found by trying it, is told with the command that mends it, and decides the exit code."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from fusewright.errors import CompileError
from fusewright.runtime import nvrtc
from fusewright.simulator import toolchain
from fusewright.tools import doctor
from fusewright.tools.doctor import Check, Diagnosis, Finding, Missing, diagnose


@pytest.fixture
def only(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Finding]:
    """Performs one of the checks."""

    def perform(name: str, arch: str = "sm_80") -> Finding:
        (check,) = [c for c in doctor.checks(arch) if c.name == name]
        return check.perform()

    return perform


def shown(diagnosis: Diagnosis) -> str:
    console = Console(record=True, width=200, quiet=False, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(doctor.render(diagnosis))
    return console.export_text()


def test_this_machine_works() -> None:
    found = diagnose("sm_80", Console(quiet=True))
    states = {f.name: f.state for f in found.findings}
    assert found.ok and found.arch == "sm_80" and len(states) == len(found.findings)
    for name in ("Python", "torch", "NVRTC", "cache", "C++ compiler"):
        assert states[name] == "ok"
    assert (states["GPU"] == "ok") == torch.cuda.is_available()
    assert "compiles kernels for sm_80" in shown(found)


def test_every_check_has_an_outcome(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever an installation raises is a finding; only what is needed breaks fusewright."""

    def fail() -> str:
        raise RuntimeError("of its own")

    def miss() -> str:
        raise Missing("not there", "get it")

    checks = [Check("a", "x", fail, "mend a"), Check("b", "x", miss, "other"), Check("c", "x", lambda: "fine", "")]
    monkeypatch.setattr(doctor, "checks", lambda arch: checks)
    found = diagnose(None, Console(quiet=True))
    assert found.findings == [
        Finding("a", "missing", "x", "RuntimeError: of its own", "mend a"),
        Finding("b", "missing", "x", "not there", "get it"),
        Finding("c", "ok", "x", "fine"),
    ]
    assert found.ok and "a: mend a" in shown(found) and "b: get it" in shown(found)
    checks[1] = Check("b", "x", miss, "other", needed=True)
    found = diagnose(None, Console(quiet=True))
    assert not found.ok and found.findings[1].state == "broken" and "does not work" in shown(found)


@pytest.mark.parametrize(
    "fault", [ImportError("libcudart.so.13: cannot open shared object file"), OSError("truncated")]
)
def test_a_torch_that_cannot_be_imported(
    only: Callable[[str], Finding], monkeypatch: pytest.MonkeyPatch, fault: Exception
) -> None:
    class Broken:
        def find_spec(self, name: str, *_: object) -> None:
            if name == "torch":
                raise fault

    monkeypatch.delitem(sys.modules, "torch")
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    found = only("torch")
    assert found.state == "broken" and str(fault) in found.detail and "pip install --upgrade torch" in found.fix


def test_an_old_torch(only: Callable[[str], Finding], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.9.1+cu128")
    found = only("torch")
    assert found.state == "broken" and "needs 2.10" in found.detail and found.fix


def test_a_compiler_that_refuses(only: Callable[[str], Finding], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise CompileError("kernel probe does not compile for sm_80")

    monkeypatch.setattr(nvrtc, "compile_cubin", refuse)
    found = only("NVRTC")
    assert found.state == "broken" and "does not compile" in found.detail and "nvidia-cuda-nvrtc" in found.fix


def test_no_cpp_compiler(only: Callable[[str], Finding], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    toolchain._find.cache_clear()
    found = only("C++ compiler")
    assert found.state == "missing" and found.fix == "sudo apt-get install g++"
    (tmp_path / "dnf").touch(mode=0o755)
    assert only("C++ compiler").fix == "sudo dnf install gcc-c++"


def test_a_cache_that_cannot_be_written(
    only: Callable[[str], Finding], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("FUSEWRIGHT_CACHE_DIR", str(tmp_path / "file" / "cache"))
    found = only("cache")
    assert found.state == "missing" and "compiles anew" in found.detail
    assert found.fix.startswith("export FUSEWRIGHT_CACHE_DIR=")


def test_a_gpu_that_torch_cannot_use(only: Callable[[str], Finding], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor, "_nvidia_hardware", lambda: False)
    assert only("GPU").fix == "" and "--arch" in only("GPU").detail
    monkeypatch.setattr(doctor, "_nvidia_hardware", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "without CUDA" in only("GPU").detail and only("GPU").fix.endswith("--force-reinstall torch")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert only("GPU").fix == "unset CUDA_VISIBLE_DEVICES"


def test_a_driver_that_is_too_old(only: Callable[[str], Finding], monkeypatch: pytest.MonkeyPatch) -> None:
    from cuda.bindings import driver

    monkeypatch.setattr(doctor, "_nvidia_hardware", lambda: True)
    monkeypatch.setattr(driver, "cuInit", lambda _: (0,))
    monkeypatch.setattr(driver, "cuDriverGetVersion", lambda: (0, 12040))
    found = only("driver")
    assert found.state == "missing" and "knows CUDA 12" in found.detail and found.fix.startswith("sudo apt-get install")
    monkeypatch.setattr(driver, "cuDriverGetVersion", lambda: (0, 99010))
    assert only("driver").detail == "CUDA 99.1"


def test_nvcc_must_fit_torch(only: Callable[[str], Finding], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from torch.utils import cpp_extension

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", None)
    assert only("nvcc").fix == "sudo apt-get install cuda-toolkit-13-0"
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", str(tmp_path))
    (tmp_path / "bin").mkdir()
    nvcc = tmp_path / "bin" / "nvcc"
    for release, state in (("12.8", "missing"), ("13.1", "ok")):
        nvcc.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V{release}.93'\n")
        nvcc.chmod(0o755)
        assert only("nvcc").state == state and release in only("nvcc").detail


def test_a_missing_package(only: Callable[[str], Finding], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", SimpleNamespace(__version__="3.9"))  # type: ignore[arg-type]
    assert only("matplotlib").detail == "3.9"
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # type: ignore[arg-type]
    assert only("matplotlib").state == "missing" and only("matplotlib").fix.endswith("pip install --upgrade matplotlib")
