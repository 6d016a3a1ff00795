"""The C++ around the kernels: sizes, results, and that a compiler takes what is written for models of many shapes."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pytest
import sympy
import torch
from torch.utils._sympy.functions import FloorDiv, Mod
from torch.utils.cpp_extension import COMMON_NVCC_FLAGS, CUDA_HOME, include_paths, library_paths

from fusewright.codegen.launch import Arg, BufferArg, LaunchSpec, TensorMapArg
from fusewright.codegen.text import WIDTH, call
from fusewright.errors import NoKernel
from fusewright.fusion.plan import FusionPlan, View
from fusewright.ir.size import evaluate
from fusewright.runtime.nvrtc import DEVICE_CODE, compile_cubin
from fusewright.tools.host import HostPrinter, Kernels, Result, cxx, permitted, tensor_inputs
from model_files import Written, model, varied, written

N, M = sympy.symbols("n m", integer=True, positive=True)


@pytest.mark.parametrize(
    "size, text",
    [
        (3, "3"),
        (N, "n"),
        (N + 3, "n + 3"),
        (N * 4, "4 * n"),
        (N * M + M, "m * n + m"),
        (N**2, "n * n"),
        (sympy.Max(N, 4), "std::max<int64_t>(4, n)"),
        (sympy.floor(N / 8), "n / 8"),
        (sympy.floor((N + 7) / 8) * 3, "((n + 7) / 8) * 3"),
        (FloorDiv(N, 8), "n / 8"),
        (Mod(N, 8), "n % 8"),
        (FloorDiv(N * M, 8) * 2, "(m * n / 8) * 2"),
    ],
)
def test_sizes(size: sympy.Expr, text: str) -> None:
    """What the text computes, with C++'s division, is what the expression says."""
    found = cxx(size)
    as_python = re.sub(r"std::(min|max)<int64_t>", r"\1", found).replace("/", "//")
    for n, m in ((1, 1), (7, 3), (8, 2), (65, 129)):
        value = sympy.sympify(size).subs({N: n, M: m})
        assert eval(as_python, {"min": min, "max": max, "n": n, "m": m}) == value, found


def test_a_size_without_a_text() -> None:
    with pytest.raises(NoKernel, match="cannot be written"):
        cxx(sympy.sqrt(N))


def test_long_calls_are_broken() -> None:
    lines = call("launch", [f"argument{i}" for i in range(40)], ";")
    assert len(lines) > 1 and all(len(line) <= WIDTH for line in lines)
    assert "".join(line.strip() for line in lines).replace(" ", "").count(",") == 39


def test_an_expanded_result_is_copied_dense() -> None:
    result = Result(View("grad", (N, 20), (0, 1)), shared=True)
    assert result.stride == (20, 1) and result.format == "at::MemoryFormat::Contiguous"
    assert Result(View("out", (N, 20), (1, N)), shared=True).stride == (1, N)
    assert Result(View("out", (N, 20), (0, 1)), shared=False).stride == (0, 1)


def test_backward_computes_only_what_is_wanted() -> None:
    """Each step of backward stands under the condition that a result which needs it is wanted."""
    text = varied("two linears").text.split("std::vector<at::Tensor> fusewright_backward(")[1].split("\n}\n")[0]
    steps = re.findall(r"^    (.*)\{  //", text, re.M)
    assert steps and all(re.fullmatch(r"if \(wanted\[\d\]( \|\| wanted\[\d\])*\) ", s) for s in steps)
    assert len(set(steps)) > 1


# ---- aligned or not


def spec(*args: Arg, unaligned: LaunchSpec | None = None) -> LaunchSpec:
    return LaunchSpec("kernel", "__global__ void kernel() {}", (1, 1, 1), (32, 1, 1), args, unaligned=unaligned)


def test_only_what_is_certainly_aligned_is_launched() -> None:
    """Tensors start at multiples of 16 bytes; a view of one does if its offset provably keeps that."""
    other = spec(BufferArg("x", torch.float32, N + 1))
    for offset, kept in ((0, True), (4, True), (N * 8, True), (2, False), (N, False), (N * 4 + 1, False)):
        first = spec(BufferArg("x", torch.float32, offset, alignment=16), unaligned=other)
        assert permitted(first) is (first if kept else other), offset
    mapped = spec(TensorMapArg("x", torch.bfloat16, (N, 8), (8,), (64, 64), offset=4), unaligned=other)
    assert permitted(mapped) is other


