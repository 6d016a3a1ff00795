#include <cuda_bf16.h>
#include "gemm_simt.cuh"
#include "scalar.cuh"
#include "launch.cuh"

struct Epilogue {
    const __nv_bfloat16* __restrict__ x3;
    __nv_bfloat16* __restrict__ out;
    uint8_t* __restrict__ mask;

    template <int V>
    __device__ __forceinline__ void operator()(int64_t m, int64_t n, int count, const float (&accumulator)[V]) const {
        __nv_bfloat16 x3_v[V];
        fusewright::load_vector(x3_v, x3 + n, count);
        __nv_bfloat16 result0[V];
        bool result1[V];
#pragma unroll
        for (int i = 0; i < V; ++i) {
            const float v0 = float(x3_v[i]);
            const float v1 = accumulator[i] + v0;  // addmm
            const float v2 = v1 * 2.0f;  // mul
            const bool v3 = v2 > 0.0f;
            const float v4 = v2 * 0.1f;
            const float v5 = v3 ? v2 : v4;  // leaky_relu
            const __nv_bfloat16 v6 = __nv_bfloat16(v5);
            result0[i] = v6;
            result1[i] = v3;
        }
        fusewright::store_vector(out + m * 72 + n, result0, count);
        fusewright::store_bits(mask + m * 9, n, result1, count);
    }
};

using Gemm = fusewright::GemmSimt<__nv_bfloat16, float, 32, 32, 16, fusewright::Major::K, fusewright::Major::K,
    true, 4, 4, /*Whole*/false, /*Unroll*/16>;

// addmm, mul, leaky_relu
extern "C" __global__ void __launch_bounds__(Gemm::kThreads, Gemm::kBlocksPerMultiprocessor)
fused_addmm_mul_leaky_relu(const __nv_bfloat16* __restrict__ a, int64_t a_row_stride, int64_t a_k_stride,
    const __nv_bfloat16* __restrict__ b, int64_t b_k_stride, int64_t b_col_stride, int64_t M, int64_t N,
    int64_t K, const __nv_bfloat16* __restrict__ x3, __nv_bfloat16* __restrict__ out,
    uint8_t* __restrict__ mask) {
    fusewright::launch_before_wait();
    Gemm::run(a, a_row_stride, a_k_stride, b, b_k_stride, b_col_stride, M, N, K, Epilogue{x3, out, mask});
}
