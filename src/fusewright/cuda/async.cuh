// Asynchronous copies to shared memory (cp.async) and named barriers: one instruction a function, and nothing else.
// The simulator has its own version of this file.
#pragma once
#include "vector.cuh"

namespace fusewright {

// Starts to copy Bytes (4, 8 or 16) to shared memory, both sides aligned to them. Only the first `count` are read; the
// others arrive as zeros.
template <int Bytes> __device__ __forceinline__ void copy_async(void* shared, const void* global, int count = Bytes) {
    const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
    if constexpr (Bytes == 16)  // past the L1 cache: only this size can
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(global), "r"(count) : "memory");
    else
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(address), "l"(global), "n"(Bytes), "r"(count)
                     : "memory");
}

// Starts to bring the line of memory at p to the L2 cache.
__device__ __forceinline__ void prefetch(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

// Closes the group of this thread's copies since the last one.
__device__ __forceinline__ void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most the Pending latest groups of this thread are unfinished. Other threads see the copied bytes after
// a barrier that follows.
template <int Pending> __device__ __forceinline__ void copy_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
}

// Waits until `threads` threads (whole warps) of the block have arrived at barrier `id` (1 to 15; 0 is __syncthreads').
__device__ __forceinline__ void named_barrier_sync(int id, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Arrives there for those who wait, and goes on.
__device__ __forceinline__ void named_barrier_arrive(int id, int threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

}  // namespace fusewright
