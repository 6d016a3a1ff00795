"""CUDA C++ to cubin, in process, with NVRTC. Needs neither a GPU nor nvcc.

NVRTC is called through `cuda.bindings`: after torch's, its import takes 3 ms, and that of `cuda.core` takes 90 to 160.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from fusewright.errors import CompileError, ToolMissing
from fusewright.runtime.cache import Cache, Entry, fingerprint, included

DEVICE_CODE = Path(__file__).parent.parent / "cuda"

# --fmad=false: a product and a sum round twice, as they do in eager and in the simulator; device code that wants one
# rounding says fma. No -lineinfo: it doubles the size of a small cubin. --no-cache: where there is a driver, NVRTC
# keeps cubins of its own, and one that comes from there has no log: neither resources nor warnings are known.
# --minimal: no declarations of textures and CUDA's runtime, which each compilation would read first.
OPTIONS = ("--std=c++17", "--fmad=false", "--ptxas-options=-v", "--no-cache", "--minimal")

# One pool for all callers: what is asked for first, such as a forward before its backward, compiles first.
_COMPILERS = ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="fusewright-nvrtc")
_LOADING = threading.Lock()

# The compiler's own words for code that runs, but slowly: wgmma serialised, setmaxnreg dropped.
PERFORMANCE_WARNING = re.compile(r"^.*(?:\(C75(?:08|10|11|15|17)\)|Potential Performance Loss).*$", re.MULTILINE)


@dataclass(frozen=True)
class Resources:
    """What one kernel uses, as ptxas reports it: registers a thread; the others in bytes, shared memory a block.

    shared_bytes: static shared memory alone. spill_bytes: stores and loads together. stack_bytes: with all that the
    kernel calls, where ptxas can tell.
    """

    registers: int
    shared_bytes: int
    spill_bytes: int
    stack_bytes: int


@dataclass(frozen=True)
class Cubin:
    """Machine code for one architecture. resources: by kernel name. log: what the compiler said."""

    code: bytes
    arch: str
    log: str
    resources: Mapping[str, Resources]


def compile_cubin(source: str, arch: str) -> Cubin:
    """Compiles a translation unit for `arch`, such as "sm_90a", whatever the cache holds.

    Raises CompileError, with the compiler's log, for an error or a warning about lost performance; ToolMissing where
    NVRTC or CUDA's headers are not installed.
    """
    code, log = _compile(source, arch)
    return Cubin(code, arch, log, parse_resources(log))


def cached_cubin(source: str, arch: str) -> Cubin:
    """Like `compile_cubin`, but compiles only what the cache on disk does not hold."""

    def build() -> dict[str, bytes]:
        code, log = _compile(source, arch)
        return {"kernel.cubin": code, "kernel.cu": source.encode(), "compile.log": log.encode()}

    return _stored(Cache("cubin").fetch(_key(source, arch), build), arch)


def compile_all(sources: Sequence[str], arch: str) -> list[Cubin]:
    """Returns the cubin of each source, through the cache, compiling in parallel threads. Raises as `cached_cubin`."""
    cache = Cache("cubin")
    entries = {source: cache.find(_key(source, arch)) for source in dict.fromkeys(sources)}
    cubins = {source: _stored(entry, arch) for source, entry in entries.items() if entry}
    missing = [source for source, entry in entries.items() if not entry]
    # NVRTC's front end lets one thread in at a time, so what takes longest is first: threads that wait there wait while
    # the others' code is generated.
    missing.sort(key=_code, reverse=True)
    cubins |= zip(missing, _COMPILERS.map(lambda source: cached_cubin(source, arch), missing), strict=True)
    return [cubins[source] for source in sources]


def prepare() -> None:
    """Loads the compiler, which takes as long as to trace a small model. Raises ToolMissing."""
    _toolkit()


def parse_resources(log: str) -> dict[str, Resources]:
    """Reads the lines that `ptxas -v` prints about each kernel. Returns kernel name → resources."""
    resources = {}
    for section in log.split("Compiling entry function ")[1:]:
        name = section.split("'")[1]

        def number(pattern: str, text: str = section) -> int:
            match = re.search(pattern, text)
            return int(match[1]) if match else 0

        resources[name] = Resources(
            registers=number(r"Used (\d+) registers"),
            shared_bytes=number(r"(\d+) bytes smem"),
            spill_bytes=number(r"(\d+) bytes spill stores") + number(r"(\d+) bytes spill loads"),
            stack_bytes=number(r"(\d+) bytes cumulative stack") or number(r"(\d+) bytes stack frame"),
        )
    return resources


def _stored(entry: Entry, arch: str) -> Cubin:
    log = entry.files["compile.log"].decode()
    return Cubin(entry.files["kernel.cubin"], arch, log, parse_resources(log))


def _code(source: str) -> int:
    """How much device code a source includes, in bytes, which tells short compilations from long ones."""
    return sum(map(len, included(source, DEVICE_CODE).values()))


def _key(source: str, arch: str) -> str:
    """Everything that the cubin depends on."""
    headers = included(source, DEVICE_CODE)
    return fingerprint(source=source, headers=headers, arch=arch, options=OPTIONS, toolkit=_toolkit())


def _compile(source: str, arch: str) -> tuple[bytes, str]:
    """Returns the cubin and the compiler's log."""
    nvrtc = _nvrtc()
    name = kernel_name(source)
    options = [*OPTIONS, f"--gpu-architecture={arch}", f"-I{DEVICE_CODE}", f"-I{_cuda_headers()}"]
    program = _checked(nvrtc.nvrtcCreateProgram(source.encode(), f"{name}.cu".encode(), 0, [], []))
    try:
        (status,) = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
        log = b" " * _checked(nvrtc.nvrtcGetProgramLogSize(program))
        _checked(nvrtc.nvrtcGetProgramLog(program, log))
        text = log.rstrip(b"\0 \n").decode(errors="replace")
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            raise CompileError(f"kernel {name} does not compile for {arch} ({status.name}):\n{text}")
        if warning := PERFORMANCE_WARNING.search(text):
            raise CompileError(f"kernel {name} loses performance on {arch}: {warning[0].strip()}\n\n{text}")
        code = b" " * _checked(nvrtc.nvrtcGetCUBINSize(program))
        _checked(nvrtc.nvrtcGetCUBIN(program, code))
        return code, text
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def kernel_name(source: str) -> str:
    """Returns the name of the first `__global__` function in `source`, for messages."""
    match = _KERNEL.search(source)
    return match[1] if match else "kernel"


