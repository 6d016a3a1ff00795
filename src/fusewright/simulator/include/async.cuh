// The simulator's version of cuda/async.cuh.
#pragma once
#include "vector.cuh"

namespace fusewright {

template <int Bytes> __device__ __forceinline__ void copy_async(void* shared, const void* global, int count = Bytes) {
    fusewright_simulator::async_copy(shared, global, Bytes, static_cast<unsigned>(count));
}
__device__ __forceinline__ void prefetch(const void*) {}
__device__ __forceinline__ void copy_async_commit() { fusewright_simulator::async_commit(); }
template <int Pending> __device__ __forceinline__ void copy_async_wait() { fusewright_simulator::async_wait(Pending); }

__device__ __forceinline__ void named_barrier_sync(int id, int threads, FUSEWRIGHT_SITE) {
    fusewright_simulator::barrier_sync(unsigned(id), unsigned(threads), false, FUSEWRIGHT_HERE);
}
__device__ __forceinline__ void named_barrier_arrive(int id, int threads, FUSEWRIGHT_SITE) {
    fusewright_simulator::barrier_arrive(unsigned(id), unsigned(threads), FUSEWRIGHT_HERE);
}

}  // namespace fusewright
