// Splits float32 into fp16 halves for the tensor cores: x·2^s = hi + lo·2^-11, to 22 bits and more (hi 11, lo 11).
//
// Where all products sum along the lines of a matrix each line has an s of its own, which follows from its largest |x|:
// one launch splits the matrix. Else s, one for the whole matrix, is chosen from a look at a sample of it in the launch
// before, with room above. What the halves cannot hold is told by the magnitudes that the split leaves behind: the bits
// of the largest |x| of every line, and of every column unless lines have their own s. Infinity and NaN are largest.
#pragma once
#include <cuda_fp16.h>
#include "vector.cuh"

namespace fusewright {

// Below: the largest magnitude seen is brought to [2^12, 2^13), eight times under what fp16 can hold, since there may be
// larger ones; that of a line, which is known, to [2^14, 2^15). An element of 2^-14 · 2^-s still has 22 bits: 2^-26 of
// the largest, or 2^-28.
constexpr int kSplitTarget = 12, kLineTarget = 14, kSplitLimit = 126;

__device__ __forceinline__ float split_scale(int exponent) { return __int_as_float((exponent + 127) << 23); }

// Of a line whose largest magnitude has these bits. Zeros may have any; of infinity and NaN nothing is expected.
__device__ __forceinline__ int line_exponent(int magnitude) {
    return min(kSplitLimit, kLineTarget - ((magnitude >> 23) - 127));
}

// Whether a row or column whose largest magnitude has these bits is beyond the halves at exponent s, or so far below
// that they lose bits of all of it: its products must be computed in float32.
__device__ __forceinline__ bool split_out_of_range(int magnitude, int exponent) {
    const float scaled = __int_as_float(magnitude) * split_scale(exponent);
    return (magnitude != 0) & !(scaled >= 0x1p-14f && scaled < 65520.0f);  // 65520 rounds to infinity; NaN fails too
}

// Where things lie in the buffer of a split matrix, in 32-bit words: first `planes` planes of fp16, their lines padded to
// 128 bytes, then the magnitudes of lines and of columns, then s. By line: the magnitudes of lines alone. No planes:
// s alone, for products that round the matrix in registers. ir/encoding.py has the same arithmetic.
struct SplitLayout {
    int planes;
    int64_t lines, length;  // elements of a line are consecutive
    bool by_line = false;   // each line has its own s

    __device__ int64_t padded() const { return (length + 63) / 64 * 64; }
    __device__ int64_t line_magnitudes() const { return planes * lines * padded() / 2; }
    __device__ int64_t column_magnitudes() const { return line_magnitudes() + lines; }
    __device__ int64_t exponent() const { return planes ? column_magnitudes() + length : 0; }
};

// What a product needs to know of an operand beside its planes: s, null where each line has its own, and the magnitudes
// by row (or column) of the product, unless it finds them itself.
struct SplitOperand {
    const int *exponent, *magnitudes;

