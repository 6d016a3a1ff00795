"""Kernels compute on the CPU what CUDA says they compute, and every order of their threads gives the same."""

from __future__ import annotations

import resource
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
import pytest
import torch

from fusewright.codegen.launch import BufferArg, FloatArg, LaunchSpec, SizeArg
from fusewright.errors import MixedDevices
from fusewright.simulator.errors import OrderDependentResult, OutOfBounds
from fusewright.simulator.simulate import Buffer, SimulatedKernel, Simulator
from kernels import launch

F32 = torch.float32
INDEX = "const int i = blockIdx.x * blockDim.x + threadIdx.x;"


def run(source: str, *arguments: object, grid: tuple[int, ...] = (1,), **options: int) -> None:
    (kernel,) = Simulator().load([launch(source, **options)])
    kernel(list(arguments), grid)  # type: ignore[arg-type]


def kernel_of(name: str, parameters: str, body: str) -> str:
    return f'#include "async.cuh"\nextern "C" __global__ void {name}({parameters}) {{ {INDEX} {body} }}'


# name → (parameters, body, inputs of 64, what the outputs of 64 must be)
Case = tuple[str, str, list[torch.Tensor], Callable[..., torch.Tensor]]
torch.manual_seed(7)
A, B, C = torch.randn(64), torch.randn(64) * 1e3, torch.randn(64) * 1e-3
LANES = torch.arange(64) % 32
WARPS = torch.arange(64) // 32 * 32