def test_a_view_that_starts_anywhere() -> None:
    """x[:, 1:] starts 8 bytes into x: it is not read 16 bytes at a time."""
    body = """
    def forward(self, x):
        return x[:, {start} : {start} + 16] * 3
"""
    inputs = "torch.arange(24 * 20).reshape(24, 20)"
    kernels = [kernels_of(written(model(body.format(start=start), inputs=inputs)).text) for start in (4, 1)]
    assert ["load_vector" in text for text in kernels] == [True, False]


def kernels_of(text: str) -> str:
    return text.split("// ======== inference")[1].split("// ======== for the host code")[0]


@pytest.mark.parametrize(
    ("early", "ahead", "cluster", "shape"),
    [
        (True, (), 1, "{1, 1, 1, 32, 0}"),
        (False, (), 1, "{1, 1, 1, 32, 0, false, 1}"),
        (True, ("x",), 1, "{1, 1, 1, 32, 0, false, 1}"),  # the step before may be left out
        (True, (), 2, "{1, 1, 1, 32, 0, true, 2}"),
    ],
)
def test_what_reads_ahead_is_launched_in_order(early: bool, ahead: tuple[str, ...], cluster: int, shape: str) -> None:
    launch = replace(spec(), early=early, ahead=ahead, cluster=(cluster, 1, 1))
    printer = HostPrinter("f", FusionPlan((), (), {}, (), ()), {}, Kernels())
    assert printer.launch(launch, {}) == [f"launch(f_kernel::kernel, {shape});"]


# ---- kernels


def test_a_kernel_is_written_once() -> None:
    """A text that two graphs launch stands there once; kernels of one name stand in namespaces of their own."""
    text = varied("residual").text
    names = re.findall(r"^namespace (?!fusewright)(\w+) \{$", text, re.M)
    assert len(set(names)) == len(names) > 0
    assert "// ======== forward, in training" not in text  # it saves nothing, and launches what inference does
    assert "launch(fused_" in text.split("at::Tensor fusewright_forward(")[1].split("\n}\n")[0]


def test_what_never_runs_is_left_out() -> None:
    """The forward product's depth is a constant: nothing is launched for an empty one. The batch may be empty."""
    text = varied("tensor cores").text
    forward, backward = (text.split(f" fusewright_{n}(")[1].split("\n}\n")[0] for n in ("fused", "backward"))
    assert forward.count("launch(") == 1 and "std::min<int64_t>(1, batch)" in backward


SKINNY = """
    def __init__(self):
        super().__init__()
        self.gemm = nn.Linear(1024, 1024, dtype=torch.{dtype})

    def forward(self, x):
        return F.silu(self.gemm(x))
"""


def skinny(dtype: str) -> Written:
    return written(model(SKINNY.format(dtype=dtype), inputs=f"torch.rand(16, 1024, dtype=torch.{dtype})"))


@pytest.mark.parametrize(
    "file",
    [
        *(partial(varied, name) for name in ("tensor cores", "float32 halves", "float16")),
        *(partial(skinny, dtype) for dtype in ("float32", "float16", "bfloat16")),
    ],
)
def test_kernels_compile_inside_their_namespace(file: Callable[[], Written]) -> None:
    """All headers and kernels of a file in one translation unit, and in a namespace: a type that a header of ours only
    declares would be another one there."""
    cuda = source(file().text, "CUDA").split("// ======== for the host code\n")[0]
    includes, kernels = cuda.split("\nnamespace ", 1)
    integers = re.findall(r"^typedef .*;$", (DEVICE_CODE / "vector.cuh").read_text(), re.MULTILINE)  # for <cstdint>
    system = re.findall(r"#include <cuda_[bf].*>", includes)
    compile_cubin("\n".join([*system, *integers, f"namespace {kernels}", "}"]), "sm_90a")


# ---- both sources, as they are


@pytest.fixture(scope="module", params=("float32 halves", "library"))
def file(request: pytest.FixtureRequest) -> Written:
    return written(SORTED, library=True) if request.param == "library" else varied(request.param)


def test_nvcc_reads_nothing_of_torch(file: Written) -> None:
    """Its headers take nvcc many times as long as the kernels do. load_inline is told to add none of its own."""
    cuda = source(file.text, "CUDA")
    assert not re.search(r"\b(torch|ATen|c10|at)\b(/|::)", cuda) and "__global__" in cuda
    assert "__global__" not in source(file.text, "CPP") and "no_implicit_headers=True," in file.text