    // along_k: the product's rows (or columns) are the lines of the matrix that was split.
    __device__ __forceinline__ static SplitOperand of(const int* halves, const SplitLayout& layout, bool along_k) {
        const int* magnitudes = halves + (along_k ? layout.line_magnitudes() : layout.column_magnitudes());
        return {layout.by_line ? nullptr : halves + layout.exponent(), layout.planes ? magnitudes : nullptr};
    }
    // s, for a row (or column) of this magnitude.
    __device__ __forceinline__ int exponent_at(int magnitude) const {
        return exponent ? *exponent : line_exponent(magnitude);
    }
    __device__ __forceinline__ bool out_of_range(int64_t i, int64_t count) const {
        const int magnitude = (magnitudes != nullptr) & (i < count) ? magnitudes[i] : 0;
        return split_out_of_range(magnitude, exponent_at(magnitude));
    }
};

// Scan, then patch: a launch of the float32 kernel, in tiles of kM × kN by kThreads threads, that computes again what has
// a row of a or a column of b out of range, or lies where a warp of a product's tile (kTileM × kTileN, with eight flags)
// lost bits.
template <int kM, int kN, int kThreads, int kTileM, int kTileN> struct SplitPatch {
    const SplitOperand a, b;
    const uint8_t* lost;
    int64_t M, N;
    bool always = false;  // takes all tiles for wrong
    static_assert(kM % kThreads == 0 && kN % kThreads == 0 && kTileM % kM == 0);

    // Row by row: tiles of a row, which one row of a makes wrong together, go to as many blocks.
    __device__ __forceinline__ int columns() const { return int((N + kN - 1) / kN); }
    __device__ __forceinline__ int tiles() const { return int((M + kM - 1) / kM) * columns(); }
    __device__ __forceinline__ int m(int tile) const { return tile / columns() * kM; }
    __device__ __forceinline__ int n(int tile) const { return tile % columns() * kN; }

    // Whether something is wrong in any of the block's tiles; nearly always nothing is.
    __device__ __forceinline__ bool anywhere() const {
        bool found = false;
#pragma unroll 4
        for (int tile = blockIdx.x; tile < tiles(); tile += gridDim.x) found |= sees(tile);
        return __syncthreads_or(found);
    }

    // Whether something is wrong in the share of a tile that this thread looks at. Without a branch, so that the loads
    // of several tiles are under way together.
    __device__ __forceinline__ bool sees(int tile) const {
        constexpr int kTiles = kTileN % kN ? (kN + kTileN - 2) / kTileN + 1 : 1;  // of a row, in part below this one
        const int first_m = m(tile), first_n = n(tile);
        const int row = first_m / kTileM * int((N + kTileN - 1) / kTileN);
        const int last = int(min(int64_t(first_n) + kN, N) - 1) / kTileN;
        bool found = always;
#pragma unroll
        for (int i = 0; i < kTiles; ++i)
            found |= reinterpret_cast<const uint64_t*>(lost)[row + min(first_n / kTileN + i, last)] != 0;
#pragma unroll
        for (int i = 0; i < kM; i += kThreads) found |= a.out_of_range(first_m + i + threadIdx.x, M);
#pragma unroll
        for (int i = 0; i < kN; i += kThreads) found |= b.out_of_range(first_n + i + threadIdx.x, N);
        return found;
    }
};

// A float32 matrix and the buffer for its halves.
struct SplitMatrix {
    const float* x;
    int64_t stride, lines, length;  // stride: elements from line to line. lines, length < 2^31
    int* halves;
    int planes;  // 2: hi and lo; 1: hi alone (one product, TF32's precision); 0: none, s alone is written
    bool by_line = false;

    __device__ __forceinline__ SplitLayout layout() const { return {planes, lines, length, by_line}; }

    // Whether a line can be read 16 bytes at a time.
    __device__ __forceinline__ bool aligned() const { return (reinterpret_cast<uint64_t>(x) | stride * 4) % 16 == 0; }
};

// A launch takes several matrices; a block finds its own first. All run the same code, which compiles once.
struct SplitF16 {
    // A warp takes kBlockColumns of a line at a time, a block kWarps lines, all of the same columns.
    static constexpr int kThreads = 256, kWarps = kThreads / 32, kVector = 4, kVectors = 4;
    static constexpr int kStride = 32 * kVector, kBlockColumns = kVectors * kStride;

    // ---- Sample: the first launch -----------------------------------------------------------------------------------

    // Looks at a share of a matrix: of every line each so-manieth chunk, in the next line the chunks beside them. Writes
    // the bits of the largest finite magnitude that each block of the launch saw to largest[blockIdx.x], and zeroes the
    // magnitudes that the split adds to.
    __device__ __forceinline__ static void sample(const SplitMatrix& m, int* largest) {
        if (m.planes > 0) {
            int* magnitudes = m.halves + m.layout().line_magnitudes();
            const int64_t thread = int64_t(blockIdx.x) * kThreads + threadIdx.x, threads = int64_t(gridDim.x) * kThreads;
            for (int64_t i = thread; i < m.lines + m.length; i += threads) magnitudes[i] = 0;
        }
        const uint32_t all = block_max(largest_finite(m));
        if (threadIdx.x == 0) largest[blockIdx.x] = int(all);
    }

