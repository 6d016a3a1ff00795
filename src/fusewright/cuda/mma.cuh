// Products of small tiles by one warp on the tensor cores (mma.sync): one instruction a function, and nothing else.
// The simulator has its own version of this file.
#pragma once
#include "vector.cuh"
#ifdef __CUDACC_RTC__
struct __half;  // declared is enough, and takes NVRTC no time
struct __nv_bfloat16;
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace fusewright {

// d += a · b: 16 × 8 += 16 × k · k × 8, where a row of a, and a column of b, is 32 bytes. Lane 4 · g + t holds 4-byte
// words (two 16-bit elements or a float): word t of rows g and g + 8 of a, then word t + 4 of both; words t and
// t + 4 of column g of b; and of d columns 2 · t, 2 · t + 1 of row g, then of row g + 8. Of floats the tensor cores
// read the upper 19 bits (TF32).
template <class Element>
__device__ __forceinline__ void multiply_tile(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

#define FUSEWRIGHT_MULTIPLY_TILE(ELEMENT, INSTRUCTION)                                                            \
    template <>                                                                                                  \
    __device__ __forceinline__ void multiply_tile<ELEMENT>(float (&d)[4], const uint32_t (&a)[4],                 \
                                                           const uint32_t (&b)[2]) {                             \
        asm volatile("mma.sync.aligned." INSTRUCTION                                                             \
                     ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                      \
                     : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                            \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));                        \
    }
FUSEWRIGHT_MULTIPLY_TILE(__half, "m16n8k16.row.col.f32.f16.f16")
FUSEWRIGHT_MULTIPLY_TILE(__nv_bfloat16, "m16n8k16.row.col.f32.bf16.bf16")
FUSEWRIGHT_MULTIPLY_TILE(float, "m16n8k8.row.col.f32.tf32.tf32")
#undef FUSEWRIGHT_MULTIPLY_TILE

}  // namespace fusewright
