"""Tiny kernels that each show one of Hopper's instructions, and what runs them on the simulator or the GPU."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

import torch

from fusewright.chip import arch_of
from fusewright.codegen.launch import Arg, BufferArg, LaunchSpec, SizeArg, TensorMapArg
from fusewright.simulator.simulate import Simulator

# 1024-byte aligned shared memory, and mbarriers in front of it.
HEAD = """#include "mma.cuh"
#include "sm90.cuh"
using namespace fusewright;
__device__ __forceinline__ unsigned char* aligned() {
    extern __shared__ __align__(16) unsigned char dynamic[];
    return dynamic + (-shared_address(dynamic) & 1023);
}
// Words of an image into shared memory by ordinary writes, and back.
__device__ __forceinline__ void fill(unsigned char* to, const uint32_t* image, int64_t words) {
    for (int i = threadIdx.x; i < words; i += blockDim.x) reinterpret_cast<uint32_t*>(to)[i] = image[i];
}
__device__ __forceinline__ void dump(uint32_t* out, const unsigned char* from, int64_t words) {
    for (int i = threadIdx.x; i < words; i += blockDim.x) out[i] = reinterpret_cast<const uint32_t*>(from)[i];
}
"""

_PRODUCT = """
// d = (accumulate ? c : 0) + products of `steps` descriptors, one group a step, of which one may be in flight.
extern "C" __global__ void __launch_bounds__(128) NAME(const uint32_t* image, int64_t words, int64_t a, int64_t b,
    int64_t a_step, int64_t b_step, int64_t steps, int64_t accumulate, const float* c, float* d) {
    unsigned char* shared = aligned();
    fill(shared, image, words);
    fence_proxy_async();
    __syncthreads();
    float sums[SUMS];
    for (int i = 0; i < SUMS; ++i) sums[i] = c[threadIdx.x * SUMS + i];
    const uint64_t base = shared_address(shared) >> 4;
    for (int step = 0; step < steps; ++step) {
        hold_registers(sums);
        wgmma_fence();
        MULTIPLY
        wgmma_commit();
        wgmma_wait<1>();
    }
    wgmma_wait<0>();
    hold_registers(sums);
    for (int i = 0; i < SUMS; ++i) d[threadIdx.x * SUMS + i] = sums[i];
}
"""


def _product(name: str, element: str, a: str, b: str, sums: int) -> str:
    multiply = (
        f"wgmma<{element}, Major::{a}, Major::{b}>(sums, a + base + step * a_step, b + base + step * b_step, "
        "accumulate || step > 0);"
    )
    return _PRODUCT.replace("NAME", name).replace("SUMS", str(sums)).replace("MULTIPLY", multiply)


ELEMENTS = {torch.float16: "__half", torch.bfloat16: "__nv_bfloat16", torch.float32: "float"}

_REGISTERS = _PRODUCT.replace("NAME", "from_registers").replace("SUMS", "64").replace(
    "MULTIPLY",
    """const int row = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4, k = threadIdx.x % 4;
        uint32_t fragment[4];  // A lies in the image as it is, 64 rows of 8 words, where descriptor `a` would point
        for (int i = 0; i < 4; ++i)
            fragment[i] = reinterpret_cast<uint32_t*>(shared + a * 16)[(row + i % 2 * 8) * 8 + i / 2 * 4 + k];
        wgmma_fence();
        wgmma_registers<Major::K>(sums, fragment, b + base + step * b_step, accumulate || step > 0);
        wgmma_commit();
        wgmma_wait<0>();""",
)  # fmt: skip

# A block is a warp, and has a tile of c; a row of a, a column of b: 8 words a step.
_TILES = """
extern "C" __global__ void __launch_bounds__(32) NAME(const uint32_t* a, const uint32_t* b, int64_t columns,
                                                      int64_t steps, const float* c, float* d) {
    const int group = threadIdx.x / 4, t = threadIdx.x % 4;
    const int64_t row = blockIdx.x / (columns / 8) * 16 + group, column = blockIdx.x % (columns / 8) * 8;
    const int64_t first = row * columns + column + 2 * t;
    float sums[4];
    for (int i = 0; i < 4; ++i) sums[i] = c[first + i / 2 * 8 * columns + i % 2];
    for (int step = 0; step < steps; ++step) {
        const uint32_t *upper = a + (row * steps + step) * 8 + t, *lower = upper + 8 * steps * 8;
        const uint32_t* other = b + ((column + group) * steps + step) * 8 + t;
        const uint32_t rows[4] = {upper[0], lower[0], upper[4], lower[4]}, line[2] = {other[0], other[4]};
        multiply_tile<ELEMENT>(sums, rows, line);
    }
    for (int i = 0; i < 4; ++i) d[first + i / 2 * 8 * columns + i % 2] = sums[i];
}
"""

_OTHERS = """
// One box to shared memory, which is shown as it lies there.
extern "C" __global__ void load(const __grid_constant__ TensorMap map, int64_t x, int64_t y, int64_t z, int64_t bytes,
                                uint32_t* out) {
    __shared__ uint64_t barrier;
    unsigned char* shared = aligned();
    if (threadIdx.x == 0) {
        mbarrier_init(&barrier, 1);
        mbarrier_fence_init();
        tensor_map_prefetch(&map);
        mbarrier_arrive_expect_tx(&barrier, uint32_t(bytes));
        tensor_load(shared, &map, &barrier, x, y, z);
    }
    __syncthreads();
    mbarrier_wait(&barrier, 0);
    dump(out, shared, bytes / 4);
}

