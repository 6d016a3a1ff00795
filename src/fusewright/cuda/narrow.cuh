// Functions for operators whose results ATen rounds to 16 bits: the relative error is below 2^-17, half of a unit in the
// last place of those is at least 2^-12. They take half of the instructions of float's own functions, and no branch.
// Results below 2^-126 are 0.
#pragma once
#include "approximate.cuh"

namespace fusewright {
namespace narrow {

__device__ __forceinline__ float exp(float x) { return approximate_exp2(x * 1.44269504f); }

// Small arguments, where e^x - 1 cancels, have the first four terms of the series.
__device__ __forceinline__ float expm1(float x) {
    const float p = fmaf(x, fmaf(x, fmaf(x, 1.0f / 24.0f, 1.0f / 6.0f), 0.5f), 1.0f);
    return fabsf(x) < 0x1p-3f ? x * p : exp(x) - 1.0f;
}

// Of x that is at least 0, or NaN. Small arguments, where 1 + x loses them, have the first four terms of the series.
__device__ __forceinline__ float log1p(float x) {
    const float p = fmaf(x, fmaf(x, fmaf(x, -1.0f / 4.0f, 1.0f / 3.0f), -0.5f), 1.0f);
    return x < 0x1p-4f ? x * p : approximate_log2(1.0f + x) * 0.693147181f;
}

// Of b that is at least 1, or NaN.
__device__ __forceinline__ float reciprocal(float b) { return approximate_reciprocal(b); }
__device__ __forceinline__ float quotient(float a, float b) { return a * approximate_reciprocal(b); }

// Small arguments, where 1 - 2 / (1 + e^2x) cancels, have the first two terms of the series.
__device__ __forceinline__ float tanh(float x) {
    const float large = fmaf(-2.0f, reciprocal(1.0f + exp(2.0f * fabsf(x))), 1.0f);
    return fabsf(x) < 0x1p-4f ? fmaf(x * x * x, -1.0f / 3.0f, x) : copysignf(large, x);
}

// Where x is negative it is 2^p(-x), and never a difference, with a polynomial p that is fitted to the logarithm on
// [0, 5.75], the largest error least; beyond, the result is below 2^-27 and goes to 0 with the exact one.
__device__ __forceinline__ float normal_cdf(float x) {
    const float t = fabsf(x);
    float p = fmaf(t, -0x1.ea1586p-20f, 0x1.01b78cp-14f);
    p = fmaf(t, p, -0x1.e756cep-11f);
    p = fmaf(t, p, 0x1.16af04p-7f);
    p = fmaf(t, p, -0x1.ba002ap-5f);
    p = fmaf(t, p, -0x1.d5789ep-2f);
    p = fmaf(t, p, -0x1.26b854p+0f);
    p = fmaf(t, p, -0x1.ffff64p-1f);
    const float below = approximate_exp2(p);
    return x < 0.0f ? below : 1.0f - below;
}

}  // namespace narrow
}  // namespace fusewright