def test_both_compile_and_link(file: Written, tmp_path: Path) -> None:
    """Each with the flags and the paths that load_inline gives it: what the host code launches, nvcc has defined."""
    toolkit = Path(CUDA_HOME or "/usr/local/cuda")
    compiler, nvcc = shutil.which("g++"), toolkit / "bin" / "nvcc"
    if compiler is None or not nvcc.exists():
        pytest.skip("needs g++ and nvcc")
    for name, suffix in (("CUDA", "cu"), ("CPP", "cpp")):
        (tmp_path / f"source.{suffix}").write_text(source(file.text, name))
    missing = tmp_path / "c10" / "cuda" / "impl" / "cuda_cmake_macros.h"  # in a torch without CUDA
    missing.parent.mkdir(parents=True)
    missing.touch()
    flags = re.search(r"extra_cuda_cflags=\[(.*?)\n        \]", file.text, re.DOTALL)
    assert flags
    cuda = [str(nvcc), *COMMON_NVCC_FLAGS, "--compiler-options", "-fPIC", "-std=c++20"]
    cuda += re.findall(r'"(-.*?)",', flags[1])
    paths = [tmp_path, *include_paths(), toolkit / "include"]
    host = [compiler, "-fPIC", "-std=c++20", *(flag for p in paths for flag in ("-isystem", str(p)))]
    ran([*cuda, "-c", "source.cu", "-o", "cuda.o"], tmp_path)
    ran([*host, "-c", "source.cpp", "-o", "host.o"], tmp_path)
    defined, undefined = (
        set(re.findall(rf"\S*{space_of(file)}\S*", ran(["nm", f"--{kind}-only", f"{name}.o"], tmp_path)))
        for kind, name in (("defined", "cuda"), ("undefined", "host"))
    )
    assert len(undefined) == 1 + source(file.text, "CUDA").count("\n__global__") and undefined <= defined


def ran(command: Sequence[str], folder: Path) -> str:
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr[:4000]
    return done.stdout


def source(text: str, name: str) -> str:
    """One of the two sources of a written file."""
    return text.split(f'{name}_SOURCE = r"""\n')[1].split('\n"""')[0]


# ---- compiled and called

_STUBS = """
#include <cuda.h>
#include <cuda_runtime_api.h>
#include <algorithm>
struct __half { short bits; };
struct __nv_bfloat16 { short bits; };
extern "C" cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }
template <class... P, class... A> cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t*, void (*f)(P...), A... a) {
    f(a...);
    return cudaSuccess;
}
namespace c10::cuda { inline cudaStream_t getCurrentCUDAStream() { return nullptr; } }
struct Guard { explicit Guard(c10::Device) {} };
"""
# What takes the place of a GPU: tensors lie on the CPU, kernels do nothing.
_CHANGES = (
    (r"C10_CUDA_CHECK\(([^;]*)\);", r"(void)(\1);"),
    (r"cudaGetDriverEntryPoint(ByVersion)?\([^;]*\)\);", "cudaSuccess);"),
    (r"encode = tensor_map_encoder\(\);", "encode = [](auto...) { return CUDA_SUCCESS; };"),
    (r"const c10::cuda::CUDAGuard guard", "const Guard guard"),
    (r"t\.is_cuda\(\)", "t.is_cpu()"),
    (r", CUDA, library\)", ", CPU, library)"),
    (r"bool can_overlap\(\);", "bool can_overlap() { return true; }"),
    (r"^(namespace \w+ \{ void [^;]*); \}$", r"\1 {} }"),
)


def host_code(text: str) -> tuple[list[str], str]:
    """What the written C++ includes, and the C++ with kernels that do nothing, for the CPU."""
    includes, host = source(text, "CPP").split("\nnamespace ", 1)
    for pattern, replacement in _CHANGES:
        host = re.sub(pattern, replacement, host, flags=re.DOTALL | re.MULTILINE)
    assert host.count(") {} }") == source(text, "CUDA").count("\n__global__")
    return [i for i in re.findall(r"#include <.*>", includes) if "cuda" not in i], f"namespace {host}"


