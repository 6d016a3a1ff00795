// Host stand-ins for what NVRTC has built in: a generated .cu and the .cuh files that it includes compile unchanged
// after this header. Vector types, __half and __nv_bfloat16 come from CUDA's own headers, as host code.
#pragma once
#include <cassert>
#include <math.h>  // not <cmath>: its overloads make fma, sqrt and exp of floats float functions, as they are in CUDA

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <type_traits>
#include <utility>

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <vector_functions.h>
#include <vector_types.h>

#include "api.hpp"

#undef __global__
#undef __device__
#undef __host__
#undef __shared__
#undef __constant__
#undef __grid_constant__
#undef __launch_bounds__
#undef __forceinline__
#undef __noinline__
#undef __align__
#define __global__ __attribute__((noinline))
#define __device__
#define __host__
#define __constant__
#define __grid_constant__
#define __launch_bounds__(...)
#define __forceinline__ inline __attribute__((always_inline))
#define __align__(n) __attribute__((aligned(n)))
// One instance for each OS thread, which runs one block at a time; legal with `extern` and within functions alike.
#define __shared__ thread_local

#define __CUDACC__ 1
#define __CUDA_ARCH__ FUSEWRIGHT_ARCH

// "used": a debugger calls them.
#define FUSEWRIGHT_COORDINATES __attribute__((used)) __forceinline__ dim3
namespace fusewright_simulator {
FUSEWRIGHT_COORDINATES thread_coordinates() { return dim3(thread_index(0), thread_index(1), thread_index(2)); }
FUSEWRIGHT_COORDINATES block_coordinates() { return dim3(block_index(0), block_index(1), block_index(2)); }
FUSEWRIGHT_COORDINATES block_extents() { return dim3(block_extent(0), block_extent(1), block_extent(2)); }
FUSEWRIGHT_COORDINATES grid_extents() { return dim3(grid_extent(0), grid_extent(1), grid_extent(2)); }
}  // namespace fusewright_simulator
#define threadIdx (::fusewright_simulator::thread_coordinates())
#define blockIdx (::fusewright_simulator::block_coordinates())
#define blockDim (::fusewright_simulator::block_extents())
#define gridDim (::fusewright_simulator::grid_extents())
#define warpSize 32

// Code of the simulator itself: accesses in it are not the kernel's.
#define FUSEWRIGHT_UNCHECKED __attribute__((no_sanitize("thread"), noinline))

#undef assert
#define assert(condition) \
    ((condition) ? void(0) : ::fusewright_simulator::fail_trap("fails the assertion " #condition))
__forceinline__ void __trap() { fusewright_simulator::fail_trap("executes __trap()"); }

// -fstack-protector: a function that returns finds what lies beside its local arrays overwritten.
extern "C" [[noreturn]] __attribute__((visibility("hidden"), used, noinline)) void __stack_chk_fail() {
    fusewright_simulator::fail_local_overrun(__builtin_return_address(0));
}

namespace fusewright_simulator {

// The arguments of __launch_bounds__: threads, blocks.
struct LaunchBounds {
    unsigned data[2];
};
constexpr LaunchBounds launch_bounds(long threads, long blocks = 0, long = 0) {
    return {{static_cast<unsigned>(threads), static_cast<unsigned>(blocks)}};
}

// Calls a kernel with arguments given by address, as the CUDA driver's launch does.
template <class... Parameters> struct Entry {
    static constexpr unsigned kSizes[] = {sizeof...(Parameters), sizeof(Parameters)...};

    template <size_t... I>
    FUSEWRIGHT_UNCHECKED static void call(void (*kernel)(Parameters...), void* const* arguments,
                                                            std::index_sequence<I...>) {
        kernel(*static_cast<std::remove_reference_t<Parameters>*>(arguments[I])...);
    }
};
template <class... Parameters> Entry<Parameters...> entry_of(void (*)(Parameters...));
template <class... Parameters>
FUSEWRIGHT_UNCHECKED void call(void (*kernel)(Parameters...), void* const* arguments) {
    Entry<Parameters...>::call(kernel, arguments, std::index_sequence_for<Parameters...>());
}

}  // namespace fusewright_simulator

#include "atomic.hpp"
#include "intrinsics.hpp"
#include "warp.hpp"
