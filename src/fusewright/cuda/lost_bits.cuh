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

    // All lanes call it and are told the same. m, n: the first row and column.
    __device__ __forceinline__ bool found(float (&sums)[kBlocksM][kSums], int m, int n) const {
        float smallest = 0x1p126f;  // but for zeros
#pragma unroll
        for (int block = 0; block < kBlocksM; ++block)
#pragma unroll
            for (int i = 0; i < kSums; ++i)
                smallest = fminf(smallest, sums[block][i] != 0 ? fabsf(sums[block][i]) : 0x1p126f);
        // The largest that operands can be: where even for those all is well, no magnitude is read.
        const bool seldom = __any_sync(~0u, lossy(smallest, 0x1p16f, 0x1p16f));
        return seldom && lost_line(sums, m, n);
    }

  private:
    // Whether the largest of some sums is within what is lost where operands are as large as these.
    __device__ __forceinline__ bool lossy(float largest, float of_a, float of_b) const {
        constexpr float kPerOperand = 0x1p-13f;  // 2^-36 of an operand against 2^-24 of a sum, with room for luck
        const float least = (of_a + of_b) * kPerOperand;
        return largest > 0 && largest * largest < float(K) * least * least;
    }

    // A loop that seldom runs is short: the sums go round, kRound at each turn.
    __device__ __forceinline__ bool lost_line(float (&sums)[kBlocksM][kSums], int m, int n) const {
        constexpr int kRound = 16, kColumns = kRound / 2, kTileN = 2 * kSums;
        const int lane = threadIdx.x % 32;
        float of_a = 0, rows[kBlocksM][2] = {};
#pragma unroll
        for (int block = 0; block < kBlocksM; ++block)
            of_a = fmaxf(of_a, largest_magnitude(a, m + block * 64, m + block * 64 + 16, M));
        bool lost = false;
#pragma unroll 1
        for (int column = n; column < n + kTileN; column += kRound * 2) {
            float columns[kColumns] = {};
#pragma unroll
            for (int block = 0; block < kBlocksM; ++block) {
#pragma unroll
                for (int i = 0; i < kRound; ++i) {
                    float &of_row = rows[block][i / 2 % 2], &of_column = columns[i / 4 * 2 + i % 2];
                    of_row = fmaxf(of_row, fabsf(sums[block][i]));
                    of_column = fmaxf(of_column, fabsf(sums[block][i]));
                }
                turn_round<kRound>(sums[block]);
            }
            const int mine = share_out(columns, lane);
            const float of_b = magnitude(b, column + mine / 2 * 8 + lane % 4 * 2 + mine % 2, N);
            lost |= lossy(columns[0], of_a, of_b);
        }
        const float of_b = largest_magnitude(b, n, n + kTileN, N);
#pragma unroll
        for (int block = 0; block < kBlocksM; ++block)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                float& largest = rows[block][half];
                largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 1));
                largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 2));
                const int row = m + block * 64 + half * 8 + lane / 4;
                lost |= lossy(largest, magnitude(a, row, M), of_b);
            }
        return __any_sync(~0u, lost);
    }

    // Lanes of the same columns and other rows share the columns out, half at each step: each finds the largest of one,
    // in largest[0]. Returns which.
    __device__ __forceinline__ static int share_out(float (&largest)[8], int lane) {
        int mine = 0;
#pragma unroll
        for (int lanes = 4; lanes < 32; lanes *= 2) {
            const int count = 16 / lanes;
            const bool upper = lane & lanes;
            mine += upper ? count : 0;
#pragma unroll
            for (int i = 0; i < count; ++i) {
                const float kept = upper ? largest[count + i] : largest[i], given = upper ? largest[i] : largest[count + i];
                largest[i] = fmaxf(kept, __shfl_xor_sync(~0u, given, lanes));
            }
        }
        return mine;
    }

    // Scaled. What is out of range by itself is computed again anyway.
    __device__ __forceinline__ static float magnitude(const SplitOperand& operand, int i, int64_t count) {
        return i < count ? fminf(__int_as_float(operand.magnitudes[i]) * split_scale(*operand.exponent), 0x1p16f) : 0;
    }

    // The largest of some rows or columns, for a warp together.
    __device__ __forceinline__ static float largest_magnitude(const SplitOperand& operand, int first, int last,
                                                              int64_t count) {
        float largest = 0;
#pragma unroll 1
        for (int i = first + threadIdx.x % 32; i < last; i += 32)
            largest = fmaxf(largest, magnitude(operand, i, count));
        return __uint_as_float(__reduce_max_sync(~0u, __float_as_uint(largest)));
    }
};

}  // namespace fusewright