    __device__ __forceinline__ static uint32_t largest_finite(const SplitMatrix& m) {
        // An eighth of a small matrix; of a large one, a million elements or a sixty-fourth.
        const uint32_t every = max(int64_t(8), min(int64_t(64), m.lines * m.length >> 20));
        const uint32_t chunks = (m.length + kStride - 1) / kStride;
        // Units are counted in 32 bits, whose division is short: no memory holds 2^32 of them, a kilobyte or a line each.
        const uint32_t per_line = (chunks + every - 1) / every, units = uint32_t(m.lines) * per_line;
        const bool aligned = m.aligned();
        uint32_t largest = 0;
#pragma unroll 4
        for (uint32_t unit = blockIdx.x * kWarps + threadIdx.x / 32; unit < units; unit += gridDim.x * kWarps) {
            const uint32_t line = unit / per_line, chunk = unit % per_line * every + line % every;
            float x[kVector];
            read(x, m, aligned, line, chunk * kStride + threadIdx.x % 32 * kVector);
#pragma unroll
            for (int i = 0; i < kVector; ++i) {
                const uint32_t magnitude = __float_as_uint(x[i]) & 0x7fffffff;
                if (magnitude < 0x7f800000) largest = max(largest, magnitude);
            }
        }
        return largest;
    }

    // ---- Split: the second ------------------------------------------------------------------------------------------

    // Block `block` of `blocks`, a multiple of the strips of kBlockColumns that a line has: enough to fill the chip, and
    // few, since each ends with atomics for its columns. largest: what `count` blocks of the sample saw.
    __device__ __forceinline__ static void split(const SplitMatrix& m, const int* largest, int count, int block,
                                                 int blocks) {
        const int exponent = choose_exponent(largest, count);
        if (block == 0 && threadIdx.x == 0) m.halves[m.layout().exponent()] = exponent;
        if (m.planes > 0) split(m, split_scale(exponent), block, blocks);
    }

    // Every block finds the same: a look at 1 KB costs less than a launch. Infinity and NaN have no say.
    __device__ __forceinline__ static int choose_exponent(const int* largest, int count) {
        uint32_t m = 0;
        for (int i = threadIdx.x; i < count; i += kThreads) m = max(m, uint32_t(largest[i]));
        m = block_max(m);
        return m == 0 ? 0 : max(-kSplitLimit, min(kSplitLimit, kSplitTarget - (int(m >> 23) - 127)));
    }

    __device__ __forceinline__ static void split(const SplitMatrix& m, float scale, int block, int blocks) {
        const SplitLayout layout = m.layout();
        const int strips = int((m.length + kBlockColumns - 1) / kBlockColumns), first = block % strips * kBlockColumns;
        const int column = first + threadIdx.x % 32 * kVector, step = blocks / strips * kWarps;
        const int64_t padded = layout.padded();
        const bool aligned = m.aligned();
        __half* hi = reinterpret_cast<__half*>(m.halves);
        uint32_t* magnitudes = reinterpret_cast<uint32_t*>(m.halves) + layout.line_magnitudes();
        uint32_t column_max[kVectors][kVector] = {};
        for (int64_t line = block / strips * kWarps + threadIdx.x / 32; line < m.lines; line += step) {
            float x[kVectors][kVector];
#pragma unroll
            for (int i = 0; i < kVectors; ++i) read(x[i], m, aligned, line, column + i * kStride);
            measure(x, column_max, magnitudes + line);
#pragma unroll
            for (int i = 0; i < kVectors; ++i) {
                const int at = column + i * kStride;
                write(x[i], scale, hi + line * padded + at, m.planes == 2, m.lines * padded, int(m.length) - at);
            }
        }
        finish_columns(column_max, magnitudes + m.lines, int(m.length), first);
    }

    // ---- Parts ------------------------------------------------------------------------------------------------------

    __device__ __forceinline__ static void read(float (&x)[kVector], const SplitMatrix& m, bool aligned, int64_t line,
                                                int column) {
        const float* p = m.x + line * m.stride + column;
        const int left = int(m.length) - column;
        if (aligned && left >= kVector) Access<kVector, float>::load(x, p);
        else load<kVector>(x, p, 1, left);
    }

    // The largest of a block's values, for all its threads.
    __device__ __forceinline__ static uint32_t block_max(uint32_t m) {
        __shared__ uint32_t of_warp[kWarps];
        m = __reduce_max_sync(~0u, m);
        if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = m;
        __syncthreads();
        return __reduce_max_sync(~0u, of_warp[threadIdx.x % kWarps]);
    }

