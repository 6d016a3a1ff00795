// The simulator's version of cuda/sm90_ptx.cuh.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include "major.cuh"
#include "mma.cuh"
#include "vector.cuh"

namespace fusewright {

namespace simulator = ::fusewright_simulator;

struct alignas(64) TensorMap {
    unsigned char opaque[128];
};

__device__ __forceinline__ uint32_t shared_address(const void* p) { return simulator::shared_address(p); }

// ---- Clusters and registers -----------------------------------------------------------------------------------------

__device__ __forceinline__ uint32_t cluster_rank() { return simulator::cluster_rank(); }
__device__ __forceinline__ void cluster_sync() { simulator::cluster_sync(); }

template <int kCount> __device__ __forceinline__ void registers_release() { simulator::set_registers(kCount, false); }
template <int kCount> __device__ __forceinline__ void registers_acquire() { simulator::set_registers(kCount, true); }

// ---- mbarrier -------------------------------------------------------------------------------------------------------

__device__ __forceinline__ void mbarrier_init(uint64_t* barrier, uint32_t arrivals) {
    simulator::mbarrier_init(barrier, arrivals);
}
__device__ __forceinline__ void mbarrier_fence_init() { simulator::mbarrier_fence_init(); }
__device__ __forceinline__ void mbarrier_arrive_expect_tx(uint64_t* barrier, uint32_t bytes) {
    simulator::mbarrier_arrive(barrier, bytes, simulator::kOwnBlock);
}
__device__ __forceinline__ void mbarrier_arrive(uint64_t* barrier) {
    simulator::mbarrier_arrive(barrier, 0, simulator::kOwnBlock);
}
__device__ __forceinline__ void mbarrier_arrive_remote(uint64_t* barrier, uint32_t rank) {
    simulator::mbarrier_arrive(barrier, 0, rank);
}
__device__ __forceinline__ bool mbarrier_try_wait(uint64_t* barrier, uint32_t parity) {
    return simulator::mbarrier_wait(barrier, parity);
}
__device__ __forceinline__ bool mbarrier_test_wait(uint64_t* barrier, uint32_t parity) {
    return simulator::mbarrier_wait(barrier, parity);
}

__device__ __forceinline__ void store_async(void* destination, uint64_t* barrier, uint32_t rank, float4 values) {
    simulator::store_async(destination, barrier, rank, &values, sizeof values);
}

// ---- Bulk tensor copies ---------------------------------------------------------------------------------------------

__device__ __forceinline__ void fence_proxy_async() { simulator::fence_proxy_async(); }
__device__ __forceinline__ void tensor_map_prefetch(const TensorMap*) {}
__device__ __forceinline__ void tensor_load(void* destination, const TensorMap* map, uint64_t* barrier, int x, int y,
                                            int z) {
    const int at[] = {x, y, z};
    simulator::tensor_load(destination, map, barrier, at, 3, 0);
}
__device__ __forceinline__ void tensor_load_multicast(void* destination, const TensorMap* map, uint64_t* barrier, int x,
                                                      int y, int z, uint16_t blocks) {
    const int at[] = {x, y, z};
    simulator::tensor_load(destination, map, barrier, at, 3, blocks);
}
__device__ __forceinline__ void tensor_store(const TensorMap* map, const void* source, int x, int y, int z) {
    const int at[] = {x, y, z};
    simulator::tensor_store(map, source, at, 3);
}
__device__ __forceinline__ void tensor_store_commit() { simulator::tensor_store_commit(); }
template <int kPending> __device__ __forceinline__ void tensor_store_wait_read() {
    simulator::tensor_store_wait(kPending, true);
}
template <int kPending> __device__ __forceinline__ void tensor_store_wait() {
    simulator::tensor_store_wait(kPending, false);
}

// ---- Matrices between registers and shared memory: lanes exchange values, and each writes the row that it addresses ---

template <bool kTransposed>
__device__ __forceinline__ void matrix_store_rows(void* row, const uint32_t (&values)[4], FUSEWRIGHT_SITE) {
    const char* operation = kTransposed ? "stmatrix.trans" : "stmatrix";
    const unsigned lane = simulator::lane_index(), matrix = lane / 8, own = lane % 8;
    uint16_t elements[8];
    for (unsigned pair = 0; pair < 2; ++pair) {
        const uint64_t mine = uint64_t(values[2 * pair + 1]) << 32 | values[2 * pair];
        const auto& all = simulator::exchange(operation, ~0u, mine, FUSEWRIGHT_HERE);
        if (simulator::present(all) != ~0u)
            simulator::fail_undefined("executes stmatrix in a warp that some lanes have left");
        for (unsigned i = 0; matrix / 2 == pair && i < 8; ++i) {
            const unsigned y = kTransposed ? i : own, x = kTransposed ? own : i;  // row and column as held
            const uint64_t theirs = simulator::from_bits<uint64_t>(all, y * 4 + x / 2);
            elements[i] = static_cast<uint16_t>(theirs >> (matrix % 2 * 32 + x % 2 * 16));
        }
    }
    uint4 word;
    memcpy(&word, elements, 16);
    *static_cast<uint4*>(row) = word;
}
__device__ __forceinline__ void matrix_store(void* row, const uint32_t (&values)[4]) {
    matrix_store_rows<false>(row, values);
}
__device__ __forceinline__ void matrix_store_transposed(void* row, const uint32_t (&values)[4]) {
    matrix_store_rows<true>(row, values);
}

// ---- Warpgroup matrix products --------------------------------------------------------------------------------------

__device__ __forceinline__ void wgmma_fence() { simulator::wgmma_fence(); }
__device__ __forceinline__ void wgmma_commit() { simulator::wgmma_commit(); }
template <int kPending> __device__ __forceinline__ void wgmma_wait() { simulator::wgmma_wait(kPending); }

// Products write through pointers: the compiler knows.
template <int kCount> __device__ __forceinline__ void hold_registers(float (&)[kCount]) {}

template <class Element> constexpr const bool kIsFloat = kFactor<Element> == simulator::Factor::Tf32;

template <class Element, Major kMajorA, Major kMajorB, int kCount>
__device__ __forceinline__ void wgmma(float (&d)[kCount], uint64_t a, uint64_t b, bool accumulate) {
    static_assert(kCount % 16 == 0 && kCount <= 128, "32 to 256 columns");
    static_assert(!kIsFloat<Element> || (kMajorA == Major::K && kMajorB == Major::K));
    simulator::wgmma({d, nullptr, a, b, 2 * kCount, kFactor<Element>, kMajorA == Major::MN, kMajorB == Major::MN,
                      accumulate});
}
template <Major kMajorB, int kCount>
__device__ __forceinline__ void wgmma_registers(float (&d)[kCount], const uint32_t (&a)[4], uint64_t b,
                                                bool accumulate) {
    static_assert(kCount == 64 || kCount == 128, "128 or 256 columns");
    simulator::wgmma({d, a, 0, b, 2 * kCount, simulator::Factor::Half, false, kMajorB == Major::MN, accumulate});
}

}  // namespace fusewright
