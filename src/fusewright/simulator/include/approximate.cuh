// The simulator's version of cuda/approximate.cuh: away from zero, which is within 1 ulp, so that a correction that is
// missing shows.
#pragma once

namespace fusewright {

__device__ __forceinline__ float approximate_reciprocal(float x) {
    float r = 1 / x;
    if (fmaf(-r, x, 1.0f) > 0) r = nextafterf(r, copysignf(HUGE_VALF, x));
    return fabsf(r) < 0x1p-126f ? copysignf(0.0f, x) : r;
}

__device__ __forceinline__ float approximate_exp2(float x) {
    const float r = nextafterf(exp2f(x), HUGE_VALF);
    return r < 0x1p-126f ? 0.0f : r;
}

// As far off as it may be.
__device__ __forceinline__ float approximate_log2(float x) {
    if (fabsf(x) < 0x1p-126f) return -HUGE_VALF;
    const float r = log2f(x);
    return x > 0.5f && x < 2.0f ? r + 0x1p-22f : nextafterf(r, HUGE_VALF);
}

}  // namespace fusewright
