// Division by what is at least 1, or NaN, without a branch: the compiler's own has a range check and a call, which keep it
// from interleaving what neighbouring values compute. Results are those of IEEE division, but those below 2^-126 may be
// rounded twice.
#pragma once
#include "approximate.cuh"

namespace fusewright {
namespace from_one {

constexpr float kLargest = 0x1.fffffep127f;

// 4 / b, which is never subnormal; 0 for infinity. quarter: b / 4, at most the largest number.
__device__ __forceinline__ float four_by(float b, float& quarter) {
    const float r = approximate_reciprocal(b * 0.25f);
    quarter = fminf(b * 0.25f, kLargest);  // infinity would make NaN of 0; NaN is in r
    return fmaf(r, fmaf(-quarter, r, 1.0f), r);  // Newton's step, as in the compiler's own division
}

__device__ __forceinline__ float reciprocal(float b) {
    float quarter;
    return four_by(b, quarter) * 0.25f;
}

// One correction by a correctly rounded reciprocal gives the correctly rounded quotient, if the remainder is exact. That of
// a small a would have bits below the last subnormal one, so a is scaled.
__device__ __forceinline__ float quotient(float a, float b) {
    float quarter;
    const float r = four_by(b, quarter);
    const bool small = fabsf(a) < 0x1p-64f;
    const float x = a * (small ? 0x1p62f : 0.25f);
    const float q = x * r;
    // The negated remainder keeps the sign of zero; it is NaN where q is infinite, and then must not matter.
    const float negated = fmaxf(fmaf(quarter, q, -x), -kLargest);
    const float corrected = fmaf(-negated, r, q);
    return small ? corrected * 0x1p-64f : corrected;
}

}  // namespace from_one
}  // namespace fusewright
