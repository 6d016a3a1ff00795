"""`fusewright doctor`: what this machine can do, what is missing, and the command that mends it.

Every check tries the thing itself rather than looking for a version, and none takes for granted that another passed:
a broken torch is a finding, not a traceback.
"""

from __future__ import annotations

import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from fusewright.chip import CHIPS, DEFAULT_ARCH, arch_of
from fusewright.errors import FusewrightError
from fusewright.runtime.cache import stored
from fusewright.settings import cache_dir
from fusewright.tools.units import size

State = Literal["ok", "missing", "broken"]

TORCH = (2, 10)
NVIDIA = "0x10de"  # its PCI vendor number
PIP = f"{shlex.quote(sys.executable)} -m pip install"

# One kernel that includes our headers and CUDA's.
PROBE = """#include <cuda_fp16.h>
#include "vector.cuh"

extern "C" __global__ void probe(__half* x) { x[threadIdx.x] = __float2half(2.0f); }
"""


@dataclass(frozen=True)
class Finding:
    """One thing looked at.

    state: missing, what works without it is the rest; broken, and fusewright needs it. enables: what it is for.
    fix: the command that mends it, for a shell; empty where nothing is wrong, or no command can.
    """

    name: str
    state: State
    enables: str
    detail: str
    fix: str = ""


@dataclass(frozen=True)
class Diagnosis:
    """ok: the core works, which is to compile kernels for `arch`."""

    ok: bool
    arch: str
    findings: list[Finding]


class Missing(Exception):
    """Raised by a check. fix: the command."""

    def __init__(self, detail: str, fix: str = "") -> None:
        super().__init__(detail)
        self.fix = fix


@dataclass(frozen=True)
class Check:
    """look: describes what it found, or raises Missing. fix: for a check that fails in any other way."""

    name: str
    enables: str
    look: Callable[[], str]
    fix: str
    needed: bool = False

    def perform(self) -> Finding:
        absent: State = "broken" if self.needed else "missing"
        try:
            return Finding(self.name, "ok", self.enables, self.look())
        except Missing as error:
            return Finding(self.name, absent, self.enables, str(error), error.fix)
        except FusewrightError as error:
            return Finding(self.name, absent, self.enables, str(error), self.fix)
        except Exception as error:  # a broken installation can raise anything
            return Finding(self.name, absent, self.enables, f"{type(error).__name__}: {error}", self.fix)


def diagnose(arch: str | None, console: Console) -> Diagnosis:
    """Looks at everything, and prints it. arch: what to compile for; None is the GPU here, or the default."""
    findings: list[Finding] = []
    with console.status("looking at this machine") as status:
        chosen = arch or _arch_here()
        for check in checks(chosen):
            status.update(f"looking at: {check.name}")
            findings.append(check.perform())
    diagnosis = Diagnosis(all(f.state != "broken" for f in findings), chosen, findings)
    console.print(render(diagnosis))
    return diagnosis


def checks(arch: str) -> Iterator[Check]:
    """What is looked at, in order."""
    pip = f"{PIP} --upgrade"
    yield Check("Python", "everything", _python, "", needed=True)
    yield Check("torch", "everything", _torch, f"{pip} torch", needed=True)
    cuda = "'cuda-core[cu13]' nvidia-cuda-nvrtc nvidia-cuda-runtime nvidia-cuda-crt nvidia-cuda-cccl"
    yield Check("NVRTC", "compiling kernels", lambda: _compiles(arch), f"{pip} {cuda}", needed=True)
    yield Check("cache", "compiling once", _cache, "export FUSEWRIGHT_CACHE_DIR=/tmp/fusewright-cache")
    yield Check("C++ compiler", "checks without a GPU", _simulator, _install("g++", "gcc-c++", "gcc"))
    yield Check("driver", "running kernels", _driver, "sudo apt-get install nvidia-driver-580")
    yield Check("GPU", "running kernels, bench", _gpu, "")
    yield Check("nvcc", "running written files", _nvcc, "sudo apt-get install cuda-toolkit-13-0")
    yield Check("ninja", "running written files", _ninja, f"{pip} ninja")
    yield Check("triton", "torch.compile in bench", _triton, f"{pip} triton")
    yield Check("matplotlib", "bench --plot", lambda: _module("matplotlib"), f"{pip} matplotlib")


