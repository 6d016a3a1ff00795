// Matrix product of few rows with a generated epilogue on the tensor cores: epilogue(A [M, K] · B [K, N]).
//
// With few rows the time is that of reading B, once. So a block takes few columns, that many blocks fill the chip, and
// its warps share K. A thread keeps several pieces of B and of A on their way: it copies them to places of its own in
// shared memory, a ring of kStages, and needs no barrier to read them back. They are fragments of the tensor cores'
// tiles as they lie, for it does not matter in which order the products are added: 16 bytes along K serve two tiles.
//
// Each step's sums start at zero and are added to main sums, for tensor cores cut off what they add. In the end the
// warps' sums are added in order. float32 operands are split into two TF32 numbers each, and three products give
// float32's accuracy (as Markidis et al., "NVIDIA Tensor Core Programmability, Performance & Precision", 2018); sums
// that come out infinite or NaN, as those of infinite operands do, are computed again on the CUDA cores.
//
// B may be read before the launch before this one has ended, A may not (see launch_before_wait).
#pragma once
#include "async.cuh"
#include "launch.cuh"
#include "major.cuh"
#include "mma.cuh"
#include "vector.cuh"

namespace fusewright {

// RowTiles: of 16 rows of A that a block takes; Tiles: of 8 columns of B. A: K is contiguous; B: K or the columns are,
// as MajorB says. Lines of both start at multiples of kAlignmentA and kAlignmentB bytes.
// Epilogue: template <int V> void operator()(int64_t m, int64_t n, int count, const float (&sums)[V]) const
// finishes columns n … n + count - 1 of row m. All lanes of a warp call it together, those past the end with
// count <= 0, and in the order that store_bits asks for. void prefetch(int64_t n, int count) const may bring to the L2
// cache what it reads for these columns of any row.
// Grid: ceil(M / kRows) · ceil(N / kColumns). Block: kThreads. Dynamic shared memory: kSharedBytes.
template <class Element, int RowTiles, int Tiles, Major MajorB> struct GemmSkinny {
    static constexpr int kWarps = 8, kThreads = 32 * kWarps, kVector = 4;
    static constexpr int kBlocksPerMultiprocessor = RowTiles * Tiles < 8 ? 2 : 1;  // by registers
    static constexpr int kRows = 16 * RowTiles, kColumns = 8 * Tiles;
    static constexpr int kDepth = 16 / sizeof(Element);  // k of a thread's pieces
    static constexpr int kStep = kThreads / 8 * kDepth;  // k of a block's step
    static constexpr int kStageBytes = (2 * RowTiles + Tiles) * kThreads * 16;
    static constexpr int kStages = 98304 / kStageBytes < 8 ? 98304 / kStageBytes : 8;
    // A thread's piece of B is kDepth k of Tiles columns, in lines along K or along the columns.
    static constexpr int kLines = MajorB == Major::K ? Tiles : kDepth;
    static constexpr int kLineWidth = MajorB == Major::K ? kDepth : Tiles;
    static constexpr int kAlignmentA = 16, kAlignmentB = kLineWidth * sizeof(Element);
    static_assert(MajorB != Major::Strided && kStages >= 3 && kAlignmentB >= 4 && kAlignmentB <= 16);
    static_assert(kRows * kColumns / kVector <= kThreads);

    struct Stage {
        __align__(16) Element a[2 * RowTiles][kThreads][kDepth];
        __align__(16) Element b[kLines][kThreads][kLineWidth];
    };
    union Shared {
        Stage ring[kStages];
        float sums[kWarps][kRows][kColumns];
    };
    static constexpr int kSharedBytes = sizeof(Shared);

    // Strides are in elements.
    template <class Epilogue>
    __device__ __forceinline__ static void run(const Element* a, int64_t a_row_stride, const Element* b,
                                               int64_t b_line_stride, int64_t M, int64_t N, int64_t K,
                                               const Epilogue& epilogue) {
        extern __shared__ __align__(16) unsigned char dynamic_shared[];
        Shared& shared = *reinterpret_cast<Shared*>(dynamic_shared);
        const int64_t row_blocks = (M + kRows - 1) / kRows, first_m = blockIdx.x % row_blocks * kRows;
        const int64_t first_n = blockIdx.x / row_blocks * kColumns;
        const Pieces pieces{a + first_m * a_row_stride, a_row_stride, int(smaller(M - first_m, kRows)),
                            b + first_n * (MajorB == Major::K ? b_line_stride : 1), b_line_stride,
                            int(smaller(N - first_n, kColumns)), K};
        const int steps = int((K + kStep - 1) / kStep);
        // What the thread finishes.
        constexpr int kAcross = kColumns / kVector;
        const int row = threadIdx.x / kAcross, column = threadIdx.x % kAcross * kVector;
        const int left = row < pieces.rows ? pieces.columns - column : 0, count = left < kVector ? left : kVector;

        for (int step = 0; step < kStages - 1; ++step) pieces.copy_b(shared.ring[step], step);
        if (steps < kStages) launch_after_begin();
        if (threadIdx.x < kAcross) epilogue.prefetch(first_n + column, count);
        launch_before_wait();
        for (int step = 0; step < kStages - 1; ++step) {
            pieces.copy_a(shared.ring[step], step);
            copy_async_commit();
        }

        float main[RowTiles][Tiles][4] = {};
        for (int step = 0, now = 0, next = kStages - 1; step < steps; ++step) {
            copy_async_wait<kStages - 2>();
            pieces.copy_b(shared.ring[next], step + kStages - 1);  // to where the step before this one was
            pieces.copy_a(shared.ring[next], step + kStages - 1);
            copy_async_commit();
            if (step + kStages == steps) launch_after_begin();  // all of B is on its way
            multiply(shared.ring[now], main);
            now = now + 1 < kStages ? now + 1 : 0;
            next = next + 1 < kStages ? next + 1 : 0;
        }

        copy_async_wait<0>();
        __syncthreads();  // the ring's memory is free
        store_sums(shared.sums[threadIdx.x / 32], main);
        __syncthreads();
        if (threadIdx.x >= kRows * kAcross) return;
        float sums[kVector] = {};
#pragma unroll
        for (int warp = 0; warp < kWarps; ++warp) {
            float part[kVector];
            Access<kVector, float>::load(part, &shared.sums[warp][row][column]);
#pragma unroll
            for (int v = 0; v < kVector; ++v) sums[v] += part[v];
        }
        if constexpr (kParts == 2) finish(sums, pieces, row, column, count);
        epilogue.template operator()<kVector>(first_m + row, first_n + column, count, sums);
    }

private:
    __device__ __forceinline__ static int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
    __device__ __forceinline__ static int within(int64_t left, int most) {
        return left < 0 ? 0 : left < most ? int(left) : most;
    }

    // The operands from the block's first row and column on, and how many of each exist.
    struct Pieces {
        const Element* a;
        int64_t a_row_stride;
        int rows;
        const Element* b;
        int64_t b_line_stride;
        int columns;
        int64_t K;

        // The thread's first k of a step. Lanes 4 · g … 4 · g + 3 have rows g, g + 8, … and columns alike.
        __device__ __forceinline__ static int64_t first_k(int step) {
            return int64_t(step) * kStep + (threadIdx.x / 32 * 4 + threadIdx.x % 4) * kDepth;
        }
        __device__ __forceinline__ static int group() { return threadIdx.x % 32 / 4; }

        // Start to copy a step's pieces. What lies outside is not read, and counts as 0; so do steps past the last.
        __device__ __forceinline__ void copy_a(Stage& stage, int step) const {
            const int64_t k = first_k(step);
            const int deep = within(K - k, kDepth) * int(sizeof(Element));
#pragma unroll
            for (int i = 0; i < 2 * RowTiles; ++i) {
                const int row = 8 * i + group();
                copy_async<16>(stage.a[i][threadIdx.x], a + row * a_row_stride + k, row < rows ? deep : 0);
            }
        }
        __device__ __forceinline__ void copy_b(Stage& stage, int step) const {
            const int64_t k = first_k(step);
            const int deep = within(K - k, kDepth);
#pragma unroll
            for (int line = 0; line < kLines; ++line) {
                if constexpr (MajorB == Major::K) {
                    const int column = 8 * line + group();
                    copy_async<kAlignmentB>(stage.b[line][threadIdx.x], b + column * b_line_stride + k,
                                            column < columns ? deep * int(sizeof(Element)) : 0);
                } else {
                    const int column = group() * Tiles, wide = within(columns - column, Tiles);
                    copy_async<kAlignmentB>(stage.b[line][threadIdx.x], b + (k + line) * b_line_stride + column,
                                            line < deep ? wide * int(sizeof(Element)) : 0);
                }
            }
        }
    };

    // kDepth neighbouring elements, as words of the tensor cores' fragments: two tiles take two words each. A float is
    // two TF32 numbers: it is rounded, and so is what that leaves.
    static constexpr int kParts = sizeof(Element) == 4 ? 2 : 1;
    // Of both operands, so that the lower parts of the smallest numbers are normal ones; sums from 2^80 on overflow.
    static constexpr float kScale = kParts == 2 ? 16777216.0f : 1.0f;  // 2^24
    using Words = uint32_t[kParts][4];

    __device__ __forceinline__ static void take(const Element (&elements)[kDepth], Words& words) {
        if constexpr (kParts == 1) {
            memcpy(words[0], elements, 16);
        } else {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float scaled = elements[i] * kScale;
                words[0][i] = rounded(__float_as_uint(scaled));
                words[1][i] = rounded(__float_as_uint(scaled - __uint_as_float(words[0][i])));
            }
        }
    }

