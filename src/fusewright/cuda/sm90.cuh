// What Hopper's kernels share above its single instructions (sm90_ptx.cuh).
#pragma once
#include "sm90_ptx.cuh"

namespace fusewright {

__device__ __forceinline__ void mbarrier_wait(uint64_t* barrier, uint32_t parity) {
#ifdef FUSEWRIGHT_SPIN_LIMIT  // a debugging build: a deadlock becomes an error that says where
    for (long spins = 0; !mbarrier_try_wait(barrier, parity); ++spins) {
        if (spins > FUSEWRIGHT_SPIN_LIMIT) {
            printf("block %d thread %d: barrier at %u, parity %u never completes\n", blockIdx.x, threadIdx.x,
                   shared_address(barrier), parity);
            __trap();
        }
    }
#else
    while (!mbarrier_try_wait(barrier, parity)) {
    }
#endif
}

// Describes an operand in shared memory, in panels of 64 rows of 128 bytes, 128-byte swizzled, 1024-byte aligned.
// K-major: a row is 64 k of one m (n); the next 64 m (n) follow as the next panel.
// MN-major: a row is 64 m (n) of one k; the next 64 m (n) are the next panel, `panel` bytes on.
// Both step 1024 bytes from 8 rows to the next 8.
__device__ __forceinline__ uint64_t matrix_descriptor(const void* operand, uint32_t panel) {
    constexpr uint64_t kSwizzle128 = uint64_t(1) << 62;
    constexpr uint64_t kStride = uint64_t(1024 >> 4) << 32;
    return kSwizzle128 | kStride | uint64_t(panel >> 4) << 16 | (shared_address(operand) & 0x3ffff) >> 4;
}

// Registers have no index: a loop that is to stay short has its numbers go round instead, kCount at each turn.
template <int kCount, int kAll> __device__ __forceinline__ void turn_round(float (&x)[kAll]) {
    float first[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) first[i] = x[i];
#pragma unroll
    for (int i = kCount; i < kAll; ++i) x[i - kCount] = x[i];
#pragma unroll
    for (int i = 0; i < kCount; ++i) x[kAll - kCount + i] = first[i];
}

}  // namespace fusewright
