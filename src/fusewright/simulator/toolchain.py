"""The host compiler: which one, with which options, and how it is called."""

from __future__ import annotations

import functools
import importlib.util
import os
import platform
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fusewright.simulator.errors import CompilerMissing, SimulatorCompileError

INCLUDE = Path(__file__).parent / "include"
RUNTIME = Path(__file__).parent / "runtime"
DEVICE_CODE = Path(__file__).parent.parent / "cuda"

# Contraction is off: what the source writes as a product and a sum is rounded twice, and what it writes as fma once.
# A call that ends a function stays a call: return addresses tell where the kernel stands. Structures stay whole
# (no-tree-sra), so that the instrumentation sees a 16-byte access as one.
# Overruns of local arrays, stacks that overflow and accesses through null are found, and not taken as undefined.
KERNEL_FLAGS = ("-std=c++17", "-ffp-contract=off", "-fno-math-errno", "-fno-strict-aliasing", "-fno-exceptions",
                "-fno-optimize-sibling-calls", "-fPIC", "-fvisibility=hidden", "-fsanitize=thread,alignment",
                "-fno-sanitize-recover=all", "-fno-delete-null-pointer-checks", "-fstack-clash-protection",
                "-fstack-protector-strong", "-w")  # fmt: skip
GCC_FLAGS = ("-fno-tree-sra", "-fno-gnu-unique", "-fno-extern-tls-init", "-fno-ipa-icf", "-fno-plt",
             "--param=tsan-instrument-func-entry-exit=0")  # fmt: skip
CLANG_FLAGS = ("-mllvm", "-tsan-instrument-func-entry-exit=0")


@dataclass(frozen=True)
class Toolchain:
    """A C++ compiler. compiler: its path. version: the first line of --version. clang: it takes clang's options."""

    compiler: str
    version: str
    clang: bool

    def kernel_flags(self, debug: bool) -> tuple[str, ...]:
        """Options that compile kernels; `debug` keeps every variable for a debugger to show."""
        machine = tuple(f"-m{name}" for name in ("avx2", "fma", "f16c") if name in _cpu_features())
        # Version 4 of DWARF: addr2line of binutils 2.40 mistakes the first file of version 5.
        level = ("-O0", "-g", "-gdwarf-4") if debug else ("-O2", "-g1", "-gdwarf-4")
        return (*KERNEL_FLAGS, *(CLANG_FLAGS if self.clang else GCC_FLAGS), *machine, *level)

    def run(self, arguments: Sequence[str], folder: Path) -> None:
        """Runs the compiler in `folder`. Raises SimulatorCompileError with what it said."""
        result = subprocess.run([self.compiler, *arguments], cwd=folder, capture_output=True, text=True)
        if result.returncode:
            said = result.stderr if len(result.stderr) < 8000 else result.stderr[:8000] + "\n…"
            raise SimulatorCompileError(f"{self.compiler} could not compile a kernel for the simulator:\n{said}")


@functools.cache
def _cpu_features() -> frozenset[str]:
    """Features of this CPU, by the kernel's names; none where they cannot be read."""
    if platform.machine() != "x86_64":
        return frozenset()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line for line in lines if line.startswith("flags")), "").split())


@functools.cache
def _find(path: str, cxx: str | None) -> Toolchain:
    for name in [cxx] if cxx else ["g++", "clang++"]:
        compiler = shutil.which(name, path=path)
        if compiler:
            said = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout
            version = said.partition("\n")[0]
            return Toolchain(compiler, version, "clang" in version)
    raise CompilerMissing(
        "the simulator compiles kernels for the CPU and found no C++ compiler: install the package g++ "
        "(Debian, Ubuntu: `apt-get install g++`; Fedora: `dnf install gcc-c++`), or name one in the variable CXX"
    )


def find_toolchain() -> Toolchain:
    """Returns the compiler: $CXX, or g++, or clang++. Raises CompilerMissing, which names the package to install."""
    return _find(os.environ.get("PATH", os.defpath), os.environ.get("CXX"))


@functools.cache
def cuda_include() -> tuple[Path, ...]:
    """The folders of CUDA's own headers: from the wheels, or a toolkit. Raises CompilerMissing where there are none."""
    candidates: list[Path] = []
    if spec := importlib.util.find_spec("nvidia"):
        for root in spec.submodule_search_locations or ():
            candidates += sorted(Path(root).glob("*/include"))
    nvcc = shutil.which("nvcc")
    toolkits = [os.environ.get("CUDA_HOME"), nvcc and Path(nvcc).resolve().parents[1], "/usr/local/cuda"]
    candidates += [Path(toolkit) / "include" for toolkit in toolkits if toolkit]
    for folder in candidates:
        if all((folder / name).exists() for name in ("cuda_fp16.h", "vector_types.h", "crt/host_defines.h")):
            return folder, folder / "cccl"
    raise CompilerMissing(
        "the simulator needs CUDA's headers: install the packages nvidia-cuda-runtime, nvidia-cuda-crt and "
        "nvidia-cuda-cccl"
    )
