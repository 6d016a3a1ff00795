"""Host side of `gemm_sm90.cuh` and `split_f16.cuh` for tests and benchmarks: source, operands, tensor maps, launches.

Where there is no cubin, kernels run in the simulator, on CPU tensors.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import simt
import torch

from fusewright.codegen.launch import Arg, BufferArg, FloatArg, LaunchSpec, SizeArg, TensorMapArg
from fusewright.ir.encoding import Halves
from fusewright.runtime.nvrtc import compile_cubin
from fusewright.simulator.buffer import Buffer
from fusewright.simulator.simulate import Simulator
from fusewright.simulator.tensor_map import EncodedMap, encode

SHARED_LIMIT = 232448

# The headline's epilogue, with its constants as arguments so that factor = slope = 1 shows the bare sums.
EPILOGUE = """
struct Epilogue {
    const float* __restrict__ bias;
    Out* __restrict__ out;
    int64_t N;
    float factor, slope;
    template <int V>
    __device__ __forceinline__ void operator()(int64_t m, int64_t n, int count, const float (&accumulator)[V]) const {
        alignas(16) float b[V];
        alignas(16) Out result[V];
        fusewright::load_vector<V>(b, bias + n, count);
#pragma unroll
        for (int i = 0; i < V; ++i) {
            const float y = (accumulator[i] + b[i]) * factor;
            result[i] = Out(y > 0 ? y : y * slope);
        }
        if constexpr (kAligned) fusewright::store_vector<V>(out + m * N + n, result, count);
        else fusewright::store<V>(out + m * N + n, 1, result, count);
    }
};
"""

SPLIT = """
#include "split_f16.cuh"
using Split = fusewright::SplitF16;
extern "C" __global__ void __launch_bounds__(Split::kThreads)
sample(const float* __restrict__ x, int64_t stride, int64_t lines, int64_t length, int* halves, int* samples) {{
    Split::sample({{x, stride, lines, length, halves, {planes}}}, samples);
}}
extern "C" __global__ void __launch_bounds__(Split::kThreads)
split(const float* __restrict__ x, int64_t stride, int64_t lines, int64_t length, int* halves,
      const int* __restrict__ samples, int64_t count) {{
    Split::split({{x, stride, lines, length, halves, {planes}}}, samples, int(count), blockIdx.x, gridDim.x);
}}
extern "C" __global__ void __launch_bounds__(Split::kThreads, fusewright::SplitLines::kBlocks)
split_lines(const float* __restrict__ x, int64_t stride, int64_t lines, int64_t length, int* halves) {{
    fusewright::SplitLines::split({{x, stride, lines, length, halves, {planes}, true}}, blockIdx.x, gridDim.x);
}}
"""

_SIMT = simt.Gemm()
_PATCH = f"""
#include "gemm_simt.cuh"
#include "split_f16.cuh"
using Out = float;
constexpr bool kAligned = true;
{EPILOGUE}
using Simt = fusewright::GemmSimt<float, float, 128, 128, 8, fusewright::Major::K, fusewright::Major::K, true>;
static_assert(Simt::kThreads == {_SIMT.threads} && Simt::kSharedBytes == {_SIMT.shared_bytes});
extern "C" __global__ void __launch_bounds__(Simt::kThreads, Simt::kBlocksPerMultiprocessor)
patch(const float* __restrict__ a, int64_t a_row_stride, const float* __restrict__ b, int64_t b_column_stride,
      int64_t M, int64_t N, int64_t K, const int* a_halves, const int* b_halves, const uint8_t* lost,
      const float* __restrict__ bias, Out* __restrict__ out, float factor, float slope) {{
    const auto x = fusewright::SplitOperand::of(a_halves, {{2, M, K}}, true);
    const auto y = fusewright::SplitOperand::of(b_halves, {{2, N, K}}, true);
    const fusewright::SplitPatch<128, 128, Simt::kThreads, 128, 128> found{{x, y, lost, M, N}};
    const int m = found.m(blockIdx.x), n = found.n(blockIdx.x);
    if (__syncthreads_or(found.sees(blockIdx.x)))
        Simt::run_tile(a, a_row_stride, 1, b, 1, b_column_stride, M, N, K, m, n,
                       Epilogue{{bias, out, N, factor, slope}});
}}
"""
# Source, threads, shared bytes of the float32 kernel that recomputes tiles with values out of range.
PATCH = (_PATCH, _SIMT.threads, _SIMT.shared_bytes)


@dataclass(frozen=True)
class GemmConfig:
    """The constants of one instantiation; see `gemm_sm90.cuh`. major_a, major_b: "K" or "MN".

    registers: of `gemm_sm90_registers.cuh`. Then a is float32, and the result is the transposed product [N, M].
    """

    element: str = "__half"
    products: int = 1
    tile: tuple[int, int] = (128, 256)
    stages: int = 4
    cluster: int = 1
    split_k: int = 1
    major_a: str = "K"
    major_b: str = "K"
    promote: int = 64
    group: int = 8
    vector: int = 4
    scaled: bool = False
    by_line: tuple[bool, bool] = (False, False)
    ping_pong: bool = False
    registers: bool = False
    out: str = "float"
    aligned: bool = True  # the result's rows are
    whole: bool = False
    spin_limit: int = 0

    @property
    def panel(self) -> int:
        """As `GemmSm90::kPanelB`."""
        return math.gcd(64, self.tile[1] // self.cluster) if self.major_b == "K" else 64

    @property
    def shared_bytes(self) -> int:
        """As `GemmSm90::kSharedBytes`."""
        planes = 2 if self.products == 3 else 1
        m, n = self.tile
        n = -(-n // self.panel) * self.panel
        stage = planes * (m * (2 if self.registers else 1) + n) * 128
        return self.stages * stage + 8 * 16 * 8 * self.vector * 4 + (2 * self.stages + 2) * 8 + 1024

    def source(self) -> str:
        """Returns the translation unit; its kernel is named `gemm`."""
        debug = f"#define FUSEWRIGHT_SPIN_LIMIT {self.spin_limit}\n" if self.spin_limit else ""
        operands = [
            f"{{nullptr, split_{name}}}" if by_line else f"{{split_{name}, nullptr}}"
            for name, by_line in zip("ab", self.by_line, strict=True)
        ]
        types = "".join(text for name, text in simt.INCLUDES.items() if name in (self.element, self.out))
        return f"""{debug}{types}#include "gemm_sm90{"_registers" if self.registers else ""}.cuh"