    // Maxima of bits: for magnitudes they order as numbers do, and the order of atomics leaves no trace.
    __device__ __forceinline__ static void measure(const float (&x)[kVectors][kVector],
                                                   uint32_t (&column_max)[kVectors][kVector], uint32_t* line_magnitude) {
        uint32_t line_max = 0;
#pragma unroll
        for (int i = 0; i < kVectors; ++i)
#pragma unroll
            for (int j = 0; j < kVector; ++j) {
                const uint32_t magnitude = __float_as_uint(x[i][j]) & 0x7fffffff;
                column_max[i][j] = max(column_max[i][j], magnitude);
                line_max = max(line_max, magnitude);
            }
        line_max = __reduce_max_sync(~0u, line_max);
        if (threadIdx.x % 32 == 0 && line_max) atomicMax(line_magnitude, line_max);
    }

    // both: hi, and `plane` elements further on lo.
    __device__ __forceinline__ static void write(const float (&x)[kVector], float scale, __half* p, bool both,
                                                 int64_t plane, int count) {
        alignas(8) __half hi[kVector], lo[kVector];
        halve(x, scale, hi, lo);
        store_vector<kVector>(p, hi, count);
        if (both) store_vector<kVector>(p + plane, lo, count);
    }

    __device__ __forceinline__ static void halve(const float (&x)[kVector], float scale, __half (&hi)[kVector],
                                                 __half (&lo)[kVector]) {
#pragma unroll
        for (int i = 0; i < kVector; ++i) {
            const float scaled = x[i] * scale;
            hi[i] = __float2half_rn(scaled);
            lo[i] = __float2half_rn(__fsub_rn(scaled, __half2float(hi[i])) * 0x1p11f);
        }
    }

    // The block's warps meet in shared memory, so that each column costs a block one atomic.
    __device__ __forceinline__ static void finish_columns(const uint32_t (&column_max)[kVectors][kVector],
                                                          uint32_t* column_magnitudes, int columns, int first) {
        __shared__ uint32_t largest[kBlockColumns];
        for (int i = threadIdx.x; i < kBlockColumns; i += kThreads) largest[i] = 0;
        __syncthreads();
#pragma unroll
        for (int i = 0; i < kVectors; ++i)
#pragma unroll
            for (int j = 0; j < kVector; ++j)
                atomicMax(&largest[i * kStride + threadIdx.x % 32 * kVector + j], column_max[i][j]);
        __syncthreads();
        for (int i = threadIdx.x; i < kBlockColumns; i += kThreads)
            if (first + i < columns && largest[i]) atomicMax(column_magnitudes + first + i, largest[i]);
    }
};

// The split of a matrix whose lines have exponents of their own. So many warps take a line that its elements fit into
// their registers; where eight are too few it is read twice.
struct SplitLines {
    static constexpr int kThreads = SplitF16::kThreads, kWarps = SplitF16::kWarps;
    static constexpr int kBlocks = 4;  // a multiprocessor: 64 registers a thread
    static constexpr int kVector = SplitF16::kVector, kVectors = 8, kOfWarp = 32 * kVectors * kVector;
    static constexpr uint32_t kInfinity = 0x7f800000;
    using Values = float[kVectors][kVector];

    // Warps a line: a power of two. kernels/split_f16.py has the same arithmetic.
    __device__ __forceinline__ static int team(int64_t length) {
        return length <= kOfWarp ? 1 : length <= 2 * kOfWarp ? 2 : length <= 4 * kOfWarp ? 4 : kWarps;
    }