# ---- the checks


def _python() -> str:
    if sys.version_info < (3, 10):  # noqa: UP036  (this is the check)
        raise Missing(f"Python {sys.version.split()[0]} is too old; fusewright needs 3.10", "")
    return f"{sys.version.split()[0]} at {sys.executable}"


def _torch() -> str:
    import torch

    found = tuple(map(int, re.findall(r"\d+", torch.__version__)[:2]))
    if found < TORCH:
        raise Missing(
            f"torch {torch.__version__} is too old; fusewright needs {'.'.join(map(str, TORCH))}",
            f"{PIP} --upgrade torch",
        )
    return f"{torch.__version__}, " + (f"CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA")


def _arch_here() -> str:
    try:
        import torch

        if torch.cuda.is_available():
            return arch_of(torch.cuda.get_device_capability())
    except Exception:  # the checks of torch and of the GPU say what is wrong
        pass
    return DEFAULT_ARCH


def _compiles(arch: str) -> str:
    from cuda.bindings import nvrtc as bindings

    from fusewright.runtime.nvrtc import compile_cubin

    cubin = compile_cubin(PROBE, arch)
    _, major, minor = bindings.nvrtcVersion()
    return f"{major}.{minor}; a kernel compiles for {arch} ({size(len(cubin.code))})"


def _cache() -> str:
    folder = cache_dir()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"\0" * 4096)
    except OSError as error:
        raise Missing(
            f"{folder} cannot be written ({error.strerror}); each process compiles anew",
            "export FUSEWRIGHT_CACHE_DIR=/tmp/fusewright-cache",
        ) from None
    held = stored(folder)
    free = shutil.disk_usage(folder).free
    return f"{folder}: {sum(k.entries for k in held)} entries, {size(sum(k.bytes for k in held))}; {size(free)} free"


def _simulator() -> str:
    from fusewright.simulator.toolchain import cuda_include, find_toolchain

    toolchain = find_toolchain()
    cuda_include()
    with tempfile.TemporaryDirectory(prefix="fusewright-") as folder:
        (Path(folder) / "probe.cpp").write_text("int probe(int* x) { return *x; }\n")
        toolchain.run([*toolchain.kernel_flags(debug=False), "-c", "probe.cpp", "-o", "probe.o"], Path(folder))
    return toolchain.version


def _driver() -> str:
    if not _nvidia_hardware() and shutil.which("nvidia-smi") is None:
        raise Missing("no NVIDIA GPU in this machine: kernels are compiled and simulated, and cannot be run")
    from cuda.bindings import driver, nvrtc

    (status,) = driver.cuInit(0)
    if int(status):
        raise Missing(f"CUDA does not start: {status.name}", "nvidia-smi")
    _, number = driver.cuDriverGetVersion()
    _, major, _ = nvrtc.nvrtcVersion()
    if number // 1000 < major:
        raise Missing(
            f"the driver knows CUDA {number // 1000}, and kernels are compiled by CUDA {major}",
            "sudo apt-get install nvidia-driver-580",
        )
    return f"CUDA {number // 1000}.{number % 1000 // 10}"


def _nvidia_hardware() -> bool:
    devices = Path("/sys/bus/pci/devices")
    vendors = [p.read_text().strip() for p in devices.glob("*/vendor")] if devices.is_dir() else []
    return NVIDIA in vendors or Path("/dev/nvidiactl").exists()