    // To TF32, halves away from zero.
    __device__ __forceinline__ static uint32_t rounded(uint32_t bits) { return (bits + 0x1000) & 0xffffe000; }

    // Adds the products of a step.
    __device__ __forceinline__ static void multiply(const Stage& stage, float (&main)[RowTiles][Tiles][4]) {
        Words rows[RowTiles][2];
#pragma unroll
        for (int i = 0; i < 2 * RowTiles; ++i) {
            Element elements[kDepth];
            Access<kDepth, Element>::load(elements, stage.a[i][threadIdx.x]);
            take(elements, rows[i / 2][i % 2]);
        }
        Element elements[Tiles][kDepth];
        load_columns(stage, elements);
        Words columns[Tiles];
#pragma unroll
        for (int tile = 0; tile < Tiles; ++tile) take(elements[tile], columns[tile]);

        // Of two parts each, three products count, the smallest first. Tiles take turns: a product takes its time.
        float sums[RowTiles][Tiles][4] = {};
#pragma unroll
        for (int order = kParts - 1; order >= 0; --order)
#pragma unroll
            for (int part = 0; part <= order; ++part)
#pragma unroll
                for (int word = 0; word < 4; word += 2)
#pragma unroll
                    for (int i = 0; i < RowTiles * Tiles; ++i) {
                        const auto &upper = rows[i / Tiles][0][part], &lower = rows[i / Tiles][1][part];
                        const auto& other = columns[i % Tiles][order - part];
                        const uint32_t a[4] = {upper[word], lower[word], upper[word + 1], lower[word + 1]};
                        const uint32_t b[2] = {other[word], other[word + 1]};
                        multiply_tile<Element>(sums[i / Tiles][i % Tiles], a, b);
                    }
#pragma unroll
        for (int i = 0; i < RowTiles * Tiles; ++i)
#pragma unroll
            for (int j = 0; j < 4; ++j) main[i / Tiles][i % Tiles][j] += sums[i / Tiles][i % Tiles][j];
    }

