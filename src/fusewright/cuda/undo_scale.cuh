// Sums of products of fp16 halves (split_f16.cuh) without the powers of two that the operands carry.
#pragma once
#include "split_f16.cuh"

namespace fusewright {

// Takes a warp's sums as wgmma leaves them: of kBlocksM blocks, 64 rows apart, 16 rows and 2 · kSums columns each.
// kByLineA, kByLineB: each row of A, or column of B, has a power of its own.
template <int kBlocksM, int kSums, bool kByLineA, bool kByLineB> struct UndoScale {
    const SplitOperand &a, &b;
    const int64_t M, N;

    // Times 2^-(s_a + s_b), in two factors because the power itself may be out of range where the result is not. m, n:
    // the warp's first row, and the first column of `sums`.
    __device__ __forceinline__ void apply(float (&sums)[kBlocksM][kSums], int m, int n) const {
        if constexpr (kByLineA || kByLineB) {
            by_line(sums, m, n);
        } else {
            const int exponent = -(*a.exponent + *b.exponent);
            const float half = split_scale(exponent / 2), rest = split_scale(exponent - exponent / 2);
#pragma unroll
            for (int block = 0; block < kBlocksM; ++block)
#pragma unroll
                for (int i = 0; i < kSums; ++i) sums[block][i] = sums[block][i] * half * rest;
        }
    }

  private:
    // A row's factor comes before the column's where it is less than 1, else after it: so no sum grows beyond what a
    // float holds unless the result does. Nor does it vanish: of a factor below 2^-64 the rest comes after. A lane finds the factors of a pair of columns, whose upper 16 bits say all,
    // and lanes ask each other: for each block again, or these wait in registers while the first block's epilogue runs.
    __device__ __forceinline__ void by_line(float (&sums)[kBlocksM][kSums], int m, int n) const {
        const int lane = threadIdx.x % 32;
        uint32_t pairs[(kSums + 31) / 32];
#pragma unroll
        for (int i = 0; i < kSums; i += 32) {
            const int column = n + 2 * (i + lane);
            pairs[i / 32] = __float_as_uint(split_scale(-exponent_of_column(column))) >> 16 |
                            __float_as_uint(split_scale(-exponent_of_column(column + 1)));
        }
#pragma unroll
        for (int block = 0; block < kBlocksM; ++block) {
            float of_row[2];
#pragma unroll
            for (int upper = 0; upper < 2; ++upper)
                of_row[upper] = split_scale(-exponent_of_row(m + block * 64 + upper * 8 + lane / 4));
#pragma unroll
            for (int first = 0; first < 32; first += 4)
#pragma unroll
                for (int i = first; i < kSums; i += 32) {
                    const uint32_t pair = __shfl_sync(~0u, pairs[i / 32], first + lane % 4);
                    const float of_column[2] = {__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000)};
#pragma unroll
                    for (int j = 0; j < 4; ++j)
                        sums[block][i + j] = sums[block][i + j] * fminf(fmaxf(of_row[j / 2], 0x1p-64f), 1) *
                                             of_column[j % 2] * fmaxf(of_row[j / 2], 1);
                }
            if (__any_sync(~0u, fminf(of_row[0], of_row[1]) < 0x1p-64f)) {
#pragma unroll
                for (int i = 0; i < kSums; ++i) sums[block][i] *= fminf(of_row[i / 2 % 2] * 0x1p64f, 1);
            }
        }
    }

    __device__ __forceinline__ int exponent_of_row(int row) const {
        return a.exponent_at(kByLineA && row < M ? a.magnitudes[row] : 0);
    }

    __device__ __forceinline__ int exponent_of_column(int column) const {
        return b.exponent_at(kByLineB && column < N ? b.magnitudes[column] : 0);
    }
};

}  // namespace fusewright
