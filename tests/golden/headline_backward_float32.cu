#include "column_sum.cuh"
#include "scalar.cuh"
#include "launch.cuh"

struct Epilogue {
    static constexpr int kColumnSums = 1;
    const uint8_t* __restrict__ x3;
    const float* __restrict__ x4;
    float* __restrict__ t1;
    float* __restrict__ out2;

    template <int V>
    __device__ __forceinline__ void operator()(int64_t m, int64_t n, int count, float (&sums)[kColumnSums][V]) const {
        bool x3_v[V];
        fusewright::load_bits(x3_v, x3 + m * 9, n, count);
        float x4_v[V];
        fusewright::load_vector(x4_v, x4 + m * 72 + n, count);
        float result0[V];
#pragma unroll
        for (int i = 0; i < V; ++i) {
            const float v0 = x4_v[i] * 0.1f;
            const float v1 = x3_v[i] ? x4_v[i] : v0;  // leaky_relu_backward
            const float v2 = v1 * 2.0f;  // mul
            result0[i] = v2;
            if (i < count) sums[0][i] += v2;
        }
        fusewright::store_vector(t1 + m * 72 + n, result0, count);
    }

    template <int V>
    __device__ __forceinline__ void finish(int64_t split, int64_t n, int count, const float (&sums)[kColumnSums][V]) const {
        fusewright::store(out2 + n, 1, sums[0], count);
    }
};

using Kernel = fusewright::ColumnSum<Epilogue, 256, 4, float>;

// leaky_relu_backward, mul, sum
extern "C" __global__ void __launch_bounds__(Kernel::kThreads)
fused_leaky_relu_backward_mul_sum(int64_t rows, int64_t cols, int64_t rows_per_split,
    const uint8_t* __restrict__ x3, const float* __restrict__ x4, float* __restrict__ t1,
    float* __restrict__ out2) {
    fusewright::launch_before_wait();
    Kernel::run(rows, cols, rows_per_split, Epilogue{x3, x4, t1, out2});
}


#include "gemm_simt.cuh"
#include "scalar.cuh"
#include "launch.cuh"

struct Epilogue {
    float* __restrict__ out;

    template <int V>
    __device__ __forceinline__ void operator()(int64_t m, int64_t n, int count, const float (&accumulator)[V]) const {
        float result0[V];
#pragma unroll
        for (int i = 0; i < V; ++i) {
            result0[i] = accumulator[i];
        }
        fusewright::store_vector(out + m * 64 + n, result0, count);
    }
};

using Gemm = fusewright::GemmSimt<float, float, 32, 32, 16, fusewright::Major::K, fusewright::Major::MN,
    true, 4, 4, /*Whole*/false, /*Unroll*/16>;

// mm
extern "C" __global__ void __launch_bounds__(Gemm::kThreads, Gemm::kBlocksPerMultiprocessor)
fused_mm(const float* __restrict__ a, int64_t a_row_stride, int64_t a_k_stride, const float* __restrict__ b,
    int64_t b_k_stride, int64_t b_col_stride, int64_t M, int64_t N, int64_t K, float* __restrict__ out) {
    fusewright::launch_before_wait();
    Gemm::run(a, a_row_stride, a_k_stride, b, b_k_stride, b_col_stride, M, N, K, Epilogue{out});
}


#include "gemm_simt.cuh"
#include "scalar.cuh"
#include "launch.cuh"

struct Epilogue {
    float* __restrict__ out1;

    template <int V>
    __device__ __forceinline__ void operator()(int64_t m, int64_t n, int count, const float (&accumulator)[V]) const {
        float result0[V];
#pragma unroll
        for (int i = 0; i < V; ++i) {
            result0[i] = accumulator[i];
        }
        fusewright::store_vector(out1 + m * 64 + n, result0, count);
    }
};

using Gemm = fusewright::GemmSimt<float, float, 32, 32, 16, fusewright::Major::MN, fusewright::Major::MN,
    true, 4, 4, /*Whole*/false, /*Unroll*/16>;

// mm
extern "C" __global__ void __launch_bounds__(Gemm::kThreads, Gemm::kBlocksPerMultiprocessor)
fused_mm_2(const float* __restrict__ a, int64_t a_row_stride, int64_t a_k_stride, const float* __restrict__ b,
    int64_t b_k_stride, int64_t b_col_stride, int64_t M, int64_t N, int64_t K, float* __restrict__ out1) {
    fusewright::launch_before_wait();
    Gemm::run(a, a_row_stride, a_k_stride, b, b_k_stride, b_col_stride, M, N, K, Epilogue{out1});
}
