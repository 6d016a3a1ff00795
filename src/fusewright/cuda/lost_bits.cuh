// Whether a product of fp16 halves (split_f16.cuh) lost bits that no magnitude of a row or column tells of.
//
// Below 2^-14 (scaled) the halves keep fewer than 22 bits of an operand: they round to 2^-36. That is lost among the
// products of larger operands, unless each large one meets a small one. Then all sums of a row (or of a column, as far
// as a warp sees it) are small beside what such roundings, multiplied by the largest operands, may add up to. A warp
// with such a row or column says so, and the patch computes the tile again. Zeros are taken for what they seem.
#pragma once
#include "sm90.cuh"
#include "split_f16.cuh"

namespace fusewright {

// Looks at a warp's sums as wgmma leaves them: of kBlocksM blocks, 64 rows apart, 16 rows and 2 · kSums columns each.
template <int kBlocksM, int kSums> struct LostBits {
    const SplitOperand &a, &b;
    const int64_t M, N, K;

    // All lanes call it and are told the same. m, n: the first row and column. slab: 2 KB of shared memory for the warp
    // alone, where magnitudes may lie: they are read first. Each look is for fewer warps and takes longer than the one
    // before: the smallest sum beside the largest that operands can be (of normal data one warp in thirty goes on,
    // fewer where lines have their own exponents), beside the largest that they are (one in five hundred), and all by line.
    __device__ __forceinline__ bool found(float (&sums)[kBlocksM][kSums], float* slab, int m, int n) const {
        float smallest = 0x1p126f;  // but for zeros
#pragma unroll
        for (int block = 0; block < kBlocksM; ++block)
#pragma unroll
            for (int i = 0; i < kSums; ++i)
                smallest = fminf(smallest, sums[block][i] != 0 ? fabsf(sums[block][i]) : 0x1p126f);
        if (!__any_sync(~0u, lossy(smallest, 0x1p16f, 0x1p16f))) return false;
        float of_row[kBlocksM], of_a = 0, of_b = 0;  // of lanes 0 to 15 a row each
#pragma unroll
        for (int block = 0; block < kBlocksM; ++block) {
            of_row[block] = magnitude(a, m + block * 64 + threadIdx.x % 16, M);
            of_a = fmaxf(of_a, of_row[block]);
        }
#pragma unroll 1
        for (int i = threadIdx.x % 32; i < 2 * kSums; i += 32) of_b = fmaxf(of_b, magnitude(b, n + i, N));
        of_a = largest_of_warp(of_a), of_b = largest_of_warp(of_b);
        if (!__any_sync(~0u, lossy(smallest, of_a, of_b))) return false;
        return lost_line(sums, slab, n, of_row, of_a, of_b);
    }

  private:
    // Whether the largest of some sums is within what is lost where operands are as large as these.
    __device__ __forceinline__ bool lossy(float largest, float of_a, float of_b) const {
        constexpr float kPerOperand = 0x1p-13f;  // 2^-36 of an operand against 2^-24 of a sum, with room for luck
        const float least = (of_a + of_b) * kPerOperand;
        return largest > 0 && largest * largest < float(K) * least * least;
    }

    // What seldom runs is short: 32 columns at a time, a lane for each, go through the slab, and the sums go round.
    __device__ __forceinline__ bool lost_line(float (&sums)[kBlocksM][kSums], float* slab, int n,
                                              const float (&of_row)[kBlocksM], float of_a, float of_b) const {
        const int lane = threadIdx.x % 32;
        float rows[kBlocksM] = {};
        bool lost = false;
#pragma unroll 1
        for (int first = n; first < n + 2 * kSums; first += 32) {
            float largest = 0;
#pragma unroll
            for (int block = 0; block < kBlocksM; ++block) {
                spread(sums[block], slab, lane);
#pragma unroll 1
                for (int row = 0; row < 16; ++row) {
                    const float sum = fmaxf(fabsf(slab[row * 32 + lane]), 0);  // NaN does not count
                    largest = fmaxf(largest, sum);
                    const float of_all = largest_of_warp(sum);
                    if (lane == row) rows[block] = fmaxf(rows[block], of_all);
                }
                turn_round<16>(sums[block]);
            }
            lost |= lossy(largest, of_a, magnitude(b, first + lane, N));
        }
#pragma unroll
        for (int block = 0; block < kBlocksM; ++block) lost |= lossy(rows[block], of_row[block], of_b);
        return __any_sync(~0u, lost);
    }

    // The first 32 columns of 16 rows, row by row.
    __device__ __forceinline__ static void spread(const float (&sums)[kSums], float* slab, int lane) {
        __syncwarp();
#pragma unroll
        for (int i = 0; i < 16; ++i)
            slab[(i / 2 % 2 * 8 + lane / 4) * 32 + i / 4 * 8 + lane % 4 * 2 + i % 2] = sums[i];
        __syncwarp();
    }

    // Scaled. What is out of range by itself is computed again anyway.
    __device__ __forceinline__ static float magnitude(const SplitOperand& operand, int i, int64_t count) {
        if (i >= count) return 0;
        const int bits = operand.magnitudes[i];
        return fminf(__int_as_float(bits) * split_scale(operand.exponent_at(bits)), 0x1p16f);
    }

    // Of numbers that are not negative, whose bits have the same order.
    __device__ __forceinline__ static float largest_of_warp(float x) {
        return __uint_as_float(__reduce_max_sync(~0u, __float_as_uint(x)));
    }
};

}  // namespace fusewright
