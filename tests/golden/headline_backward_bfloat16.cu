#include <cuda_bf16.h>
#include "column_sum.cuh"
#include "scalar.cuh"
#include "launch.cuh"

struct Epilogue {
    static constexpr int kColumnSums = 1;
    const uint8_t* __restrict__ x3;
    const __nv_bfloat16* __restrict__ x4;
    __nv_bfloat16* __restrict__ t1;
    __nv_bfloat16* __restrict__ out2;

    template <int V>
    __device__ __forceinline__ void operator()(int64_t m, int64_t n, int count, float (&sums)[kColumnSums][V]) const {
        bool x3_v[V];
        fusewright::load_bits(x3_v, x3 + m * 9, n, count);
        __nv_bfloat16 x4_v[V];
        fusewright::load_vector(x4_v, x4 + m * 72 + n, count);
        __nv_bfloat16 result0[V];
#pragma unroll
        for (int i = 0; i < V; ++i) {
            const float v0 = float(x4_v[i]);
            const float v1 = v0 * 0.1f;
            const float v2 = x3_v[i] ? v0 : v1;  // leaky_relu_backward
            const float v3 = v2 * 2.0f;  // mul
            const __nv_bfloat16 v4 = __nv_bfloat16(v3);
            result0[i] = v4;
            if (i < count) sums[0][i] += v3;
        }
        fusewright::store_vector(t1 + m * 72 + n, result0, count);
    }

    template <int V>
    __device__ __forceinline__ void finish(int64_t split, int64_t n, int count, const float (&sums)[kColumnSums][V]) const {
        __nv_bfloat16 rounded0[V];
#pragma unroll
        for (int i = 0; i < V; ++i) rounded0[i] = __nv_bfloat16(sums[0][i]);
        fusewright::store(out2 + n, 1, rounded0, count);
    }
};

using Kernel = fusewright::ColumnSum<Epilogue, 256, 8, float>;

// leaky_relu_backward, mul, sum
extern "C" __global__ void __launch_bounds__(Kernel::kThreads)
fused_leaky_relu_backward_mul_sum(int64_t rows, int64_t cols, int64_t rows_per_split,
    const uint8_t* __restrict__ x3, const __nv_bfloat16* __restrict__ x4, __nv_bfloat16* __restrict__ t1,
    __nv_bfloat16* __restrict__ out2) {
    fusewright::launch_before_wait();
    Kernel::run(rows, cols, rows_per_split, Epilogue{x3, x4, t1, out2});
}


#include <cuda_bf16.h>
#include "gemm_simt.cuh"
#include "scalar.cuh"
#include "launch.cuh"

struct Epilogue {
    __nv_bfloat16* __restrict__ out;

    template <int V>
    __device__ __forceinline__ void operator()(int64_t m, int64_t n, int count, const float (&accumulator)[V]) const {
        __nv_bfloat16 result0[V];
#pragma unroll
        for (int i = 0; i < V; ++i) {
            const __nv_bfloat16 v0 = __nv_bfloat16(accumulator[i]);
            result0[i] = v0;
        }
        fusewright::store_vector(out + m * 64 + n, result0, count);
    }
};

using Gemm = fusewright::GemmSimt<__nv_bfloat16, float, 32, 32, 16, fusewright::Major::K, fusewright::Major::MN,
    true, 4, 4, /*Whole*/false, /*Unroll*/16>;

// mm
extern "C" __global__ void __launch_bounds__(Gemm::kThreads, Gemm::kBlocksPerMultiprocessor)
fused_mm(const __nv_bfloat16* __restrict__ a, int64_t a_row_stride, int64_t a_k_stride,
    const __nv_bfloat16* __restrict__ b, int64_t b_k_stride, int64_t b_col_stride, int64_t M, int64_t N,
    int64_t K, __nv_bfloat16* __restrict__ out) {
    fusewright::launch_before_wait();
    Gemm::run(a, a_row_stride, a_k_stride, b, b_k_stride, b_col_stride, M, N, K, Epilogue{out});
}


#include <cuda_bf16.h>
#include "gemm_simt.cuh"
#include "scalar.cuh"
#include "launch.cuh"

struct Epilogue {
    __nv_bfloat16* __restrict__ out1;

    template <int V>
    __device__ __forceinline__ void operator()(int64_t m, int64_t n, int count, const float (&accumulator)[V]) const {
        __nv_bfloat16 result0[V];
#pragma unroll
        for (int i = 0; i < V; ++i) {
            const __nv_bfloat16 v0 = __nv_bfloat16(accumulator[i]);
            result0[i] = v0;
        }
        fusewright::store_vector(out1 + m * 64 + n, result0, count);
    }
};

using Gemm = fusewright::GemmSimt<__nv_bfloat16, float, 32, 32, 16, fusewright::Major::MN, fusewright::Major::MN,
    true, 4, 4, /*Whole*/false, /*Unroll*/16>;

// mm
extern "C" __global__ void __launch_bounds__(Gemm::kThreads, Gemm::kBlocksPerMultiprocessor)
fused_mm_2(const __nv_bfloat16* __restrict__ a, int64_t a_row_stride, int64_t a_k_stride,
    const __nv_bfloat16* __restrict__ b, int64_t b_k_stride, int64_t b_col_stride, int64_t M, int64_t N,
    int64_t K, __nv_bfloat16* __restrict__ out1) {
    fusewright::launch_before_wait();
    Gemm::run(a, a_row_stride, a_k_stride, b, b_k_stride, b_col_stride, M, N, K, Epilogue{out1});
}