def library_of(files: Sequence[Written], folder: Path) -> Path:
    """The operators of all files in one library: the headers take most of the compiler's time."""
    compiler, cuda = shutil.which("g++") or shutil.which("clang++"), find_spec("nvidia.cu13")
    if compiler is None or cuda is None or cuda.submodule_search_locations is None:
        pytest.skip("needs a C++ compiler and the headers of the CUDA runtime")
    parts = [host_code(file.text) for file in files]
    includes = dict.fromkeys(i for found, _ in parts for i in found)
    body = "\n".join(code for _, code in parts)
    path, library = folder / "host.cpp", folder / "host.so"
    path.write_text("\n".join(includes) + _STUBS + body)
    paths = [*include_paths(), str(Path(next(iter(cuda.submodule_search_locations))) / "include")]
    command = [compiler, "-std=c++20", "-w", "-fPIC", "-shared", *(f"-I{p}" for p in paths), str(path)]
    command += [*(f"-L{p}" for p in library_paths()), "-ltorch_cpu", "-lc10", "-o", str(library)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[:4000]
    return library


# Calls every operator, in a process of its own: results, shape functions, gradients, and the errors of wrong arguments.
_CALLS = """
import json, sys
import torch

def tensors(arguments, device):
    made = [torch.ones(s, dtype=getattr(torch, d), device=device) for s, d in arguments]
    return [t.requires_grad_(t.is_floating_point()) for t in made]

def called(space, arguments, device="cpu"):
    results = getattr(torch.ops, space).fused(*tensors(arguments, device))
    return [results] if isinstance(results, torch.Tensor) else list(results)

def layout(results):
    return [(r.shape, r.stride(), r.dtype) for r in results]

torch.ops.load_library(sys.argv[1])
for space, arguments in json.loads(sys.argv[2]).items():
    results = called(space, arguments)
    assert layout(results) == layout(called(space, arguments, "meta"))
    trained = [r for r in results if r.requires_grad]
    torch.autograd.backward(trained, [torch.ones_like(r) for r in trained])
    *others, (shape, dtype) = arguments
    wrong = ([*shape, 3], dtype), ([s + 1 for s in shape], dtype), (shape, "complex64")
    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        for last in wrong:
            for device in ("cpu", "meta"):
                try:
                    with mode():
                        called(space, [*others, last], device)
                except RuntimeError as error:
                    assert "but these kernels take" in str(error), error
                else:
                    raise AssertionError(f"{space} takes {last}")
    print(len(results), len(trained))
"""


NAMES = ("several inputs", "tuple", "indices first", "two linears", "integers", "flattened", "residual")


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    files = [varied(name) for name in (*NAMES, "tensor cores", "float32 halves")]
    return library_of([*files, written(SORTED, library=True)], tmp_path_factory.mktemp("library"))


def called(script: str, *arguments: object) -> str:
    done = subprocess.run([sys.executable, "-c", script, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def test_the_operators_can_be_called(library: Path) -> None:
    files = [varied(name) for name in (*NAMES, "tensor cores", "float32 halves")]
    arguments = {space_of(file): described(file) for file in files}
    assert called(_CALLS, library, json.dumps(arguments)).split("\n")[:3] == ["1 1", "3 3", "2 1"]


# The class of a file: which of its operators run, in eager mode and compiled, before, while and after it is frozen.
_FREEZE = """
import sys
import torch
from fusewright.capture import model_file

def ran(call):
    with torch.autograd.profiler.profile() as profile:
        call()
    return {e.name.split("::")[1] for e in profile.function_events if e.name.startswith("fusewright_")}

def infer(call, batch):
    with torch.no_grad():
        return call(torch.ones(batch, 2048))

def train(call):
    call(torch.ones(8, 2048)).sum().backward()

torch.ops.load_library(sys.argv[1])
torch.cuda.synchronize = lambda device: None
model = model_file.load(sys.argv[2], name="ModelNew").build(0)
compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
for _ in range(2):
    for call in (model, compiled):
        assert ran(lambda: infer(call, 8)) == {"fused"}
        assert ran(lambda: train(call)) >= {"forward", "backward"}
    assert ran(model.freeze) == {"split"}
    for call in (model, compiled):
        for batch in (8, 12, 3):
            assert ran(lambda: infer(call, batch)) == {"frozen"}
        assert infer(call, 5).shape == (5, 1024)
        try:
            train(call)
        except RuntimeError as error:
            assert "call it under torch.no_grad(), or call its method thaw()" in str(error), error
        else:
            raise AssertionError("a frozen model has gradients")
    model.thaw()
print("done")
"""


def test_a_model_freezes_and_thaws(library: Path, tmp_path: Path) -> None:
    path = tmp_path / "written.py"
    path.write_text(varied("float32 halves").text)
    out = called(_FREEZE, library, path)
    assert out.count(f"keeps {4 * (1024 * 2048 + 1024):,} bytes") == 2 and out.endswith("done\n")


SORTED = model("""
    def __init__(self):
        super().__init__()
        self.gemm = nn.Linear(20, 16)

    def forward(self, x):
        return torch.sort(torch.relu(self.gemm(x)), dim=1, descending=True)[0].cumsum(1)
""")


def space_of(file: Written) -> str:
    return re.findall(r"torch\.ops\.(\w+)\.fused", file.text)[0]


def described(file: Written) -> list[tuple[list[int], str]]:
    """Shapes and dtypes of the operator's arguments, for JSON."""
    inference = file.emitted.planned[0]
    shapes = [([int(evaluate(s, inference.sizes)) for s in b.shape], b.dtype) for b in tensor_inputs(inference.plan)]
    return [(shape, str(dtype).removeprefix("torch.")) for shape, dtype in shapes]