// Stores a box, waits until it has been read, overwrites it, and stores that beside it.
extern "C" __global__ void store(const __grid_constant__ TensorMap map, const uint32_t* image, int64_t words,
                                 int64_t x, int64_t y, int64_t z, int64_t beside) {
    unsigned char* shared = aligned();
    for (int turn = 0; turn < 2; ++turn) {
        fill(shared, image + turn * words, words);
        fence_proxy_async();
        __syncthreads();
        if (threadIdx.x == 0) {
            tensor_store(&map, shared, x, y + turn * beside, z);
            tensor_store_commit();
            if (turn == 0) tensor_store_wait_read<0>();
            else tensor_store_wait<0>();
        }
        __syncthreads();
    }
}

// Each block of a cluster of two loads one box and sends it to both.
extern "C" __global__ void multicast(const __grid_constant__ TensorMap map, int64_t bytes, uint32_t* out) {
    __shared__ uint64_t barrier;
    unsigned char* shared = aligned();
    const int rank = cluster_rank();
    if (threadIdx.x == 0) {
        mbarrier_init(&barrier, 1);
        mbarrier_fence_init();
    }
    cluster_sync();
    if (threadIdx.x == 0) {
        mbarrier_arrive_expect_tx(&barrier, uint32_t(2 * bytes));
        tensor_load_multicast(shared + rank * bytes, &map, &barrier, 0, 8 * rank, int(blockIdx.x / 2), 3);
    }
    mbarrier_wait(&barrier, 0);
    dump(out + blockIdx.x * (2 * bytes / 4), shared, 2 * bytes / 4);
    cluster_sync();
}

// Each thread's values through stmatrix, plain and transposed, with rows 48 bytes apart.
extern "C" __global__ void matrices(const uint32_t* values, uint32_t* out) {
    __shared__ __align__(16) unsigned char tile[2][32 * 48];
    const int lane = threadIdx.x;
    for (int i = lane; i < 2 * 32 * 12; i += 32) reinterpret_cast<uint32_t*>(tile)[i] = 0;
    __syncwarp();
    uint32_t mine[4];
    for (int i = 0; i < 4; ++i) mine[i] = values[lane * 4 + i];
    matrix_store(tile[0] + lane * 48, mine);
    matrix_store_transposed(tile[1] + lane * 48, mine);
    __syncwarp();
    dump(out, tile[0], 2 * 32 * 12);
}

// What test_wait says of both parities as arrivals and bytes come.
extern "C" __global__ void phases(const __grid_constant__ TensorMap map, int64_t bytes, int* out) {
    __shared__ uint64_t barrier;
    unsigned char* shared = aligned();
    int at = 0;
    auto note = [&] {
        for (int parity = 0; parity < 2; ++parity) out[at++] = mbarrier_test_wait(&barrier, parity);
    };
    mbarrier_init(&barrier, 2);
    mbarrier_fence_init();
    note();
    mbarrier_arrive(&barrier);
    note();
    mbarrier_arrive(&barrier);  // completes phase 0
    note();
    mbarrier_arrive_expect_tx(&barrier, uint32_t(bytes));
    mbarrier_arrive(&barrier);
    tensor_load(shared, &map, &barrier, 0, 0, 0);
    mbarrier_wait(&barrier, 1);
    note();
    mbarrier_arrive_expect_tx(&barrier, uint32_t(2 * bytes));
    tensor_load(shared, &map, &barrier, 0, 0, 0);
    tensor_load(shared + bytes, &map, &barrier, 0, 0, 0);
    note();  // an arrival is missing, whether the bytes are there or not
    mbarrier_arrive(&barrier);
    mbarrier_wait(&barrier, 0);
    note();
}

// Every block of a cluster waits for one arrival of each of the others.
extern "C" __global__ void remote(int64_t blocks, int* out) {
    __shared__ uint64_t barrier;
    if (threadIdx.x == 0) {
        mbarrier_init(&barrier, uint32_t(blocks));
        mbarrier_fence_init();
    }
    cluster_sync();
    if (threadIdx.x < blocks) mbarrier_arrive_remote(&barrier, threadIdx.x);
    mbarrier_wait(&barrier, 0);
    if (threadIdx.x == 0) out[blockIdx.x] = 1 + int(cluster_rank());
    cluster_sync();
}

