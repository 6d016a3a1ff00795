"""Launches of GemmSimt, Pointwise and ColumnSum, as a code generator would write them, and the epilogue of products."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from device import TYPES, launch_of

from fusewright.codegen.launch import BufferArg, LaunchSpec, SizeArg

SIZE = SizeArg(0)
INCLUDES = {"__half": "#include <cuda_fp16.h>\n", "__nv_bfloat16": "#include <cuda_bf16.h>\n"}

# Of a product: out = max(sums + bias, 0), and the bits of what is positive: [M, ceil(N / 8)] bytes.
EPILOGUE = """struct Epilogue {
    const Accumulator* __restrict__ bias;
    Accumulator* __restrict__ out;
    uint8_t* __restrict__ mask;
    int64_t N;

    template <int V>
    __device__ __forceinline__ void operator()(int64_t m, int64_t n, int count, const Accumulator (&sums)[V]) const {
        Accumulator values[V];
        bool positive[V];
        fusewright::load(values, bias + n, 1, count);
#pragma unroll
        for (int i = 0; i < V; ++i) {
            values[i] += sums[i];
            positive[i] = values[i] > 0;
            if (!positive[i]) values[i] = 0;
        }
        if (N % V == 0)
            fusewright::store_vector(out + m * N + n, values, count);
        else
            fusewright::store(out + m * N + n, 1, values, count);
        fusewright::store_bits(mask + m * ((N + 7) / 8), n, positive, count);
    }
    __device__ __forceinline__ void prefetch(int64_t n, int count) const {}
};
"""


@dataclass(frozen=True)
class Gemm:
    """A configuration of GemmSimt, with what a launch needs of it."""

    element: str = "float"
    tile_m: int = 128
    tile_n: int = 128
    tile_k: int = 8
    major_a: str = "K"
    major_b: str = "K"
    vectorised: bool = True
    micro_m: int = 16
    micro_n: int = 8
    whole: bool = False
    unroll: int = 8

    @property
    def accumulator(self) -> str:
        return "double" if self.element == "double" else "float"

    @property
    def threads(self) -> int:
        return self.tile_m * self.tile_n // (self.micro_m * self.micro_n)

    @property
    def shared_bytes(self) -> int:
        tiles = 2 * self.tile_k * (self.tile_m + 4 + self.tile_n + 4)
        return (tiles + self.tile_m * self.tile_n) * (8 if self.element == "double" else 4)

    def grid(self, m: int, n: int) -> int:
        return -(-m // self.tile_m) * -(-n // self.tile_n)

    def launch(self) -> LaunchSpec:
        """Of `source`, with the parameters a, b, M, N, K, bias, out, mask; strides follow a and b."""
        element, accumulator = TYPES[self.element], TYPES[self.accumulator]
        written = BufferArg("out", accumulator, written=True), BufferArg("mask", torch.uint8, written=True)
        operands = [arg for name in "ab" for arg in (BufferArg(name, element), SIZE, SIZE)]
        args = *operands, SIZE, SIZE, SIZE, BufferArg("bias", accumulator), *written
        return launch_of(self.source(), self.threads, *args, shared_bytes=self.shared_bytes)

    def source(self) -> str:
        """out = max(a · b + bias, 0), and the bits of what is positive: [M, ceil(N / 8)] bytes."""
        return f"""{INCLUDES.get(self.element, "")}#include "gemm_simt.cuh"

using Element = {self.element};
using Accumulator = {self.accumulator};

{EPILOGUE}
using fusewright::Major;
using Gemm = fusewright::GemmSimt<Element, Accumulator, {self.tile_m}, {self.tile_n}, {self.tile_k}, \
Major::{self.major_a}, Major::{self.major_b}, {str(self.vectorised).lower()}, {self.micro_m}, {self.micro_n}, \
{str(self.whole).lower()}, {self.unroll}>;
static_assert(Gemm::kThreads == {self.threads} && Gemm::kSharedBytes == {self.shared_bytes});