    // Block `block` of `blocks`, any number.
    __device__ __forceinline__ static void split(const SplitMatrix& m, int block, int blocks) {
        const SplitLayout layout = m.layout();
        const int warps = team(m.length), teams = kWarps / warps, step = warps * 32 * kVector, span = step * kVectors;
        const int column = threadIdx.x % (warps * 32) * kVector, last = (int(m.length) - 1) / span * span;
        const bool vectors = m.aligned() && m.length % kVector == 0;
        int place = 0;
        for (int64_t first = int64_t(block) * teams; first < m.lines; first += int64_t(blocks) * teams, place ^= 1) {
            const int64_t line = first + threadIdx.x / (warps * 32);
            const int length = line < m.lines ? int(m.length) : 0;
            const float* x = m.x + line * m.stride;
            Values values;
            uint32_t largest = 0;
#pragma unroll 1
            for (int at = column; at <= column + last; at += span) {
                read(values, x, at, step, length, vectors);
                largest = max(largest, largest_of(values));
            }
            largest = of_team(largest, warps, place, [](uint32_t x) { return __reduce_max_sync(~0u, x); });
            const float scale = split_scale(line_exponent(int(largest)));
            int kept = 0;  // elements that keep all their bits, less those that do not
            __half* hi = reinterpret_cast<__half*>(m.halves) + line * layout.padded();
#pragma unroll 1
            for (int at = column + last; at >= column; at -= span) {
                if (at < column + last) read(values, x, at, step, length, vectors);
#pragma unroll
                for (int i = 0; i < kVectors; ++i) {
                    kept += kept_of(values[i], scale);
                    if (at + i * step < length)
                        write(values[i], scale, hi + at + i * step, m.planes == 2, m.lines * layout.padded());
                }
            }
            kept = int(of_team(uint32_t(kept), warps, place, [](uint32_t x) { return __reduce_add_sync(~0u, x); }));
            // A few elements far above the rest: where these meet zeros, the rest is the result. Left to the patch.
            if (kept < 0) largest = max(largest, kInfinity);
            if (column == 0 && line < m.lines) m.halves[layout.line_magnitudes() + line] = int(largest);
        }
    }

    __device__ __forceinline__ static int kept_of(const float (&x)[kVector], float scale) {
        int kept = 0;
#pragma unroll
        for (int j = 0; j < kVector; ++j) kept += x[j] == 0 ? 0 : fabsf(x[j]) * scale < 0x1p-14f ? -1 : 1;
        return kept;
    }

    // All loads are under way before the first is used. vectors: a line can be read 16 bytes at a time, to its end.
    __device__ __forceinline__ static void read(Values& values, const float* x, int column, int step, int length,
                                                bool vectors) {
        if (vectors) {
#pragma unroll
            for (int i = 0; i < kVectors; ++i) {
                float4 v = make_float4(0, 0, 0, 0);
                if (column + i * step < length) v = *reinterpret_cast<const float4*>(x + column + i * step);
                values[i][0] = v.x, values[i][1] = v.y, values[i][2] = v.z, values[i][3] = v.w;
            }
        } else {
#pragma unroll
            for (int i = 0; i < kVectors; ++i)
                load<kVector>(values[i], x + column + i * step, 1, length - column - i * step);
        }
    }

    __device__ __forceinline__ static uint32_t largest_of(const Values& values) {
        uint32_t largest = 0;
#pragma unroll
        for (int i = 0; i < kVectors; ++i)
#pragma unroll
            for (int j = 0; j < kVector; ++j) largest = max(largest, __float_as_uint(values[i][j]) & 0x7fffffff);
        return largest;
    }

    // Past the end of a line zeros, as far as its padding: so each store is one of 8 bytes.
    __device__ __forceinline__ static void write(const float (&x)[kVector], float scale, __half* p, bool both,
                                                 int64_t plane) {
        __half hi[kVector], lo[kVector];
        uint64_t words[2];
        SplitF16::halve(x, scale, hi, lo);
        memcpy(&words[0], hi, 8), memcpy(&words[1], lo, 8);
        *reinterpret_cast<uint64_t*>(p) = words[0];
        if (both) *reinterpret_cast<uint64_t*>(p + plane) = words[1];
    }

    // What `reduce` makes of a warp's 32, of a team's threads. place: rounds alternate between two, so that nobody writes
    // where others still read.
    template <class Reduce>
    __device__ __forceinline__ static uint32_t of_team(uint32_t x, int warps, int place, Reduce reduce) {
        __shared__ uint32_t of_warp[2][kWarps];  // for each `Reduce`
        x = reduce(x);
        if (warps == 1) return x;
        const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
        if (lane == 0) of_warp[place][warp] = x;
        __syncthreads();
        return reduce(lane < warps ? of_warp[place][warp / warps * warps + lane] : 0);
    }
};

}  // namespace fusewright
