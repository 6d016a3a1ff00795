// The simulator's version of cuda/launch.cuh: launches follow one another; that what the one before may write is not
// touched before the wait, is checked.
#pragma once

namespace fusewright {

__device__ __forceinline__ void launch_before_wait() { fusewright_simulator::launch_before_wait(); }
__device__ __forceinline__ void launch_after_begin() {}

}  // namespace fusewright