using Out = {self.out};
constexpr bool kAligned = {str(self.aligned).lower()};
{EPILOGUE}
struct Config {{
    using Element = {self.element};
    static constexpr int kProducts = {self.products}, kTileM = {self.tile[0]}, kTileN = {self.tile[1]};
    static constexpr int kStages = {self.stages}, kCluster = {self.cluster}, kPromote = {self.promote};
    static constexpr int kSplitK = {self.split_k}, kGroup = {self.group}, kVector = {self.vector};
    static constexpr fusewright::Major kMajorA = fusewright::Major::{self.major_a};
    static constexpr fusewright::Major kMajorB = fusewright::Major::{self.major_b};
    static constexpr bool kScaled = {str(self.scaled).lower()}, kPingPong = {str(self.ping_pong).lower()};
    static constexpr bool kWhole = {str(self.whole).lower()};
    static constexpr bool kByLineA = {str(self.by_line[0]).lower()}, kByLineB = {str(self.by_line[1]).lower()};
}};
using Gemm = fusewright::GemmSm90{"Registers" if self.registers else ""}<Config>;
static_assert(Gemm::kSharedBytes == {self.shared_bytes});
extern "C" __global__ void __launch_bounds__(Gemm::kThreads, 1)
gemm(const __grid_constant__ fusewright::TensorMap a, const __grid_constant__ fusewright::TensorMap b, int64_t M,
     int64_t N, int64_t K, const int* __restrict__ split_a, const int* __restrict__ split_b,
     const float* __restrict__ bias, Out* __restrict__ out, float factor, float slope) {{
    Gemm::run({{a, b, M, N, K, {operands[0]}, {operands[1]}}},
              Epilogue{{bias, out, {"M" if self.registers else "N"}, factor, slope}});
}}
"""

    def debug(self) -> GemmConfig:
        """The same, where a barrier that never completes traps and says so."""
        return replace(self, spin_limit=200_000)


def _driver() -> Any:
    from cuda.bindings import driver

    return driver


def checked(result: tuple[Any, ...]) -> Any:
    """Unwraps what a driver call returns. Raises RuntimeError with the driver's name for a failure."""
    status, *values = result
    if int(status) != 0:
        raise RuntimeError(status.name)
    return values[0] if values else None


