from __future__ import annotations

import multiprocessing
import subprocess
import sys
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import pytest

from fusewright.chip import CHIPS, chip_for
from fusewright.errors import CompileError, ToolMissing
from fusewright.runtime import nvrtc
from fusewright.runtime.nvrtc import Resources, cached_cubin, compile_all, compile_cubin, kernel_name
from fusewright.runtime.target import GpuTarget

SCALE = """
#include <cuda_fp16.h>
#include <cuda_bf16.h>
extern "C" __global__ void __launch_bounds__(256, 2) scale(const __half* x, __nv_bfloat16* y, float by) {
    y[threadIdx.x] = __float2bfloat16(__half2float(x[threadIdx.x]) * by);
}
"""

# Dynamic indexing keeps the array on the stack; 64 accumulators do not fit 32 registers.
HUNGRY = """
extern "C" __global__ void __launch_bounds__(1024, 2) hungry(float* x, int n) {
    __shared__ float tile[300];
    float sums[64];
#pragma unroll
    for (int i = 0; i < 64; ++i) sums[i] = x[i * n + threadIdx.x];
    tile[threadIdx.x % 300] = sums[5];
    __syncthreads();
    for (int k = 0; k < n; ++k) {
#pragma unroll
        for (int i = 0; i < 64; ++i) sums[i] = sums[i] * sums[(i * 7 + 1) % 64] + tile[(k + i) % 300];
    }
#pragma unroll
    for (int i = 0; i < 64; ++i) x[i * n + threadIdx.x] = sums[i];
}
extern "C" __global__ void indexed(float* x, int n) {
    float values[40];
    for (int i = 0; i < 40; ++i) values[i] = x[i];
    for (int i = 0; i < n; ++i) values[(i * i) % 40] += values[(i * 3) % 40];
    for (int i = 0; i < 40; ++i) x[i] = values[i];
}
"""

# The accumulator is touched between two products, so that the compiler has to wait for the first.
SERIALISED = """
extern "C" __global__ void __launch_bounds__(128) serialised(float* out, unsigned long long a, unsigned long long b) {
    float c[4] = {0, 0, 0, 0};
    asm volatile("wgmma.fence.sync.aligned;");
    for (int i = 0; i < 4; ++i) {
        asm volatile("wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%0,%1,%2,%3}, %4, %5, 1, 1, 1, 0, 0;"
                     : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "l"(a), "l"(b));
        c[0] += 1.f;
    }
    asm volatile("wgmma.commit_group.sync.aligned;");
    asm volatile("wgmma.wait_group.sync.aligned 0;");
    out[threadIdx.x] = c[0] + c[1] + c[2] + c[3];
}
"""


@pytest.mark.parametrize("arch", CHIPS)
def test_every_chip(arch: str) -> None:
    cubin = compile_cubin(SCALE, arch)
    assert cubin.code.startswith(b"\x7fELF")
    assert cubin.arch == arch
    assert cubin.resources["scale"].registers > 0


def test_resources() -> None:
    resources = compile_cubin(HUNGRY, "sm_90a").resources
    assert set(resources) == {"hungry", "indexed"}
    hungry, indexed = resources["hungry"], resources["indexed"]
    assert hungry.registers == 32
    assert hungry.shared_bytes == 1200
    assert hungry.spill_bytes > 0
    assert hungry.stack_bytes > 0
    assert (indexed.shared_bytes, indexed.spill_bytes, indexed.stack_bytes) == (0, 0, 160)


def test_parse_resources() -> None:
    """What NVRTC 13.0 and 13.5 print, and `nvcc -Xptxas -v` with its other left margin."""
    log = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'one' for 'sm_80'
ptxas info    : Function properties for one
    200 bytes stack frame, 16 bytes spill stores, 24 bytes spill loads