def fma(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    # A product of two floats is exact in double; longdouble makes the sum with c exact enough to round once.
    exact = a.double().numpy().astype(np.longdouble) * b.double().numpy() + c.double().numpy()
    return torch.from_numpy(exact.astype(np.float32))


CASES: Mapping[str, Case] = {
    "product_then_sum": ("const float* a, const float* b, const float* c, float* out",
                         "out[i] = a[i] * b[i] + c[i];", [A, B, C], lambda a, b, c: a * b + c),
    "fused": ("const float* a, const float* b, const float* c, float* out",
              "out[i] = __fmaf_rn(a[i], b[i], c[i]);", [A, B, C], fma),
    "divided": ("const float* a, const float* b, float* out",
                "out[i] = __fsqrt_rn(fabsf(a[i])) / b[i];", [A, B],
                lambda a, b: torch.from_numpy(np.sqrt(a.abs().numpy()) / b.numpy())),
    "reciprocal_root": ("const float* a, float* out", "out[i] = rsqrtf(fabsf(a[i]));", [A],
                        lambda a: (1 / a.abs().double().sqrt()).float()),
    "rounded_to_half": ("const float* a, __half* out", "out[i] = __float2half_rn(a[i]);", [B], lambda a: a.half()),
    "rounded_to_bfloat16": ("const float* a, __nv_bfloat16* out", "out[i] = __float2bfloat16_rn(a[i]);", [B],
                            lambda a: a.bfloat16()),
    "half_sum": ("const __half* a, const __half* b, __half* out", "out[i] = a[i] + b[i];", [A.half(), B.half()],
                 lambda a, b: a + b),
    "half_fma": ("const __half* a, const __half* b, const __half* c, __half* out",
                 "out[i] = __hfma(a[i], b[i], c[i]);", [A.half(), A.flip(0).half(), C.half()],
                 lambda a, b, c: (a.double() * b.double() + c.double()).half()),
    "shuffled": ("const float* a, float* out", "out[i] = __shfl_sync(~0u, a[i], 5, 8);", [A],
                 lambda a: a[torch.arange(64) // 8 * 8 + 5]),
    "shuffled_up": ("const float* a, float* out", "out[i] = __shfl_up_sync(~0u, a[i], 3, 16);", [A],
                    lambda a: torch.where(LANES % 16 < 3, a, a.roll(3))),
    "shuffled_down": ("const double* a, double* out", "out[i] = __shfl_down_sync(~0u, a[i], 3);", [A.double()],
                      lambda a: torch.where(LANES >= 29, a, a.roll(-3))),
    "shuffled_half": ("const __half* a, __half* out", "out[i] = __shfl_xor_sync(~0u, a[i], 17);", [A.half()],
                      lambda a: a[WARPS + (LANES ^ 17)]),
    "voted": ("const float* a, int* out",
              "out[i] = __ballot_sync(~0u, a[i] > 0) * __any_sync(~0u, i == 3) + 10 * __all_sync(~0u, i < 40);", [A],
              lambda a: torch.tensor([sum(1 << j for j in range(32) if a[j] > 0) - (1 << 32) * int(a[31] > 0) + 10]
                                     * 32 + [0] * 32).int()),
    "reduced": ("const int* a, int* out",
                "out[i] = __reduce_max_sync(~0u, a[i]) - __reduce_add_sync(~0u, unsigned(a[i])) + "
                "__reduce_min_sync(~0u, a[i]);", [torch.arange(64).int() - 30],
                lambda a: (a.reshape(2, 32).amax(1) - a.reshape(2, 32).sum(1) + a.reshape(2, 32).amin(1)
                           ).repeat_interleave(32).int()),
    "half_of_a_warp": ("const int* a, int* out",
                       "out[i] = i % 32 < 16 ? __reduce_add_sync(0xffff, a[i]) : __reduce_add_sync(0xffff0000, 1);",
                       [torch.arange(64).int()],
                       lambda a: torch.tensor([120, 16, 632, 16]).repeat_interleave(16).int()),
    "matched": ("const int* a, int* out", "out[i] = __popc(__match_any_sync(~0u, a[i] % 5));",
                [torch.arange(64).int() % 32], lambda a: torch.where(a % 5 < 2, 7, 6).int()),
    "counted": ("const float* a, int* out",
                "out[i] = __syncthreads_count(i % 3 == 0) + 100 * __syncthreads_or(i == 9) + "
                "1000 * __syncthreads_and(i < 63);", [A], lambda a: torch.full((64,), 122).int()),
    "atomic": ("const int* a, int* out",
               "atomicMax(out + i % 4, a[i]); atomicAdd(out + 4, 1); atomicCAS(out + 5, 0, 7); atomicExch(out + 6, 9);",
               [torch.arange(64).int()],
               lambda a: torch.tensor([60, 61, 62, 63, 64, 7, 9] + [0] * 57).int()),
    "atomic_float": ("const float* a, float* out", "if (i < 32) atomicAdd(out, 0.5f);", [A],
                     lambda a: torch.tensor([16.0] + [0.0] * 63)),
    "bits": ("const int* a, int* out", "out[i] = __clz(a[i]) + __ffs(a[i]) + __popc(a[i]) + (__brev(a[i]) >> 31);",
             [torch.tensor([1, 2, 3, 0] * 16).int()], lambda a: torch.tensor([34, 33, 34, 32] * 16).int()),
    "converted": ("const float* a, int* out", "out[i] = __float2int_rn(a[i]);",
                  [torch.tensor([0.5, 1.5, -2.5, 3e9, -3e9, float("nan"), 7.4, -0.6] * 8)],
                  lambda a: torch.tensor([0, 2, -2, 2**31 - 1, -(2**31), 0, 7, -1] * 8).int()),
    "smaller": ("const float* a, float* out", "out[i] = min(a[i], 0.5f) + max(int(threadIdx.x) % 4, 2) + max(1u, 0);",
                [A], lambda a: a.minimum(torch.tensor(0.5)) + torch.tensor([2, 2, 2, 3] * 16) + 1),
    # 0x7f800001 is a NaN that signals.
    "smaller_of_nans": ("const float* a, float* out",
                        "const float nan = __int_as_float(0x7f800001); "
                        "out[i] = (i < 32 ? fminf(nan, a[i]) : fmax(a[i], nan)) + min(0.0f, -0.0f);", [A],
                        lambda a: a),
    "vectors": ("const float* a, float* out",
                "if (i < 16) { float4 v = reinterpret_cast<const float4*>(a)[i]; "
                "reinterpret_cast<float4*>(out)[i] = make_float4(v.w, v.z, v.y, v.x); }", [A],
                lambda a: a.reshape(16, 4).flip(1).reshape(64)),
}  # fmt: skip


@pytest.fixture(scope="module")
def cases() -> Mapping[str, SimulatedKernel]:
    launches = [launch(kernel_of(name, case[0], case[1])) for name, case in CASES.items()]
    return dict(zip(CASES, Simulator().load(launches), strict=True))


@pytest.mark.parametrize("name", CASES)
def test_operation(cases: Mapping[str, SimulatedKernel], name: str) -> None:
    """Bit for bit: arithmetic is IEEE's and is not contracted, halves round as the hardware's do."""
    _, _, inputs, reference = CASES[name]
    expected = reference(*inputs)
    result = torch.zeros(64, dtype=expected.dtype)
    cases[name]([*inputs, result], (1,))
    torch.testing.assert_close(result, expected, rtol=0, atol=0, equal_nan=True)


def test_every_thread_of_every_block_runs_once() -> None:
    source = """extern "C" __global__ void count(int* out) {
        const int block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
        const int thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
        out[block * 60 + thread] += block * 1000 + thread + 1;
    }"""
    spec = launch(source, (3, 4, 5))
    for order in range(4):
        out = torch.zeros(24, 60, dtype=torch.int32)
        Simulator().load([spec], seed=order)[0]([out], (2, 3, 4))
        assert torch.equal(out, (torch.arange(24)[:, None] * 1000 + torch.arange(60) + 1).int())


def test_arguments_of_every_kind() -> None:
    source = """extern "C" __global__ void all(const float* x, float factor, double offset, float* y, long long n) {
        y[threadIdx.x] = x[threadIdx.x] * factor + (float)offset + n; }"""
    args = (
        BufferArg("x", F32),
        FloatArg(0.0),
        FloatArg(0.0, torch.float64),
        BufferArg("y", F32, written=True),
        SizeArg(0),
    )
    (kernel,) = Simulator().load([LaunchSpec("all", source, (1, 1, 1), (4, 1, 1), args)])
    x, y = torch.arange(8.0), torch.zeros(8)
    view = Buffer(y.data_ptr() + 8, 16)
    kernel([x[::2][:4].contiguous(), 0.5, 1 / 3, view, -(2**20)], (1, 1, 1))
    assert y[2:6].tolist() == [float(np.float32(np.float32(i + 1 / 3) - 2**20)) for i in (0, 1, 2, 3)]
    assert not y[:2].any() and not y[6:].any()


def test_a_strided_tensor_ends_at_its_last_element() -> None:
    source = 'extern "C" __global__ void at(const float* x, float* y, long long i) { y[0] = x[i]; }'
    (kernel,) = Simulator().load([launch(source, 1)])
    x, y = torch.arange(12.0).reshape(3, 4), torch.zeros(1)
    kernel([x[:, :2], y, 9], (1,))
    assert y[0] == 9
    with pytest.raises(OutOfBounds):
        kernel([x[:, :2], y, 10], (1,))


def test_extent_narrows_a_buffer() -> None:
    source = 'extern "C" __global__ void at(const float* x, float* y, long long i) { y[0] = x[i]; }'
    spec = launch(source, 1)
    spec = replace(spec, args=(replace(spec.args[0], extent=5), *spec.args[1:]))
    (kernel,) = Simulator().load([spec])
    kernel([torch.zeros(8), torch.zeros(1), 4], (1,))
    with pytest.raises(OutOfBounds):
        kernel([torch.zeros(8), torch.zeros(1), 5], (1,))


def test_only_cpu_tensors() -> None:
    (kernel,) = Simulator().load([launch('extern "C" __global__ void f(float* x) {}', 1)])
    with pytest.raises(MixedDevices, match="meta"):
        kernel([torch.zeros(1, device="meta")], (1,))


def test_empty_grid_runs_nothing() -> None:
    run('extern "C" __global__ void f(float* x) { x[0] = 1; }', x := torch.zeros(1), grid=(0, 5, 1))
    assert x[0] == 0


def test_kernels_of_one_name_and_epilogues_of_one_name_share_a_unit() -> None:
    def source(value: int) -> str:
        return f"""#pragma once
            #include "vector.cuh"
            struct Epilogue {{ static constexpr int kValue = {value}; }};
            extern "C" __global__ void __launch_bounds__(Epilogue::kValue * 32, (1)) f(float* x) {{
                __shared__ float tile[Epilogue::kValue];
                tile[threadIdx.x % 1] = 0;
                x[0] = Epilogue::kValue; }}"""

    kernels = Simulator().load([launch(source(value), 1) for value in (3, 4, 3)])
    x = torch.zeros(3)
    for i, kernel in enumerate(kernels):
        kernel([x[i:]], (1,))
    assert x.tolist() == [3, 4, 3]


# Threads of all blocks write one element, unordered: the last one wins.
LAST_WINS = 'extern "C" __global__ void last(float* x, long long n) { x[0] = blockIdx.x * 64 + threadIdx.x; }'


def test_an_order_can_be_repeated() -> None:
    results = []
    for seed in (0, 1, 2, 2, 3):
        x = torch.zeros(1)
        Simulator(workers=1).load([launch(LAST_WINS)], seed=seed)[0]([x, 0], (4,))
        results.append(x.item())
    assert results[0] == 255 and results[1] == 0
    assert results[2] == results[3] != results[4]


def test_orders_are_compared() -> None:
    (kernel,) = Simulator().load([launch(LAST_WINS)], schedules=2)
    with pytest.raises(OrderDependentResult, match="element 0 of `x`"):
        kernel([torch.zeros(1), 0], (1,))


def test_each_order_starts_from_the_same_memory() -> None:
    (kernel,) = Simulator().load(
        [launch('extern "C" __global__ void f(float* x) { x[threadIdx.x] += 1; }')], schedules=5
    )
    kernel([x := torch.zeros(64)], (1,))
    assert torch.equal(x, torch.ones(64))


def test_result_does_not_depend_on_the_number_of_workers() -> None:
    source = kernel_of("f", "float* x, long long n",
                       "__shared__ float t[64]; t[threadIdx.x] = i; __syncthreads(); "
                       "if (i < n) x[i] = t[63 - threadIdx.x];")  # fmt: skip
    expected = (torch.arange(6400).reshape(100, 64).flip(1).reshape(-1)).float()
    for workers in (1, 2, 7):
        x = torch.zeros(6400)
        Simulator(workers=workers).load([launch(source)])[0]([x, 6400], (100,))
        assert torch.equal(x, expected)
        with pytest.raises(OutOfBounds) as caught:
            Simulator(workers=workers).load([launch(source)])[0]([x[: 64 * 53 + 5], 6400], (100,))
        assert (caught.value.where.block, caught.value.where.thread) == ((53, 0, 0), (5, 0, 0))


GEMM = """#include "gemm_simt.cuh"
struct Epilogue {
    float* out;
    int64_t N;
    template <int V>
    __device__ __forceinline__ void operator()(int64_t m, int64_t n, int count, const float (&sums)[V]) const {
        fusewright::store_vector(out + m * N + n, sums, count);
    }
};
using Gemm = fusewright::GemmSimt<float, float, 128, 128, 16, fusewright::Major::K, fusewright::Major::MN, true>;
static_assert(Gemm::kThreads == 128 && Gemm::kSharedBytes == 99328);
extern "C" __global__ void __launch_bounds__(Gemm::kThreads)
gemm(const float* a, const float* b, float* out, int64_t n) {
    Gemm::run(a, n, 1, b, n, 1, n, n, n, Epilogue{out, n});
}
"""
POINTWISE = """#include "pointwise.cuh"
struct Epilogue {
    const float* x;
    float* out;
    int64_t cols;
    template <int V> __device__ __forceinline__ void operator()(int64_t m, int64_t n, int count) const {
        float v[V];
        fusewright::load_vector(v, x + m * cols + n, count);
        for (int i = 0; i < V; ++i) v[i] = v[i] > 0 ? v[i] : 0.1f * v[i];
        fusewright::store_vector(out + m * cols + n, v, count);
    }
};
using Kernel = fusewright::Pointwise<Epilogue, 256, 4>;
extern "C" __global__ void __launch_bounds__(256) pointwise(const float* x, float* out, int64_t rows, int64_t cols) {
    Kernel::run(rows, cols, Epilogue{x, out, cols});
}
"""


def children_seconds() -> float:
    """CPU time of the compilers that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_shipped_kernels_are_right_and_fast_enough() -> None:
    """A 256 cube and a million elements, with all checks on, within 3 and 2 seconds of two cores, after a compile of 5.

    In CPU time, which other processes do not change; the simulator's runtime is there, as after any first use.
    """
    n, unique = 256, f"// {uuid.uuid4()}\n"  # not in the cache
    Simulator().load([launch('extern "C" __global__ void f(float* x) {}', 1)])
    start = children_seconds()
    gemm, pointwise = Simulator().load([launch(unique + GEMM, 128, 99328), launch(unique + POINTWISE, 256)])
    assert 0 < children_seconds() - start < 5
    a, b, out = torch.randn(n, n), torch.randn(n, n), torch.zeros(n, n)
    start = time.process_time()
    gemm([a, b, out, n], (4,))
    assert time.process_time() - start < 2 * 3
    torch.testing.assert_close(out.double(), a.double() @ b.double(), rtol=1e-4, atol=1e-4)

    x, y = torch.randn(1000, 1000), torch.zeros(1000, 1000)
    start = time.process_time()
    pointwise([x, y, 1000, 1000], (264,))
    assert time.process_time() - start < 2 * 2
    assert torch.equal(y, torch.where(x > 0, x, torch.tensor(0.1) * x))


def test_functions_of_floats_are_float_functions() -> None:
    """As in CUDA, `fma`, `sqrt` and `exp` without a suffix take the type of their operands."""
    source = """
#include "vector.cuh"
namespace fusewright {
__device__ int width(float a) { return sizeof(fma(a, a, a)) * 100 + sizeof(exp(a)) * 10 + sizeof(sqrt(a)); }
}
extern "C" __global__ void kernel(float* out) { out[0] = fusewright::width(out[0]); }
"""
    out = torch.ones(1)
    spec = LaunchSpec("kernel", source, (1, 1, 1), (1, 1, 1), (BufferArg("out", torch.float32, written=True),))
    Simulator().load([spec])[0]([out], (1, 1, 1))
    assert out.item() == 444
