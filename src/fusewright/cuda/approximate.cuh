// The hardware's approximations: one instruction a function, and nothing else.
// The simulator has its own version of this file.
#pragma once

namespace fusewright {

// 1 / x within 1 ulp; 0 where that is subnormal.
__device__ __forceinline__ float approximate_reciprocal(float x) {
    float r;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
    return r;
}

// 2^x within 2 ulp; 0 where that is subnormal.
__device__ __forceinline__ float approximate_exp2(float x) {
    float r;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
    return r;
}

// log2(x) within 2^-22 where x is between 1/2 and 2, relatively elsewhere; of a subnormal -infinity, as of 0.
__device__ __forceinline__ float approximate_log2(float x) {
    float r;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
    return r;
}

}  // namespace fusewright