ptxas info    : Used 64 registers, used 1 barriers, 208 bytes cumulative stack size, 1200 bytes smem, 376 bytes cmem[0]
ptxas info    : Compiling entry function 'two' for 'sm_80'
ptxas info    : Function properties for two
ptxas         .     0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 14 registers, used 0 barriers
ptxas info    : Function properties for _Z6helperf
ptxas         .     48 bytes stack frame, 8 bytes spill stores, 8 bytes spill loads"""
    assert nvrtc.parse_resources(log) == {"one": Resources(64, 1200, 40, 208), "two": Resources(14, 0, 0, 0)}


def test_error_names_kernel_and_shows_log() -> None:
    with pytest.raises(CompileError, match=r"(?s)kernel broken does not compile for sm_90a.*broken\.cu\(2\).*nowhere"):
        compile_cubin('\nextern "C" __global__ void broken(float* p) { *p = nowhere; }', "sm_90a")


def test_unknown_arch() -> None:
    with pytest.raises(CompileError, match="invalid value for --gpu-architecture"):
        compile_cubin(SCALE, "sm_12345")


def test_lost_performance_is_an_error() -> None:
    with pytest.raises(CompileError, match=r"kernel serialised loses performance on sm_90a: .*\(C75\d\d\)"):
        compile_cubin(SERIALISED, "sm_90a")
    with pytest.raises(CompileError, match="loses performance"):
        cached_cubin(SERIALISED, "sm_90a")
    with pytest.raises(CompileError, match="loses performance"):
        cached_cubin(SERIALISED, "sm_90a")  # a refused kernel is not in the cache either


@pytest.mark.parametrize(
    "head",
    [
        'extern "C" __global__ void name(int* p)',
        'extern "C" __global__ void __launch_bounds__(256) name(int* p)',
        'extern "C" __global__ void __launch_bounds__(Gemm::kThreads, Gemm::kBlocks)\nname(int* p)',
        'extern "C" __global__ void __launch_bounds__(threads(4), 1) name(int* p)',
        'extern "C" __global__ __launch_bounds__(256) void name(int* p)',
        'extern "C" __global__\nvoid __cluster_dims__(2, 1, 1) __launch_bounds__(256, 1) name(int* p)',
    ],
)
def test_kernel_name(head: str) -> None:
    assert kernel_name(f"struct Epilogue {{}};\n{head} {{}}") == "name"


@pytest.fixture
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("FUSEWRIGHT_CACHE_DIR", str(tmp_path))
    return tmp_path / "cubin"


def entries(folder: Path) -> int:
    return len([path for path in folder.iterdir() if path.is_dir()]) if folder.exists() else 0


def test_second_time_comes_from_the_cache(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = cached_cubin(SCALE, "sm_90a")
    monkeypatch.setattr(nvrtc, "_compile", None)
    assert cached_cubin(SCALE, "sm_90a") == first
    assert entries(own_cache) == 1


def test_key_covers_everything(own_cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Each change of something that the cubin depends on makes a new entry."""
    headers = tmp_path / "headers"
    headers.mkdir()
    (headers / "outer.cuh").write_text('#include "inner.cuh"\n')
    (headers / "inner.cuh").write_text("constexpr int kValue = 1;\n")
    monkeypatch.setattr(nvrtc, "DEVICE_CODE", headers)
    source = '#include "outer.cuh"\nextern "C" __global__ void f(int* p) { *p = kValue; }\n'

    def builds(expected: int, text: str = source, arch: str = "sm_90a") -> bytes:
        code = cached_cubin(text, arch).code
        assert cached_cubin(text, arch).code == code
        assert entries(own_cache) == expected
        return code

    before = builds(1)
    (headers / "unused.cuh").write_text("")
    builds(1)
    builds(2, text=source + "// a comment\n")
    builds(3, arch="sm_80")
    (headers / "inner.cuh").write_text("constexpr int kValue = 2;\n")
    assert builds(4) != before
    monkeypatch.setattr(nvrtc, "OPTIONS", (*nvrtc.OPTIONS, "--fmad=false"))
    builds(5)
    monkeypatch.setattr(nvrtc, "_toolkit", lambda: "another NVRTC")
    builds(6)


def test_compile_all_keeps_order(own_cache: Path) -> None:
    sources = [f'extern "C" __global__ void f{i}(int* p) {{ *p = {i}; }}' for i in (0, 1, 2, 1)]
    cubins = compile_all(sources, "sm_90a")
    assert [list(cubin.resources) for cubin in cubins] == [["f0"], ["f1"], ["f2"], ["f1"]]
    assert entries(own_cache) == 3
    assert compile_all([], "sm_90a") == []


@pytest.mark.parametrize("initialized", [True, False])
def test_the_compiler_loads_when_the_backend_is_looked_up(initialized: bool) -> None:
    """In a process that uses CUDA already, which is pretended here."""
    script = f"""
import sys, torch
torch.cuda.is_initialized = lambda: {initialized}
torch.compile(torch.nn.Linear(2, 2), backend="fusewright")
from fusewright.runtime.target import BACKGROUND
BACKGROUND.shutdown()
print("cuda.bindings.nvrtc" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.split() == [str(initialized)], done.stderr[-2000:]


def test_compile_all_raises(own_cache: Path) -> None:
    with pytest.raises(CompileError, match="kernel bad"):
        compile_all([SCALE, 'extern "C" __global__ void bad() { x; }'], "sm_90a")


def test_import_loads_no_compiler() -> None:
    """Importing is cheap: what is slow to load is loaded by those who need it, beyond what torch loads anyway."""
    code = (
        "import sys, torch\n"
        "before = set(sys.modules)\n"
        "import fusewright.runtime.nvrtc, fusewright.runtime.driver\n"
        "print([m for m in sorted(set(sys.modules) - before) if m.split('.')[0] in ('cuda', 'filelock')])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_threads_load_the_compiler_once(monkeypatch: pytest.MonkeyPatch) -> None:
    times = []

    @cache
    def identity() -> str:
        times.append(time.sleep(0.05))
        return "a toolkit"

    monkeypatch.setattr(nvrtc, "_identity", identity)
    with ThreadPoolExecutor(4) as threads:
        assert set(threads.map(lambda _: nvrtc._toolkit(), range(4))) == {"a toolkit"}
    assert len(times) == 1


def test_the_compiler_loads_in_the_background(monkeypatch: pytest.MonkeyPatch) -> None:
    go_on, loaded = threading.Event(), threading.Event()
    monkeypatch.setattr(nvrtc, "prepare", lambda: go_on.wait(10) and loaded.set())
    GpuTarget(chip_for("sm_90a")).prepare()
    assert not loaded.is_set()
    go_on.set()
    assert loaded.wait(10)


def test_without_nvrtc(monkeypatch: pytest.MonkeyPatch) -> None:
    def compile_without() -> None:
        sys.modules["cuda.bindings"] = None  # type: ignore[assignment]
        nvrtc._nvrtc.cache_clear()
        with pytest.raises(ToolMissing, match="nvidia-cuda-nvrtc"):
            compile_cubin(SCALE, "sm_90a")

    process = multiprocessing.get_context("fork").Process(target=compile_without)
    process.start()
    process.join(60)
    assert process.exitcode == 0


@pytest.mark.gpu
def test_the_compiler_has_no_cache_of_its_own() -> None:
    """Where there is a driver, NVRTC could answer a second compilation without running ptxas, and without a log."""
    source = f"// {uuid.uuid4()}\n{SCALE}"
    logs = [nvrtc.compile_cubin(source, "sm_90a") for _ in range(3)]
    assert [sorted(cubin.resources) for cubin in logs] == [sorted(logs[0].resources)] * 3
    assert logs[0].resources