    __device__ __forceinline__ static void load_columns(const Stage& stage, Element (&columns)[Tiles][kDepth]) {
#pragma unroll
        for (int i = 0; i < kLines; ++i) {
            if constexpr (MajorB == Major::K) {
                Access<kDepth, Element>::load(columns[i], stage.b[i][threadIdx.x]);
            } else {
                Element line[Tiles];
                Access<Tiles, Element>::load(line, stage.b[i][threadIdx.x]);
#pragma unroll
                for (int tile = 0; tile < Tiles; ++tile) columns[tile][i] = line[tile];
            }
        }
    }

    __device__ __forceinline__ static void store_sums(float (&to)[kRows][kColumns],
                                                      const float (&main)[RowTiles][Tiles][4]) {
        const int group = threadIdx.x % 32 / 4, pair = threadIdx.x % 4 * 2;
#pragma unroll
        for (int i = 0; i < RowTiles; ++i)
#pragma unroll
            for (int tile = 0; tile < Tiles; ++tile)
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    const int place = pair + j % 2;
                    const int column = MajorB == Major::K ? 8 * tile + place : place * Tiles + tile;
                    to[16 * i + j / 2 * 8 + group][column] = main[i][tile][j];
                }
    }

    // Takes the scale out of the sums. Computes those that are infinite or NaN again, by float32's range and its rules
    // for operands that are.
    __device__ __forceinline__ static void finish(float (&sums)[kVector], const Pieces& pieces, int row, int column,
                                                  int count) {
#pragma unroll
        for (int v = 0; v < kVector; ++v) {
            const bool finite = sums[v] - sums[v] == 0;
            sums[v] *= 1 / (kScale * kScale);
            if (v >= count || finite) continue;
            const Element* a = pieces.a + row * pieces.a_row_stride;
            const Element* b = pieces.b + (column + v) * (MajorB == Major::K ? pieces.b_line_stride : 1);
            const int64_t b_stride = MajorB == Major::K ? 1 : pieces.b_line_stride;
            float sum = 0;
#pragma unroll 8
            for (int64_t k = 0; k < pieces.K; ++k) sum = fma(float(a[k]), float(b[k * b_stride]), sum);
            sums[v] = sum;
        }
    }
};

}  // namespace fusewright
