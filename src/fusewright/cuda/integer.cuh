// Functions of integers where C++ has no operator with ATen's meaning, or one that is undefined for some operands.
#pragma once
#include "scalar.cuh"

namespace fusewright::integer {

// Division toward zero. Division by 0 has no result in ATen either, but must not trap where the host runs this code: it
// gives -1. The lowest number divided by -1 is itself.
template <class T> __device__ __forceinline__ T quotient(T a, T b) {
    if (T(-1) < T(0) && b == T(-1)) return T(uint64_t(0) - uint64_t(a));
    return b == T(0) ? T(-1) : T(a / b);
}

template <class T> __device__ __forceinline__ T remainder(T a, T b) {
    return b == T(0) || (T(-1) < T(0) && b == T(-1)) ? T(0) : T(a % b);
}

template <class T> __device__ __forceinline__ T greatest_divisor(T a, T b) {
    a = absolute(a), b = absolute(b);
    while (a != T(0)) {
        const T rest = remainder(b, a);
        b = a;
        a = rest;
    }
    return b;
}
template <class T> __device__ __forceinline__ T least_multiple(T a, T b) {
    const T divisor = greatest_divisor(a, b);
    return divisor == T(0) ? T(0) : T(absolute(quotient(a, divisor) * b));
}

// By a negative number or more bits than T has: to the left 0, to the right nothing but the sign.
template <class T> __device__ __forceinline__ T left_shift(T a, T bits) {
    return bits < T(0) || uint64_t(bits) >= sizeof(T) * 8 ? T(0) : T(uint64_t(a) << uint64_t(bits));
}
template <class T> __device__ __forceinline__ T right_shift(T a, T bits) {
    constexpr int kMost = int(sizeof(T)) * 8 - (T(-1) < T(0) ? 1 : 0);
    if (bits < T(0) || uint64_t(bits) >= uint64_t(kMost)) return T(-1) < T(0) && a < T(0) ? T(-1) : T(0);
    return T(a >> bits);
}

// By squaring; a negative exponent gives 1/a truncated, as in ATen.
template <class T> __device__ __forceinline__ T power(T base, T exponent) {
    if (exponent < T(0)) {
        if (base == T(1)) return T(1);
        if (base == T(-1)) return (exponent % T(2)) ? T(-1) : T(1);
        return T(0);
    }
    T result = T(1);
    for (; exponent; exponent /= T(2)) {
        if (exponent % T(2)) result *= base;
        base *= base;
    }
    return result;
}

}  // namespace fusewright::integer
