// Scalar functions that generated code calls where C++ has no operator with ATen's meaning.
#pragma once

namespace fusewright {

template <class T> __device__ __forceinline__ T infinity();
template <> __device__ __forceinline__ float infinity<float>() { return __int_as_float(0x7f800000); }
template <> __device__ __forceinline__ double infinity<double>() { return __longlong_as_double(0x7ff0000000000000); }

// NaN in either operand gives NaN, unlike fmin and fmax.
template <class T> __device__ __forceinline__ T minimum(T a, T b) { return (a < b || a != a) ? a : b; }
template <class T> __device__ __forceinline__ T maximum(T a, T b) { return (a > b || a != a) ? a : b; }

// Keeps NaN; |-0| is 0.
__device__ __forceinline__ float absolute(float x) { return fabsf(x); }
__device__ __forceinline__ double absolute(double x) { return fabs(x); }
template <class T> __device__ __forceinline__ T absolute(T x) { return x < T(0) ? T(-x) : x; }

// The standard normal distribution's.
template <class T> __device__ __forceinline__ T normal_cdf(T x) {
    return T(0.5) * (T(1) + erf(x * T(0.70710678118654752440)));
}

// NaN gives 0, as in ATen.
template <class T> __device__ __forceinline__ T sign(T x) { return T((T(0) < x) - (x < T(0))); }

__device__ __forceinline__ bool bitwise_not(bool x) { return !x; }
template <class T> __device__ __forceinline__ T bitwise_not(T x) { return T(~x); }

}  // namespace fusewright