// Every block of a cluster stores a line for each of the others, and for itself, in theirs.
extern "C" __global__ void stores_remote(int64_t blocks, const float* values, float* out) {
    __shared__ uint64_t barrier;
    unsigned char* shared = aligned();
    const int rank = int(cluster_rank()), size = blockDim.x * 16;
    if (threadIdx.x == 0) {
        mbarrier_init(&barrier, 1);
        mbarrier_fence_init();
        mbarrier_arrive_expect_tx(&barrier, uint32_t(blocks * size));
    }
    cluster_sync();
    for (int other = 0; other < blocks; ++other)
        store_async(shared + rank * size + threadIdx.x * 16, &barrier, other,
                    reinterpret_cast<const float4*>(values)[(blockIdx.x * blocks + other) * blockDim.x + threadIdx.x]);
    mbarrier_wait(&barrier, 0);
    dump(reinterpret_cast<uint32_t*>(out) + blockIdx.x * blocks * size / 4, shared, blocks * size / 4);
    cluster_sync();
}

// One warpgroup gives registers, the other two take them; all do some work.
extern "C" __global__ void __launch_bounds__(384, 1) registers(int* out) {
    if (threadIdx.x < 128) registers_release<40>();
    else registers_acquire<232>();
    out[threadIdx.x] = threadIdx.x;
}
"""

SOURCE = (
    HEAD
    + _product("half_k_k", "__half", "K", "K", 64)
    + _product("half_k_mn", "__half", "K", "MN", 64)
    + _product("half_mn_k", "__half", "MN", "K", 64)
    + _product("half_mn_mn", "__half", "MN", "MN", 64)
    + _product("bfloat16_k_k", "__nv_bfloat16", "K", "K", 128)
    + _product("float_k_k", "float", "K", "K", 64)
    + _REGISTERS
    + "".join(_TILES.replace("NAME", f"tiles_of_{e.strip('_')}").replace("ELEMENT", e) for e in ELEMENTS.values())
    + _OTHERS
)
SHARED_BYTES = 80 * 1024


def map_of(x: torch.Tensor, box: tuple[int, int, int], swizzle: int = 0, written: bool = False) -> TensorMapArg:
    """The map of a tensor of three dimensions, with unit stride along the last."""
    strides = x.stride(1), x.stride(0)
    return TensorMapArg("x", x.dtype, tuple(reversed(x.shape)), strides, box, swizzle, written=written)


def _launches() -> dict[str, LaunchSpec]:
    """A launch of every kernel: the simulator compiles them together."""
    found = {}
    for name, parameters in re.findall(r'extern "C" __global__ void (?:__\w+\([^)]*\) )?(\w+)\(([^)]*)\)', SOURCE):
        args: list[Arg] = []
        for parameter in parameters.split(","):
            if "TensorMap" in parameter:
                args.append(TensorMapArg("x", torch.float16, (8, 8, 8), (8, 64), (8, 8, 1), 0, written=True))
            elif "*" in parameter:
                args.append(BufferArg(parameter.split()[-1], torch.int32, written=True))
            else:
                args.append(SizeArg(0))
        found[name] = LaunchSpec(name, SOURCE, (1, 1, 1), (1, 1, 1), tuple(args), SHARED_BYTES)
    return found


Value = torch.Tensor | int | tuple[TensorMapArg, torch.Tensor]


def _argument(arg: Arg, value: Value) -> Arg:
    """The argument as it is with this value: a map comes with it, and many kernels take words of any dtype."""
    if isinstance(value, tuple):
        return value[0]
    return replace(arg, dtype=value.dtype) if isinstance(value, torch.Tensor) else arg


def run(kernel: str, threads: int, arguments: Sequence[Value], grid: int = 1, cluster: int = 1) -> None:
    """Runs a kernel of SOURCE where its tensors are; a map comes with its tensor."""
    launches = _launches()
    spec = launches[kernel]
    args = tuple(_argument(arg, value) for arg, value in zip(spec.args, arguments, strict=True))
    launches[kernel] = spec = replace(spec, args=args, block=(threads, 1, 1), cluster=(cluster, 1, 1))
    values = [a[1] if isinstance(a, tuple) else a for a in arguments]
    if all(isinstance(v, int) or v.device.type == "cpu" for v in values):
        kernels = dict(zip(launches, Simulator().load(list(launches.values())), strict=True))
        kernels[kernel](values, (grid, 1, 1))
    else:
        run_on_gpu(spec, values, (grid, 1, 1))


def run_on_gpu(spec: LaunchSpec, values: Sequence[torch.Tensor | int], grid: tuple[int, int, int]) -> None:
    from fusewright.runtime import driver
    from fusewright.runtime.nvrtc import cached_cubin

    kernel = driver.load(cached_cubin(spec.source, arch_of(torch.cuda.get_device_capability())), spec)
    passed = []
    for arg, value in zip(spec.args, values, strict=True):
        address = value if isinstance(value, int) else value.data_ptr()
        passed.append(driver.tensor_map_encoder(arg)(address) if isinstance(arg, TensorMapArg) else address)
    kernel.launch(passed, grid, torch.cuda.current_device())
