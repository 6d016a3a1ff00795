// The simulator's version of cuda/approximate.cuh: rounded correctly, which is within 1 ulp too.
#pragma once

namespace fusewright {

__device__ __forceinline__ float approximate_reciprocal(float x) {
    const float r = 1 / x;
    return fabsf(r) < 0x1p-126f ? copysignf(0, x) : r;
}

}  // namespace fusewright