def tensor_map(x: torch.Tensor, rows: int = 64, tf32: bool = False) -> Any:
    """The map of a tensor [rows, columns], 16-bit or float32, or planes [2, rows, columns]; columns of unit stride.

    Box: 128 bytes (64 columns, float32 32) × `rows` rows of one plane, 128-byte swizzle, zeros outside. tf32: floats
    arrive rounded.
    """
    if x.device.type == "cpu":
        return _simulated_map(x, rows, tf32)
    d = _driver()
    planes = x if x.ndim == 3 else x[None]
    dims = [planes.shape[2], planes.shape[1], planes.shape[0]]
    strides = [
        planes.stride(1) * x.itemsize,
        (planes.stride(0) if x.ndim == 3 else planes.stride(1) * planes.shape[1]) * x.itemsize,
    ]
    kinds = d.CUtensorMapDataType
    kind = {
        torch.float16: kinds.CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
        torch.bfloat16: kinds.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
        torch.float32: kinds.CU_TENSOR_MAP_DATA_TYPE_TFLOAT32 if tf32 else kinds.CU_TENSOR_MAP_DATA_TYPE_FLOAT32,
    }[x.dtype]
    u64, u32 = d.cuuint64_t, d.cuuint32_t
    return checked(
        d.cuTensorMapEncodeTiled(
            kind,
            3,
            x.data_ptr(),
            [u64(v) for v in dims],
            [u64(v) for v in strides],
            [u32(v) for v in (128 // x.itemsize, rows, 1)],
            [u32(1)] * 3,
            d.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
            d.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
            d.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            d.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    )


def _simulated_map(x: torch.Tensor, rows: int, tf32: bool) -> tuple[TensorMapArg, EncodedMap]:
    planes = x if x.ndim == 3 else x[None]
    strides = (planes.stride(1), planes.stride(0) if x.ndim == 3 else planes.stride(1) * planes.shape[1])
    arg = TensorMapArg("x", x.dtype, tuple(reversed(planes.shape)), strides, (128 // x.itemsize, rows, 1), tf32=tf32)
    return arg, encode(arg, Buffer.of(x))


class SimulatedKernel:
    """One kernel of a source, launched in the simulator. schedules: how many orders of its threads it tries."""

    schedules = 1

    def __init__(self, source: str, name: str, shared_bytes: int = 0) -> None:
        self.source, self.name, self.shared_bytes = source, name, shared_bytes

    def launch(self, grid: tuple[int, int], threads: int, args: Sequence[Any], cluster: int = 1) -> None:
        """As `Kernel.launch`."""
        kinds: list[Arg] = []
        values: list[Any] = []
        for i, arg in enumerate(args):
            kind: Arg = SizeArg(0)
            if isinstance(arg, tuple):
                kind, arg = arg
            elif isinstance(arg, float):
                kind = FloatArg(0.0)
            elif not isinstance(arg, int):
                arg = Buffer(0, 0) if arg is None else arg
                dtype = arg.dtype if isinstance(arg, torch.Tensor) else torch.uint8
                kind = BufferArg(f"argument{i}", dtype, written=True)
            kinds.append(kind)
            values.append(arg)
        spec = LaunchSpec(
            self.name, self.source, (1, 1, 1), (threads, 1, 1), tuple(kinds), self.shared_bytes, (cluster, 1, 1)
        )
        (kernel,) = Simulator().load([spec], schedules=self.schedules)
        kernel(values, (*grid, 1))


class Kernel:
    """One function of a cubin, launched on torch's current stream."""

    def __init__(self, cubin: bytes, name: str, shared_bytes: int = 0) -> None:
        d = _driver()
        torch.cuda.current_stream()  # creates the context
        self.shared_bytes = shared_bytes
        self._module = checked(d.cuModuleLoadData(cubin))
        self._function = checked(d.cuModuleGetFunction(self._module, name.encode()))
        limit = d.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        checked(d.cuFuncSetAttribute(self._function, limit, shared_bytes))

    def launch(self, grid: tuple[int, int], threads: int, args: Sequence[Any], cluster: int = 1) -> None:
        """args: tensors (passed as pointers), None (null), ints (int64_t), floats (float), tensor maps."""
        d = _driver()
        slots: list[Any] = []
        pointers: list[int] = []
        for arg in args:
            if hasattr(arg, "getPtr"):  # a tensor map
                pointers.append(int(arg.getPtr()))
                continue
            if isinstance(arg, float):
                slots.append(ctypes.c_float(arg))
            else:
                value = arg.data_ptr() if isinstance(arg, torch.Tensor) else arg or 0
                slots.append(ctypes.c_int64(value))
            pointers.append(ctypes.addressof(slots[-1]))
        params = (ctypes.c_void_p * len(pointers))(*pointers)
        config = d.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = *grid, 1
        config.blockDimX, config.blockDimY, config.blockDimZ = threads, 1, 1
        config.sharedMemBytes = self.shared_bytes
        config.hStream = torch.cuda.current_stream().cuda_stream
        if cluster > 1:
            attribute = d.CUlaunchAttribute()
            attribute.id = d.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
            attribute.value.clusterDim.x, attribute.value.clusterDim.y, attribute.value.clusterDim.z = cluster, 1, 1
            config.attrs, config.numAttrs = [attribute], 1
        checked(d.cuLaunchKernelEx(config, self._function, ctypes.addressof(params), 0))


def multiprocessors(cubin: bytes | None) -> int:
    """Of the GPU that runs the cubin; few for the simulator, so that blocks take several tiles."""
    return torch.cuda.get_device_properties(0).multi_processor_count if cubin else 2


class Gemm:
    """A compiled `GemmConfig`. Called with operands as stored, K-major [M or N, K] or MN-major [K, M or N]."""

    def __init__(self, config: GemmConfig, cubin: bytes | None) -> None:
        self.config = config
        made = Kernel(cubin, "gemm", config.shared_bytes) if cubin else None
        self.kernel = made or SimulatedKernel(config.source(), "gemm", config.shared_bytes)
        together = config.cluster * config.split_k
        self.blocks = max(1, multiprocessors(cubin) // together) * together

    def prepare(
        self,
        a: torch.Tensor,
        b: torch.Tensor,
        out: torch.Tensor,
        bias: torch.Tensor,
        factor: float = 1.0,
        slope: float = 1.0,
        exponents: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None),
        k: int | None = None,
    ) -> Any:
        """Returns a function without arguments that launches on these tensors."""
        c = self.config
        M, N = reversed(out.shape) if c.registers else out.shape
        K = k if k is not None else a.shape[-1] if c.major_a == "K" else a.shape[-2]
        clusters, together = -(-M // (c.tile[0] * c.cluster)) * -(-N // c.tile[1]), c.cluster * c.split_k
        tf32 = c.element == "float"
        args = [tensor_map(a, tf32=tf32), tensor_map(b, c.panel, tf32), M, N, K, *exponents, bias, out, factor, slope]
        grid = (min(self.blocks, clusters * together), 1)
        return lambda: self.kernel.launch(grid, 384, args, together)


class Split:
    """Splits float32 [lines, length] into fp16 halves, in one buffer (`fusewright.ir.encoding`)."""

    def __init__(self, cubin: bytes | None, planes: int, by_line: bool = False) -> None:
        self.planes, self.by_line = planes, by_line
        source = SPLIT.format(planes=planes)
        self.sample, self.split, self.lines = (
            Kernel(cubin, name) if cubin else SimulatedKernel(source, name)
            for name in ("sample", "split", "split_lines")
        )
        self.blocks = 8 * multiprocessors(cubin)

    def buffers(self, x: torch.Tensor) -> Halved:
        layout = Halves(*x.shape, self.planes, self.by_line)
        words = torch.full((layout.words,), -1, dtype=torch.int32, device=x.device)
        return Halved(layout, words, torch.zeros(self.blocks, dtype=torch.int32, device=x.device))

    def run(self, x: torch.Tensor, halved: Halved, look: bool = True) -> None:
        """look: at a sample, or else use the exponent of the call before."""
        matrix = [x, x.stride(0), *x.shape, halved.words]
        if self.by_line:
            self.lines.launch((min(2 * self.blocks, x.shape[0]), 1), 256, matrix)
            return
        if look:
            self.sample.launch((self.blocks, 1), 256, [*matrix, halved.samples])
        strips = -(-x.shape[1] // 512)
        deep = max(1, min(-(-x.shape[0] // 8), self.blocks // strips))
        self.split.launch((strips * deep, 1), 256, [*matrix, halved.samples, self.blocks])


@dataclass
class Halved:
    """What a split made: views of `words`."""

    layout: Halves
    words: torch.Tensor
    samples: torch.Tensor

    @property
    def data(self) -> torch.Tensor:
        """fp16 [planes, lines, length]."""
        h = self.layout
        planes = self.words.view(torch.float16)[: h.planes * h.plane].view(h.planes, h.lines, h.padded)
        return planes[:, :, : h.length]

    @property
    def lines(self) -> torch.Tensor:
        """The magnitudes of lines, as bits; likewise `columns`."""
        start = self.layout.planes * self.layout.plane // 2
        return self.words[start : start + self.layout.lines]

    @property
    def columns(self) -> torch.Tensor:
        return self.words[-1 - self.layout.length : -1]

    @property
    def exponent(self) -> torch.Tensor:
        return self.words[-1:]

    @property
    def given(self) -> torch.Tensor:
        """What a product is given: the exponent, or the magnitudes that tell of those of the lines."""
        return self.lines if self.layout.by_line else self.exponent

    @property
    def exponents(self) -> torch.Tensor:
        """Of every line, as a column."""
        if not self.layout.by_line:
            return self.exponent.expand(self.layout.lines)[:, None]
        return (14 + 127 - (self.lines >> 23)).clamp(max=126)[:, None]


F16X3 = GemmConfig(products=3, tile=(128, 128), stages=3, promote=32, scaled=True)


@cache
def compiled(source: str) -> bytes:
    return compile_cubin(source, "sm_90a").code


def cubin(source: str, device: str) -> bytes | None:
    """None for the simulator, which compiles by itself."""
    return compiled(source) if device == "cuda" else None


class Operand:
    """A float32 matrix [rows, k] as a product wants it stored: in K-major or MN-major order, split or rounded.

    values: as stored; random numbers if there are none.
    """

    def __init__(
        self,
        config: GemmConfig,
        rows: int,
        k: int,
        major: str,
        device: str,
        values: torch.Tensor | None = None,
        by_line: bool = False,
    ) -> None:
        shape = (rows, k) if major == "K" else (k, rows)
        stored = torch.randn(shape, generator=torch.Generator().manual_seed(rows)) if values is None else values
        stored = stored.to(device)
        self.device, self.exponent = device, None
        if config.scaled:
            planes = config.products // 2 + 1
            self.split = Split(cubin(SPLIT.format(planes=planes), device), planes, by_line)
            self.halved = self.split.buffers(stored)
            self.split.run(stored, self.halved)
            self.data, self.exponent, self.stored = self.halved.data, self.halved.given, stored
        else:
            dtypes = {"__nv_bfloat16": torch.bfloat16, "__half": torch.float16, "float": torch.float32}
            stored = stored.to(dtypes[config.element])
            self.data = self.stored = stored
        self.values = stored if major == "K" else stored.T


def multiply(
    config: GemmConfig, a: Operand, b: Operand, bias: torch.Tensor, factor: float, slope: float
) -> torch.Tensor:
    dtype = {"float": torch.float32, "__half": torch.float16, "__nv_bfloat16": torch.bfloat16}[config.out]
    rows, columns = (b, a) if config.registers else (a, b)
    out = torch.full((rows.values.shape[0], columns.values.shape[0]), float("nan"), dtype=dtype, device=a.device)
    gemm = Gemm(config, cubin(config.source(), a.device))
    read = a.stored if config.registers else a.data
    gemm.prepare(read, b.data, out, bias, factor, slope, (a.exponent, b.exponent), a.values.shape[1])()
    return out