def _gpu() -> str:
    import torch

    if not torch.cuda.is_available():
        if not _nvidia_hardware():
            raise Missing("none; use --arch to name the chip that kernels are compiled for")
        if not torch.version.cuda:
            raise Missing(
                f"torch {torch.__version__} is built without CUDA",
                f"{PIP} --force-reinstall torch",
            )
        if os.environ.get("CUDA_VISIBLE_DEVICES") == "":
            raise Missing("CUDA_VISIBLE_DEVICES hides every GPU", "unset CUDA_VISIBLE_DEVICES")
        torch.cuda.init()  # type: ignore[no-untyped-call]  # raises with the reason
    capability = torch.cuda.get_device_capability()
    arch = arch_of(capability)
    memory = torch.cuda.get_device_properties(0).total_memory
    more = f", {torch.cuda.device_count()} of them" if torch.cuda.device_count() > 1 else ""
    return f"{torch.cuda.get_device_name()} ({size(memory)}){more}: kernels for {CHIPS[arch].arch}"


def _nvcc() -> str:
    import torch
    from torch.utils.cpp_extension import CUDA_HOME

    if not torch.version.cuda:
        raise Missing("written files need torch with CUDA, and run where there is a GPU")
    nvcc = Path(CUDA_HOME) / "bin" / "nvcc" if CUDA_HOME else None
    wanted = f"sudo apt-get install cuda-toolkit-{torch.version.cuda.replace('.', '-')}"
    if nvcc is None or not nvcc.exists():
        raise Missing("torch finds no CUDA toolkit; set CUDA_HOME where there is one", wanted)
    said = subprocess.run([str(nvcc), "--version"], capture_output=True, text=True, timeout=60).stdout
    release = re.search(r"release (\d+)\.(\d+)", said)
    found = ".".join(release.groups()) if release else "of unknown version"
    if release and release[1] != torch.version.cuda.split(".")[0]:
        raise Missing(f"CUDA {found} at {CUDA_HOME} does not fit torch's CUDA {torch.version.cuda}", wanted)
    return f"{found} at {nvcc}"


def _ninja() -> str:
    from torch.utils.cpp_extension import is_ninja_available

    if not is_ninja_available():
        raise Missing("not installed", f"{PIP} --upgrade ninja")
    return "found"


def _triton() -> str:
    import torch

    if not torch.version.cuda:
        raise Missing("comes with torch for CUDA")
    return _module("triton")


def _module(name: str) -> str:
    try:
        module: Any = importlib.import_module(name)
    except ModuleNotFoundError:
        raise Missing("not installed", f"{PIP} --upgrade {name}") from None
    return str(getattr(module, "__version__", "found"))


def _install(apt: str, dnf: str, pacman: str) -> str:
    """The command that installs a package with this system's package manager."""
    for manager, command in (("dnf", f"install {dnf}"), ("pacman", f"-S {pacman}")):
        if shutil.which(manager):
            return f"sudo {manager} {command}"
    return f"sudo apt-get install {apt}"


def render(diagnosis: Diagnosis) -> Group:
    """For a terminal: what is there, then what mends the rest."""
    table = Table(box=None, show_header=False)
    marks: dict[State, Text] = {
        "ok": Text("ok", "green"),
        "missing": Text("missing", "yellow"),
        "broken": Text("BROKEN", "bold red"),
    }
    for column in ("", "", "for"):
        table.add_column(column)
    table.add_column("", overflow="fold")
    for f in diagnosis.findings:
        table.add_row(marks[f.state], f.name, Text(f.enables, "dim"), Text(f.detail))
    mends = [Text.assemble(f"  {f.name}: ", (f.fix, "bold")) for f in diagnosis.findings if f.fix]
    title = [Text("to mend what is missing, type:")] if mends else []
    if diagnosis.ok:
        verdict = Text(f"fusewright works here: it compiles kernels for {diagnosis.arch}", "bold green")
    else:
        verdict = Text("fusewright does not work here", "bold red")
    return Group(table, *title, *mends, verdict)