# Between `__global__` and the name: `void` and attributes such as `__launch_bounds__(f(256), 1)`, in any order.
_KERNEL = re.compile(r"__global__\s+(?:void\s+|__\w+__\s*\((?:[^()]|\([^()]*\))*\)\s*)*(\w+)\s*\(")


def _checked(result: tuple[Any, ...]) -> Any:
    status, *values = result
    if int(status) != 0:
        raise CompileError(f"NVRTC failed: {status.name}")
    return values[0] if values else None


@cache
def _nvrtc() -> Any:
    try:
        from cuda.bindings import nvrtc

        nvrtc.nvrtcVersion()
    except (ImportError, RuntimeError) as error:
        raise ToolMissing(
            f"NVRTC cannot be loaded ({error}); pip install 'cuda-core[cu13]' nvidia-cuda-nvrtc"
        ) from error
    return nvrtc


def _toolkit() -> str:
    """Identifies NVRTC and CUDA's headers, the ones that device code may include by their contents."""
    with _LOADING:  # threads that wait for the first are faster than threads that do the same beside it
        return _identity()


@cache
def _identity() -> str:
    from cuda.pathfinder import load_nvidia_dynamic_lib

    _, major, minor = _nvrtc().nvrtcVersion()
    library = load_nvidia_dynamic_lib("nvrtc").abs_path  # its size tells patch releases apart
    headers = [_cuda_headers() / name for name in ("cuda_fp16.h", "cuda_fp16.hpp", "cuda_bf16.h", "cuda_bf16.hpp")]
    return fingerprint(
        version=(major, minor),
        size=Path(library).stat().st_size if library else None,
        headers=[header.read_bytes() for header in headers],
    )


@cache
def _cuda_headers() -> Path:
    """The folder that holds cuda_fp16.h."""
    from cuda.pathfinder import find_nvidia_header_directory

    folder = find_nvidia_header_directory("cudart")
    if folder is None or not (Path(folder) / "cuda_fp16.h").is_file():
        raise ToolMissing("CUDA's headers are not installed; pip install nvidia-cuda-runtime")
    return Path(folder)