extern "C" __global__ void __launch_bounds__(Gemm::kThreads, Gemm::kBlocksPerMultiprocessor)
kernel(const Element* __restrict__ a, int64_t a_row_stride, int64_t a_k_stride, const Element* __restrict__ b,
       int64_t b_k_stride, int64_t b_col_stride, int64_t M, int64_t N, int64_t K, const Accumulator* __restrict__ bias,
       Accumulator* __restrict__ out, uint8_t* __restrict__ mask) {{
    Gemm::run(a, a_row_stride, a_k_stride, b, b_k_stride, b_col_stride, M, N, K, Epilogue{{bias, out, mask, N}});
}}
"""


def pointwise(vector: int, threads: int = 256) -> LaunchSpec:
    """Parameters rows, cols, x, y, out, mask."""
    x, y = BufferArg("x", torch.float32), BufferArg("y", torch.float32)
    written = BufferArg("out", torch.float32, written=True), BufferArg("mask", torch.uint8, written=True)
    return launch_of(pointwise_source(vector, threads), threads, SIZE, SIZE, x, y, *written)


def pointwise_source(vector: int, threads: int = 256) -> str:
    """out = max(x + y, 0), the bits of what is positive, and x's own bits read back into `read`."""
    return f"""#include "pointwise.cuh"

struct Functor {{
    const float* __restrict__ x;
    const float* __restrict__ y;
    float* __restrict__ out;
    uint8_t* __restrict__ mask;
    int64_t N;

    template <int V> __device__ __forceinline__ void operator()(int64_t m, int64_t n, int count) const {{
        float values[V], more[V];
        bool positive[V];
        if (N % V == 0) {{
            fusewright::load_vector(values, x + m * N + n, count);
            fusewright::load_vector(more, y + m * N + n, count);
        }} else {{
            fusewright::load(values, x + m * N + n, 1, count);
            fusewright::load(more, y + m * N + n, 1, count);
        }}
#pragma unroll
        for (int i = 0; i < V; ++i) {{
            values[i] += more[i];
            positive[i] = values[i] > 0;
            if (!positive[i]) values[i] = 0;
        }}
        if (N % V == 0)
            fusewright::store_vector(out + m * N + n, values, count);
        else
            fusewright::store(out + m * N + n, 1, values, count);
        fusewright::store_bits(mask + m * ((N + 7) / 8), n, positive, count);
    }}
}};

using Kernel = fusewright::Pointwise<Functor, {threads}, {vector}>;
extern "C" __global__ void __launch_bounds__({threads})
kernel(int64_t rows, int64_t cols, const float* __restrict__ x, const float* __restrict__ y, float* __restrict__ out,
       uint8_t* __restrict__ mask) {{
    Kernel::run(rows, cols, Functor{{x, y, out, mask, cols}});
}}
"""


def column_sum(vector: int, threads: int = 256, scalar: str = "float") -> LaunchSpec:
    """Parameters rows, cols, rows per split, splits, x, mask, kept, sums."""
    read = BufferArg("x", TYPES[scalar]), BufferArg("mask", torch.uint8)
    written = (BufferArg(name, TYPES[scalar], written=True) for name in ("kept", "sums"))
    return launch_of(column_sum_source(vector, threads, scalar), threads, SIZE, SIZE, SIZE, SIZE, *read, *written)


def column_sum_source(vector: int, threads: int = 256, scalar: str = "float") -> str:
    """sums[0] = Σ x over rows where the mask is set, sums[1] = Σ x²: [2, splits, cols]. Also stores x · mask."""
    return f"""#include "column_sum.cuh"

using Scalar = {scalar};

struct Functor {{
    static constexpr int kColumnSums = 2;
    const Scalar* __restrict__ x;
    const uint8_t* __restrict__ mask;
    Scalar* __restrict__ kept;
    Scalar* __restrict__ sums;
    int64_t N, splits;

    template <int V>
    __device__ __forceinline__ void operator()(int64_t m, int64_t n, int count, Scalar (&sum)[2][V]) const {{
        Scalar values[V];
        bool keep[V];
        if (N % V == 0)
            fusewright::load_vector(values, x + m * N + n, count);
        else
            fusewright::load(values, x + m * N + n, 1, count);
        fusewright::load_bits(keep, mask + m * ((N + 7) / 8), n, count);
#pragma unroll
        for (int i = 0; i < V; ++i) {{
            sum[1][i] += values[i] * values[i];
            if (!keep[i]) values[i] = 0;
            sum[0][i] += values[i];
        }}
        fusewright::store(kept + m * N + n, 1, values, count);
    }}

    template <int V>
    __device__ __forceinline__ void finish(int64_t split, int64_t n, int count, const Scalar (&sum)[2][V]) const {{
        fusewright::store(sums + split * N + n, 1, sum[0], count);
        fusewright::store(sums + (splits + split) * N + n, 1, sum[1], count);
    }}
}};

using Kernel = fusewright::ColumnSum<Functor, {threads}, {vector}, Scalar>;
extern "C" __global__ void __launch_bounds__({threads})
kernel(int64_t rows, int64_t cols, int64_t rows_per_split, int64_t splits, const Scalar* __restrict__ x,
       const uint8_t* __restrict__ mask, Scalar* __restrict__ kept, Scalar* __restrict__ sums) {{
    Kernel::run(rows, cols, rows_per_split, Functor{{x, mask, kept, sums, cols, splits}});
}}
"""
