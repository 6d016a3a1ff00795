import torch
import torch.nn as nn

from torch.utils.cpp_extension import load_inline

# Written by fusewright 0.1.0 from gemm_multiply_leakyrelu.py for sm_90a:
# the kernels that ModelNew runs, and below them the code that launches them.
CUDA_SOURCE = r"""
#include <cuda_fp16.h>
#include <cstdint>
#include <cstring>
#include <cuda_bf16.h>

namespace fusewright_gemm_multiply_leakyrelu_80ad6a8325dc {

// ======== vector.cuh
// Loads and stores of V consecutive elements by one thread, guarded at the end of a row, and bit masks.
//
// Everywhere, `count` is how many of the V elements exist; it may be negative, and nothing beyond it is touched.

namespace fusewright {

// The type that moves so many bytes in one access.
template <int Bytes> struct Word;
template <> struct Word<1> { using type = uint8_t; };
template <> struct Word<2> { using type = uint16_t; };
template <> struct Word<4> { using type = uint32_t; };
template <> struct Word<8> { using type = uint2; };
template <> struct Word<16> { using type = uint4; };

// Moves V elements in the widest accesses there are. The memory side must be aligned to them; the register side, read
// or written through memcpy, need not be.
template <int V, class T> struct Access {
    static constexpr int kBytes = V * sizeof(T), kWordBytes = kBytes < 16 ? kBytes : 16;
    using Type = typename Word<kWordBytes>::type;

    __device__ __forceinline__ static void load(T* dst, const T* p) {
#pragma unroll
        for (int i = 0; i < kBytes / kWordBytes; ++i) {
            const Type word = reinterpret_cast<const Type*>(p)[i];
            memcpy(reinterpret_cast<char*>(dst) + i * kWordBytes, &word, kWordBytes);
        }
    }

    __device__ __forceinline__ static void store(T* p, const T* src) {
#pragma unroll
        for (int i = 0; i < kBytes / kWordBytes; ++i) {
            Type word;
            memcpy(&word, reinterpret_cast<const char*>(src) + i * kWordBytes, kWordBytes);
            reinterpret_cast<Type*>(p)[i] = word;
        }
    }
};

// dst[i] = p[i * stride], or 0 past `count`.
template <int V, class T> __device__ __forceinline__ void load(T (&dst)[V], const T* p, int64_t stride, int count) {
#pragma unroll
    for (int i = 0; i < V; ++i) dst[i] = i < count ? p[i * stride] : T(0);
}

template <int V, class T>
__device__ __forceinline__ void store(T* p, int64_t stride, const T (&src)[V], int count) {
#pragma unroll
    for (int i = 0; i < V; ++i)
        if (i < count) p[i * stride] = src[i];
}

// The same with unit stride, where p is a multiple of min(16, V * sizeof(T)) bytes: in wide accesses but for the last.
template <int V, class T> __device__ __forceinline__ void load_vector(T (&dst)[V], const T* p, int count) {
    if (count >= V)
        Access<V, T>::load(dst, p);
    else
        load(dst, p, 1, count);
}

template <int V, class T> __device__ __forceinline__ void store_vector(T* p, const T (&src)[V], int count) {
    if (count >= V)
        Access<V, T>::store(p, src);
    else
        store(p, 1, src, count);
}

// A row of a bit mask has ceil(columns / 8) bytes; column n is bit n % 8 of byte n / 8. V is 1, 2, 4, 8 or 16, and n a
// multiple of it.
template <int V> __device__ __forceinline__ void load_bits(bool (&dst)[V], const uint8_t* row, int64_t n, int count) {
    uint32_t bits = 0;
#pragma unroll
    for (int byte = 0; byte * 8 < V; ++byte)
        if (byte * 8 < count) bits |= uint32_t(row[(n >> 3) + byte]) << byte * 8;
    if (V < 8) bits >>= n & 7;
#pragma unroll
    for (int i = 0; i < V; ++i) dst[i] = i < count && (bits >> i & 1);
}

// The same of a mask that is read in any order: column i of the thread is bit `bit + i * stride` of the whole mask.
template <int V>
__device__ __forceinline__ void load_bits(bool (&dst)[V], const uint8_t* mask, int64_t bit, int64_t stride, int count) {
#pragma unroll
    for (int i = 0; i < V; ++i) {
        const int64_t at = bit + i * stride;
        dst[i] = i < count && (mask[at / 8] >> at % 8 & 1);
    }
}

// All lanes of a warp call this together. Where V < 8, the columns of a byte belong to 8 / V neighbouring lanes of one
// row, in order; they combine their bits by shuffles, and the first of them writes. Bits past `count` are written as 0.
template <int V>
__device__ __forceinline__ void store_bits(uint8_t* row, int64_t n, const bool (&src)[V], int count) {
    uint32_t bits = 0;
#pragma unroll
    for (int i = 0; i < V; ++i) bits |= uint32_t(i < count && src[i]) << i;
    if (V < 8) bits <<= n & 7;
#pragma unroll
    for (int lanes = 1; lanes * V < 8; lanes *= 2) bits |= __shfl_xor_sync(0xffffffff, bits, lanes);
    if ((n & 7) == 0) {  // where V < 8, the first lane of its byte
#pragma unroll
        for (int byte = 0; byte * 8 < V; ++byte)
            if (byte * 8 < count) row[(n >> 3) + byte] = uint8_t(bits >> byte * 8);
    }
}

}  // namespace fusewright

// ======== split_f16.cuh
// Splits float32 into fp16 halves for the tensor cores: x·2^s = hi + lo·2^-11, to 22 bits and more (hi 11, lo 11).
//
// Where all products sum along the lines of a matrix each line has an s of its own, which follows from its largest |x|:
// one launch splits the matrix. Else s, one for the whole matrix, is chosen from a look at a sample of it in the launch
// before, with room above. What the halves cannot hold is told by the magnitudes that the split leaves behind: the bits
// of the largest |x| of every line, and of every column unless lines have their own s. Infinity and NaN are largest.

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

// ======== launch.cuh
// Launches that overlap (programmatic dependent launch, PTX ISA "griddepcontrol"): a kernel begins as soon as the last
// blocks of the one before it have left, which hides what a launch costs, and waits for it before it touches memory.
// The simulator has its own version of this file.

namespace fusewright {

// Waits until the launch before has ended, and all that it wrote is there. Every thread of every kernel whose
// `LaunchSpec.early` is set comes here: so a launch that has ended tells that all those before it have. Elsewhere, and
// before Hopper, there is nothing to wait for.
__device__ __forceinline__ void launch_before_wait() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Lets the next launch begin once every block of this one has come here or left. Only where the next one has something
// to do meanwhile: one that merely waits has been seen to slow this one.
__device__ __forceinline__ void launch_after_begin() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

}  // namespace fusewright

// ======== major.cuh
// Which dimension of a GEMM operand is contiguous: k, the rows or columns (m or n), or neither.

namespace fusewright {

enum class Major { K, MN, Strided };

}  // namespace fusewright

// ======== sm90_ptx.cuh
// Hopper's own instructions (sm_90a), one named function each, and nothing else. The simulator has its own version of
// this file. Pointers to shared memory are generic pointers into the calling block's own shared memory, unless a name
// says "remote".

namespace fusewright {

// The driver's CUtensorMap, opaque: <cuda.h> does not compile under NVRTC.
struct alignas(64) TensorMap {
    unsigned char opaque[128];
};

__device__ __forceinline__ uint32_t shared_address(const void* p) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// ---- Clusters -------------------------------------------------------------------------------------------------------

__device__ __forceinline__ uint32_t cluster_rank() {
    uint32_t rank;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

// Every thread of every block of the cluster waits for all the others, and sees their writes.
__device__ __forceinline__ void cluster_sync() {
    asm volatile("barrier.cluster.arrive.release;\n\tbarrier.cluster.wait.acquire;" ::: "memory");
}

// ---- Registers ------------------------------------------------------------------------------------------------------

// Each warpgroup gives back, or takes, registers: kCount a thread from here on. A multiple of 8.
template <int kCount> __device__ __forceinline__ void registers_release() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
}
template <int kCount> __device__ __forceinline__ void registers_acquire() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
}

// ---- mbarrier -------------------------------------------------------------------------------------------------------

__device__ __forceinline__ void mbarrier_init(uint64_t* barrier, uint32_t arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}

// Makes initialised barriers visible to the cluster and to the copy engine.
__device__ __forceinline__ void mbarrier_fence_init() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// Arrives, and makes the phase wait for `bytes` more bytes of bulk copies.
__device__ __forceinline__ void mbarrier_arrive_expect_tx(uint64_t* barrier, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
                 : "memory");
}

__device__ __forceinline__ void mbarrier_arrive(uint64_t* barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// Arrives at the barrier that lies at this address in block `rank` of the cluster (which may be this block).
// Without `.release.cluster`, which would cost a fence of all memory: reads need none.
__device__ __forceinline__ void mbarrier_arrive_remote(uint64_t* barrier, uint32_t rank) {
    asm volatile(
        "{\n\t.reg .b32 remote;\n\t"
        "mapa.shared::cluster.u32 remote, %0, %1;\n\t"
        "mbarrier.arrive.shared::cluster.b64 _, [remote];\n\t}" ::"r"(shared_address(barrier)),
        "r"(rank)
        : "memory");
}

// Whether the phase of this parity has completed; the hardware may let the thread sleep a while before it answers.
__device__ __forceinline__ bool mbarrier_try_wait(uint64_t* barrier, uint32_t parity) {
    uint32_t done;
    asm volatile(
        "{\n\t.reg .pred done;\n\t"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%1], %2;\n\t"
        "selp.b32 %0, 1, 0, done;\n\t}"
        : "=r"(done)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
    return done;
}

// The same, answered at once.
__device__ __forceinline__ bool mbarrier_test_wait(uint64_t* barrier, uint32_t parity) {
    uint32_t done;
    asm volatile(
        "{\n\t.reg .pred done;\n\t"
        "mbarrier.test_wait.parity.shared::cta.b64 done, [%1], %2;\n\t"
        "selp.b32 %0, 1, 0, done;\n\t}"
        : "=r"(done)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
    return done;
}

// Stores 16 bytes to this address in block `rank` of the cluster, and counts them at the barrier that lies at this address
// there, as bulk copies are counted. Not by their proxy.
__device__ __forceinline__ void store_async(void* destination, uint64_t* barrier, uint32_t rank, float4 values) {
    asm volatile(
        "{\n\t.reg .b32 to, at;\n\t"
        "mapa.shared::cluster.u32 to, %0, %2;\n\t"
        "mapa.shared::cluster.u32 at, %1, %2;\n\t"
        "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [to], {%3, %4, %5, %6}, [at];\n\t}" ::"r"(
            shared_address(destination)),
        "r"(shared_address(barrier)), "r"(rank), "f"(values.x), "f"(values.y), "f"(values.z), "f"(values.w)
        : "memory");
}

// ---- Bulk tensor copies (TMA) ---------------------------------------------------------------------------------------

// Makes this thread's writes to shared memory (and those that it knows of through barriers) visible to bulk copies and
// to the tensor cores, which might otherwise miss them.
__device__ __forceinline__ void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

__device__ __forceinline__ void tensor_map_prefetch(const TensorMap* map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// Copies the map's box at coordinates (x innermost, y, z) to `destination`; its bytes count at `barrier`.
// What lies outside the tensor arrives as zeros and counts too.
__device__ __forceinline__ void tensor_load(void* destination, const TensorMap* map, uint64_t* barrier, int x, int y,
                                            int z) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], "
        "[%2];" ::"r"(shared_address(destination)),
        "l"(map), "r"(shared_address(barrier)), "r"(x), "r"(y), "r"(z)
        : "memory");
}

// The same, to this address, and counted at this barrier, in every block of the cluster whose bit is set in `blocks`.
__device__ __forceinline__ void tensor_load_multicast(void* destination, const TensorMap* map, uint64_t* barrier, int x,
                                                      int y, int z, uint16_t blocks) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster [%0], "
        "[%1, {%4, %5, %6}], [%2], %3;" ::"r"(shared_address(destination)),
        "l"(map), "r"(shared_address(barrier)), "h"(blocks), "r"(x), "r"(y), "r"(z)
        : "memory");
}

// Copies `source` to the map's box at coordinates (x, y, z); what lies outside the tensor is left out.
__device__ __forceinline__ void tensor_store(const TensorMap* map, const void* source, int x, int y, int z) {
    asm volatile("cp.async.bulk.tensor.3d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4}], [%1];" ::"l"(map),
                 "r"(shared_address(source)), "r"(x), "r"(y), "r"(z)
                 : "memory");
}

// Closes the group of this thread's stores since the last one.
__device__ __forceinline__ void tensor_store_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// Waits until at most the kPending latest groups of this thread's stores still read shared memory.
template <int kPending> __device__ __forceinline__ void tensor_store_wait_read() {
    asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}

// Waits until at most the kPending latest groups of this thread's stores are unfinished.
template <int kPending> __device__ __forceinline__ void tensor_store_wait() {
    asm volatile("cp.async.bulk.wait_group %0;" ::"n"(kPending) : "memory");
}

// ---- Matrices between registers and shared memory -------------------------------------------------------------------

// Stores four 8 × 8 matrices of 16-bit elements. Lane i gives the address of row i % 8 (16 bytes) of matrix i / 8, and
// holds in values[j], of matrix j, row i / 4, columns i % 4 * 2 and the next.
__device__ __forceinline__ void matrix_store(void* row, const uint32_t (&values)[4]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(row)),
                 "r"(values[0]), "r"(values[1]), "r"(values[2]), "r"(values[3])
                 : "memory");
}

// The same transposed: values[j] holds column i / 4, rows i % 4 * 2 and the next.
__device__ __forceinline__ void matrix_store_transposed(void* row, const uint32_t (&values)[4]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(row)),
                 "r"(values[0]), "r"(values[1]), "r"(values[2]), "r"(values[3])
                 : "memory");
}

// ---- Warpgroup matrix products (wgmma) ------------------------------------------------------------------------------

// Orders the warpgroup's accesses to accumulator registers before the products that follow.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

// Closes the group of the products issued since the last one.
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until at most the kPending latest groups are unfinished.
template <int kPending> __device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// The compiler does not know that products write registers after they are issued: accesses to them stay on their side
// of this. Those to memory need not, and to hold them too would slow the compiler down.
template <int kCount> __device__ __forceinline__ void hold_registers(float (&values)[kCount]) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(values[i]));
}

#define FUSEWRIGHT_8(d, i)                                                                                       \
    "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
        "+f"(d[i + 7])
#define FUSEWRIGHT_16(d, i) FUSEWRIGHT_8(d, i), FUSEWRIGHT_8(d, i + 8)
// So many sums as operands of an instruction, and their names there.
#define FUSEWRIGHT_SUMS_32(d) FUSEWRIGHT_16(d, 0), FUSEWRIGHT_16(d, 16)
#define FUSEWRIGHT_SUMS_48(d) FUSEWRIGHT_SUMS_32(d), FUSEWRIGHT_16(d, 32)
#define FUSEWRIGHT_SUMS_64(d) FUSEWRIGHT_SUMS_48(d), FUSEWRIGHT_16(d, 48)
#define FUSEWRIGHT_SUMS_80(d) FUSEWRIGHT_SUMS_64(d), FUSEWRIGHT_16(d, 64)
#define FUSEWRIGHT_SUMS_96(d) FUSEWRIGHT_SUMS_80(d), FUSEWRIGHT_16(d, 80)
#define FUSEWRIGHT_SUMS_112(d) FUSEWRIGHT_SUMS_96(d), FUSEWRIGHT_16(d, 96)
#define FUSEWRIGHT_SUMS_128(d) FUSEWRIGHT_SUMS_112(d), FUSEWRIGHT_16(d, 112)
#define FUSEWRIGHT_NAMES_32 \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define FUSEWRIGHT_NAMES_48 \
    FUSEWRIGHT_NAMES_32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define FUSEWRIGHT_NAMES_64 \
    FUSEWRIGHT_NAMES_48 ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define FUSEWRIGHT_NAMES_80 \
    FUSEWRIGHT_NAMES_64 ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79"
#define FUSEWRIGHT_NAMES_96 \
    FUSEWRIGHT_NAMES_80 ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define FUSEWRIGHT_NAMES_112 \
    FUSEWRIGHT_NAMES_96 ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, " \
    "%108, %109, %110, %111"
#define FUSEWRIGHT_NAMES_128 \
    FUSEWRIGHT_NAMES_112 ", %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, " \
    "%124, %125, %126, %127"

template <class Element> constexpr const bool kIsBfloat16 = false;
template <> constexpr const bool kIsBfloat16<__nv_bfloat16> = true;
template <class Element> constexpr const bool kIsFloat = false;
template <> constexpr const bool kIsFloat<float> = true;

// d (64 × kColumns, a warpgroup's) = (accumulate ? d : 0) + A (64 × k) · B (k × kColumns), asynchronously; k is 16, or 8 of
// floats, which count as TF32: their lower 13 bits do not, and both matrices are K-major.
// Thread t holds, as d[i], row t / 32 * 16 + t % 32 / 4 + i / 2 % 2 * 8, column i / 4 * 8 + t % 4 * 2 + i % 2.
#define FUSEWRIGHT_PRODUCT(TYPE, COLUMNS, SUMS, A, B, ACCUMULATE, MAJOR_A, MAJOR_B)                                  \
    asm volatile("{\n\t.reg .pred p;\n\tsetp.ne.b32 p, %" #ACCUMULATE ", 0;\n\t"                                     \
                 "wgmma.mma_async.sync.aligned.m64n" #COLUMNS "k16.f32." TYPE "." TYPE " {" FUSEWRIGHT_NAMES_##SUMS  \
                 "}, %" #A ", %" #B ", p, 1, 1, %" #MAJOR_A ", %" #MAJOR_B ";\n\t}"                                  \
                 : FUSEWRIGHT_SUMS_##SUMS(d)                                                                         \
                 : "l"(a), "l"(b), "r"(int(accumulate)), "n"(kMajorA == Major::MN), "n"(kMajorB == Major::MN))
#define FUSEWRIGHT_TF32_PRODUCT(COLUMNS, SUMS, A, B, ACCUMULATE, ...)                                                \
    asm volatile("{\n\t.reg .pred p;\n\tsetp.ne.b32 p, %" #ACCUMULATE ", 0;\n\t"                                     \
                 "wgmma.mma_async.sync.aligned.m64n" #COLUMNS "k8.f32.tf32.tf32 {" FUSEWRIGHT_NAMES_##SUMS           \
                 "}, %" #A ", %" #B ", p, 1, 1;\n\t}"                                                                \
                 : FUSEWRIGHT_SUMS_##SUMS(d)                                                                         \
                 : "l"(a), "l"(b), "r"(int(accumulate)))
#define FUSEWRIGHT_WGMMA(COLUMNS, SUMS, ...)                                                                \
    template <class Element, Major kMajorA, Major kMajorB>                                                  \
    __device__ __forceinline__ void wgmma(float (&d)[SUMS], uint64_t a, uint64_t b, bool accumulate) {      \
        static_assert(!kIsFloat<Element> || (kMajorA == Major::K && kMajorB == Major::K));                  \
        if constexpr (kIsFloat<Element>) FUSEWRIGHT_TF32_PRODUCT(COLUMNS, SUMS, __VA_ARGS__);            \
        else if constexpr (kIsBfloat16<Element>) FUSEWRIGHT_PRODUCT("bf16", COLUMNS, SUMS, __VA_ARGS__);    \
        else FUSEWRIGHT_PRODUCT("f16", COLUMNS, SUMS, __VA_ARGS__);                                         \
    }
FUSEWRIGHT_WGMMA(64, 32, 32, 33, 34, 35, 36)
FUSEWRIGHT_WGMMA(96, 48, 48, 49, 50, 51, 52)
FUSEWRIGHT_WGMMA(128, 64, 64, 65, 66, 67, 68)
FUSEWRIGHT_WGMMA(160, 80, 80, 81, 82, 83, 84)
FUSEWRIGHT_WGMMA(192, 96, 96, 97, 98, 99, 100)
FUSEWRIGHT_WGMMA(224, 112, 112, 113, 114, 115, 116)
FUSEWRIGHT_WGMMA(256, 128, 128, 129, 130, 131, 132)
#undef FUSEWRIGHT_PRODUCT
#undef FUSEWRIGHT_TF32_PRODUCT
#undef FUSEWRIGHT_WGMMA

// The same with A (fp16) in registers. Register a[i] of thread t holds row t / 32 * 16 + t % 32 / 4 + i % 2 * 8,
// k i / 2 * 8 + t % 4 * 2 and the next. It may be written again when the product's group has been waited for.
template <Major kMajorB>
__device__ __forceinline__ void wgmma_registers(float (&d)[64], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
    asm volatile("{\n\t.reg .pred p;\n\tsetp.ne.b32 p, %69, 0;\n\t"
                 "wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 {" FUSEWRIGHT_NAMES_64
                 "}, {%64, %65, %66, %67}, %68, p, 1, 1, %70;\n\t}"
                 : FUSEWRIGHT_SUMS_64(d)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(accumulate)), "n"(kMajorB == Major::MN));
}

template <Major kMajorB>
__device__ __forceinline__ void wgmma_registers(float (&d)[128], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
    asm volatile("{\n\t.reg .pred p;\n\tsetp.ne.b32 p, %133, 0;\n\t"
                 "wgmma.mma_async.sync.aligned.m64n256k16.f32.f16.f16 {" FUSEWRIGHT_NAMES_128
                 "}, {%128, %129, %130, %131}, %132, p, 1, 1, %134;\n\t}"
                 : FUSEWRIGHT_SUMS_128(d)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(accumulate)), "n"(kMajorB == Major::MN));
}

#undef FUSEWRIGHT_8
#undef FUSEWRIGHT_16
#undef FUSEWRIGHT_SUMS_32
#undef FUSEWRIGHT_NAMES_32
#undef FUSEWRIGHT_SUMS_48
#undef FUSEWRIGHT_NAMES_48
#undef FUSEWRIGHT_SUMS_64
#undef FUSEWRIGHT_NAMES_64
#undef FUSEWRIGHT_SUMS_80
#undef FUSEWRIGHT_NAMES_80
#undef FUSEWRIGHT_SUMS_96
#undef FUSEWRIGHT_NAMES_96
#undef FUSEWRIGHT_SUMS_112
#undef FUSEWRIGHT_NAMES_112
#undef FUSEWRIGHT_SUMS_128
#undef FUSEWRIGHT_NAMES_128

}  // namespace fusewright

// ======== sm90.cuh
// What Hopper's kernels share above its single instructions (sm90_ptx.cuh).

namespace fusewright {

__device__ __forceinline__ void mbarrier_wait(uint64_t* barrier, uint32_t parity) {
    while (!mbarrier_try_wait(barrier, parity)) {
    }
}

// Describes an operand in shared memory, in panels of 64 rows of 128 bytes, 128-byte swizzled, 1024-byte aligned.
// K-major: a row is 64 k of one m (n); the next 64 m (n) follow as the next panel.
// MN-major: a row is 64 m (n) of one k; the next 64 m (n) are the next panel, `panel` bytes on.
// Both step 1024 bytes from 8 rows to the next 8.
__device__ __forceinline__ uint64_t matrix_descriptor(const void* operand, uint32_t panel) {
    constexpr uint64_t kSwizzle128 = uint64_t(1) << 62;
    constexpr uint64_t kStride = uint64_t(1024 >> 4) << 32;
    return kSwizzle128 | kStride | uint64_t(panel >> 4) << 16 | (shared_address(operand) & 0x3ffff) >> 4;
}

// Registers have no index: a loop that is to stay short has its numbers go round instead, kCount at each turn.
template <int kCount, int kAll> __device__ __forceinline__ void turn_round(float (&x)[kAll]) {
    float first[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) first[i] = x[i];
#pragma unroll
    for (int i = kCount; i < kAll; ++i) x[i - kCount] = x[i];
#pragma unroll
    for (int i = 0; i < kCount; ++i) x[kAll - kCount + i] = first[i];
}

}  // namespace fusewright

// ======== lost_bits.cuh
// Whether a product of fp16 halves (split_f16.cuh) lost bits that no magnitude of a row or column tells of.
//
// Below 2^-14 (scaled) the halves keep fewer than 22 bits of an operand: they round to 2^-36. That is lost among the
// products of larger operands, unless each large one meets a small one. Then all sums of a row (or of a column, as far
// as a warp sees it) are small beside what such roundings, multiplied by the largest operands, may add up to. A warp
// with such a row or column says so, and the patch computes the tile again. Zeros are taken for what they seem.

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

// ======== undo_scale.cuh
// Sums of products of fp16 halves (split_f16.cuh) without the powers of two that the operands carry.

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

// ======== gemm_sm90.cuh
// Matrix product with a generated epilogue on Hopper's tensor cores: epilogue(A [M, K] · B [K, N]).
//
// A persistent, warp-specialised pipeline. In each block one thread (the producer) copies tiles of A and B to a ring of
// shared-memory stages through TMA; two warpgroups (the consumers) multiply them and hand their sums to the epilogue
// while the producer already loads the next tile. Blocks of a cluster may lie below each other: they want the same tile
// of B, so each copies a part of it and multicasts that to all. And they may share K (split-K), where there are too few
// tiles for the chip: each sums a part of K, then all exchange their sums through a stage of the ring, and each finishes
// some of the columns.
//
// The consumers either cooperate, each on half of a tile's rows, or play ping-pong: each computes every other tile of
// the block alone, so that one's epilogue runs beside the other's products.
//
// Operands are 16-bit, or floats that copies round to TF32. Three products of float32 halves, x·2^s = hi + lo·2^-11
// (split_f16.cuh), give float32's accuracy:
//     A·B·2^s = hi·hi + 2^-11 (hi·lo + lo·hi)
// Tensor cores round sums toward zero, so hi·hi is summed in short chains that are promoted: added, rounded to nearest,
// to the main sum. The corrections are 2^-11 as large and chain in an accumulator of their own.

namespace fusewright {

// Config, a struct of named constants:
//   Element        __half or __nv_bfloat16; or float, of which products take TF32, K-major both
//   kProducts      1, or 3: operands are pairs of planes [hi, lo]
//   kTileM, kTileN the tile of one block: 128 or 256 rows, 64 to 256 columns in steps of 32, as far as registers go
//   kPingPong      the consumers take turns, or else cooperate (turns: one product; 64 rows too)
//   kStages        of the ring
//   kCluster       1 or 2 blocks that share a tile of B
//   kSplitK        1 to 4 blocks that share a tile's K; the cluster has kCluster · kSplitK
//   kMajorA, kMajorB
//   kPromote       k summed by the tensor cores before promotion (three products): 16, 32 or 64
//   kGroup         clusters whose tiles lie below each other before the order goes on to the next columns (L2 reuse)
//   kVector        consecutive columns that a thread passes to the epilogue: 4, or 8 (better where results are 16-bit)
//   kScaled        operands carry powers of two, which are undone before the epilogue
//   kByLineA, kByLineB
//                  and each row of A, or column of B, has one of its own
//   kWhole         M and N are multiples of the tile: there is no code for tiles that end beyond
template <class Config> struct GemmSm90 {
    using Element = typename Config::Element;
    static constexpr int kTileM = Config::kTileM, kTileN = Config::kTileN, kStages = Config::kStages;
    static constexpr int kCluster = Config::kCluster, kSplitK = Config::kSplitK, kBlocks = kCluster * kSplitK;
    static constexpr int kVector = Config::kVector;
    static constexpr Major kMajorA = Config::kMajorA, kMajorB = Config::kMajorB;
    static constexpr bool kThreeProducts = Config::kProducts == 3, kScaled = Config::kScaled;
    static constexpr bool kPingPong = Config::kPingPong, kWhole = Config::kWhole;

    static constexpr int kConsumers = 2, kThreads = 128 * (1 + kConsumers), kConsumerWarps = 4 * kConsumers;
    static constexpr int kSharing = kPingPong ? 1 : kConsumers, kTileWarps = 4 * kSharing;  // of one tile
    static constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;  // of 168 that each thread starts with

    // A panel is what one TMA box holds, whatever the layout and the tile: 64 rows of 128 bytes, that is 64 m or n by 64 k
    // either way round (of floats by 32). So a tensor needs one map for all the products that it takes part in.
    static constexpr int kPanel = 64, kPanelBytes = kPanel * 128, kTileK = kIsFloat<Element> ? 32 : 64;
    static constexpr int kStep = kTileK / 4;
    // Of a K-major B narrower panels where whole ones do not make up a block's share; of one that is MN-major the last
    // panel is copied whole.
    static constexpr int kShareB = kTileN / kCluster, kDividesShare = kShareB & -kShareB;
    static constexpr int kPanelB = kMajorB == Major::K && kDividesShare < kPanel ? kDividesShare : kPanel;
    static constexpr int kPanelsA = kTileM / kPanel, kPanelsB = (kTileN + kPanelB - 1) / kPanelB;
    static constexpr int kPlanes = kThreeProducts ? 2 : 1;
    static constexpr int kPlaneA = kPanelsA * kPanelBytes, kPlaneB = kPanelsB * kPanelB * 128;

    // Each consumer warp turns its 16 rows of sums round in a slab of its own, 8 · kVector columns at a time.
    static constexpr int kSlabColumns = 8 * kVector, kSlabBytes = 16 * kSlabColumns * 4;

    static constexpr int kBlocksM = kPanelsA / kSharing, kSums = kTileN / 2;  // 64-row blocks a warpgroup; sums of each
    // What a block finishes of its tile.
    static constexpr int kPartN = kTileN / kSplitK, kPartSums = kSums / kSplitK;
    static_assert(kPanelsB % kCluster == 0 && kTileN % kSplitK == 0 && kPartN % kSlabColumns == 0);
    static_assert(kBlocksM * kSums * (kThreeProducts ? 3 : 1) <= 192, "more sums than registers");
    static_assert(!kThreeProducts || (kBlocksM == 1 && !kPingPong));
    static_assert(kSplitK == 1 || !kPingPong);

    struct Operands {
        const TensorMap &a, &b;
        int64_t M, N, K;
        SplitOperand split_a, split_b;  // where kScaled
        uint8_t* lost = nullptr;  // if given, 8 flags for each kPartN columns of a tile: whether a warp lost bits (LostBits)

        // Of each block: as many for all, so that their rings go round alike; beyond K copies are zeros. And a round of the
        // ring at least, so that a producer waits for this tile's exchange before it makes room for the next one's.
        __device__ int k_tiles() const {
            const int share = int((K + kTileK * kSplitK - 1) / (kTileK * kSplitK));
            return kSplitK > 1 ? max(share, kStages - 1) : share;
        }
    };

    // Place in the cluster: the block's among those that share B, and among those that share K; and the first rank of the
    // former.
    __device__ __forceinline__ static int rank_of_rows() { return kCluster > 1 ? cluster_rank() % kCluster : 0; }
    __device__ __forceinline__ static int rank_of_k() { return kSplitK > 1 ? cluster_rank() / kCluster : 0; }
    __device__ __forceinline__ static int first_rank() { return rank_of_k() * kCluster; }

    // The stage in turn, and the parity of the round that it is in.
    struct Ring {
        int stage = 0;
        uint32_t parity = 0;

        __device__ void advance() {
            if (++stage == kStages) stage = 0, parity ^= 1;
        }
        __device__ void skip(int stages) {
            parity ^= (stage + stages) / kStages & 1;
            stage = (stage + stages) % kStages;
        }
    };

    // Shared memory: the stages, the slabs, the barriers. kBytesA: of A in a stage.
    template <int kBytesA> struct MemoryFor {
        static constexpr int kStageBytes = kBytesA + kPlanes * kPlaneB;
        static constexpr int kSlabs = kStages * kStageBytes, kBarriers = kSlabs + kConsumerWarps * kSlabBytes;
        static constexpr int kBytes = kBarriers + (2 * kStages + kConsumers) * 8 + 1024;  // to align for the swizzle
        static_assert(kBytes <= 232448);
        unsigned char* base;

        __device__ unsigned char* a(int stage) const { return base + stage * kStageBytes; }
        __device__ unsigned char* b(int stage) const { return a(stage) + kBytesA; }
        __device__ float* slab(int warp) const { return reinterpret_cast<float*>(base + kSlabs + warp * kSlabBytes); }
        __device__ uint64_t* full(int stage) const { return reinterpret_cast<uint64_t*>(base + kBarriers) + stage; }
        __device__ uint64_t* empty(int stage) const { return full(kStages + stage); }
        __device__ uint64_t* turn(int group) const { return full(2 * kStages + group); }  // in ping-pong
        __device__ uint64_t* room() const { return turn(0); }                             // where blocks share K
    };
    using Memory = MemoryFor<kPlanes * kPlaneA>;
    static constexpr int kSharedBytes = Memory::kBytes;
    static constexpr int kExchangeBytes = (kSplitK - 1) * kTileM * kPartN * 4;  // that a block receives for a tile
    static_assert(kExchangeBytes <= Memory::kStageBytes);

    // The tiles of this block, in the order in which it computes them; both roles walk the same.
    struct Tiles {
        int rows, columns, index;  // of the grid of cluster tiles; index: the cluster's next
        int parts;                 // of kPartN columns that a row has

        __device__ explicit Tiles(const Operands& x)
            : rows(int((x.M + kTileM * kCluster - 1) / (kTileM * kCluster))),
              columns(int((x.N + kTileN - 1) / kTileN)),
              index(blockIdx.x / kBlocks),
              parts(int((x.N + kPartN - 1) / kPartN)) {}
        __device__ bool more() const { return index < rows * columns; }
        __device__ void advance() { index += gridDim.x / kBlocks; }
        __device__ int first_row() const { return group_start() + in_group() % group_rows(); }
        __device__ int m() const { return (first_row() * kCluster + int(blockIdx.x % kCluster)) * kTileM; }
        __device__ int n() const { return in_group() / group_rows() * kTileN; }
        __device__ int64_t part(int n) const { return int64_t(m() / kTileM) * parts + n / kPartN; }  // of its first column

      private:
        __device__ int group_start() const { return index / (Config::kGroup * columns) * Config::kGroup; }
        __device__ int group_rows() const { return min(Config::kGroup, rows - group_start()); }
        __device__ int in_group() const { return index % (Config::kGroup * columns); }
    };

    // The whole kernel. Grid: at most one block a multiprocessor, a multiple of kBlocks; kThreads threads; kSharedBytes.
    // Kernel: whose memory, loads and consumers these are, for kernels that share the rest.
    template <class Kernel = GemmSm90, class Epilogue>
    __device__ __forceinline__ static void run(const Operands& operands, const Epilogue& epilogue) {
        extern __shared__ unsigned char shared[];
        const typename Kernel::Memory memory{shared + (-shared_address(shared) & 1023)};
        setup(operands, memory);
        launch_before_wait();
        if (threadIdx.x < 128) {
            registers_release<kProducerRegisters>();
            if (threadIdx.x == 0) produce<Kernel>(operands, memory);
        } else {
            registers_acquire<kConsumerRegisters>();
            Kernel::consume(operands, memory, epilogue);
        }
        // A block stays until nobody in the cluster can still arrive at its barriers or copy to its memory.
        if constexpr (kBlocks > 1) cluster_sync();
    }

    template <class AnyMemory>
    __device__ __forceinline__ static void setup(const Operands& operands, const AnyMemory& memory) {
        if (threadIdx.x == 0) {
            tensor_map_prefetch(&operands.a);
            tensor_map_prefetch(&operands.b);
            for (int stage = 0; stage < kStages; ++stage) {
                mbarrier_init(memory.full(stage), 1);
                mbarrier_init(memory.empty(stage), kTileWarps * kCluster);
            }
            for (int group = 0; group < kConsumers; ++group)
                mbarrier_init(memory.turn(group), kSplitK > 1 ? kSplitK - 1 : 4);
            mbarrier_fence_init();
        }
        if constexpr (kBlocks > 1) cluster_sync();
        else __syncthreads();
    }

    // ---- Producer ---------------------------------------------------------------------------------------------------

    template <class Kernel>
    __device__ __forceinline__ static void produce(const Operands& operands, const typename Kernel::Memory& memory) {
        Ring ring;
        for (Tiles tiles(operands); tiles.more(); tiles.advance()) {
            const int m = tiles.m(), n = tiles.n(), k_tiles = operands.k_tiles(), first = rank_of_k() * k_tiles;
            for (int k_tile = 0; k_tile < k_tiles; ++k_tile, ring.advance()) {
                mbarrier_wait(memory.empty(ring.stage), ring.parity ^ 1);  // the first round finds every stage empty
                mbarrier_arrive_expect_tx(memory.full(ring.stage), memory.kStageBytes);
                Kernel::load_a(operands, memory, ring.stage, m, (first + k_tile) * kTileK);
                load_b(operands, memory, ring.stage, n, (first + k_tile) * kTileK);
            }
            if constexpr (kSplitK > 1) {
                make_room(memory, ring);
                ring.advance();
            }
        }
    }

    // The stage in turn is filled by the consumers of the blocks that share K with this one, who are told that they may.
    __device__ __forceinline__ static void make_room(const Memory& memory, const Ring& ring) {
        mbarrier_wait(memory.empty(ring.stage), ring.parity ^ 1);
        mbarrier_arrive_expect_tx(memory.full(ring.stage), kExchangeBytes);
#pragma unroll
        for (int other = 1; other < kSplitK; ++other)
            mbarrier_arrive_remote(memory.room(), (cluster_rank() + other * kCluster) % kBlocks);
    }

    __device__ __forceinline__ static void load_a(const Operands& operands, const Memory& memory, int stage, int m,
                                                  int k) {
#pragma unroll
        for (int plane = 0; plane < kPlanes; ++plane)
#pragma unroll
            for (int panel = 0; panel < kPanelsA; ++panel) {
                const int row = m + panel * kPanel;
                tensor_load(memory.a(stage) + plane * kPlaneA + panel * kPanelBytes, &operands.a, memory.full(stage),
                            kMajorA == Major::K ? k : row, kMajorA == Major::K ? row : k, plane);
            }
    }

    template <class AnyMemory>
    __device__ __forceinline__ static void load_b(const Operands& operands, const AnyMemory& memory, int stage, int n,
                                                  int k) {
        const int rank = rank_of_rows();
#pragma unroll
        for (int plane = 0; plane < kPlanes; ++plane)
#pragma unroll
            for (int part = 0; part < kPanelsB; part += kCluster) {
                const int panel = part + rank, column = n + panel * kPanelB;
                unsigned char* destination = memory.b(stage) + plane * kPlaneB + panel * kPanelB * 128;
                uint64_t* full = memory.full(stage);
                const int x = kMajorB == Major::K ? k : column, y = kMajorB == Major::K ? column : k;
                if constexpr (kCluster > 1)
                    tensor_load_multicast(destination, &operands.b, full, x, y, plane,
                                          ((1 << kCluster) - 1) << first_rank());
                else
                    tensor_load(destination, &operands.b, full, x, y, plane);
            }
    }

    // ---- Consumers --------------------------------------------------------------------------------------------------

    using Sums = float[kBlocksM][kSums];
    using Part = float[kBlocksM][kPartSums];

    template <class Epilogue>
    __device__ __forceinline__ static void consume(const Operands& operands, const Memory& memory,
                                                   const Epilogue& epilogue) {
        Ring ring;
        Tiles tiles(operands);
        const int group = uniform(threadIdx.x / 128) - 1, k_tiles = operands.k_tiles();
        const int first_block = kPingPong ? 0 : group * kBlocksM;  // of 64 rows: this group's in the tile
        // Of the turn that is waited for: group 0 finds the first one come. Or of the room.
        uint32_t parity = kPingPong ? group ^ 1 : 0;
        if (kPingPong && group == 1) pass_over(tiles, ring, k_tiles);
        for (; tiles.more(); tiles.advance()) {
            Sums sums;
            if constexpr (kPingPong) mbarrier_wait(memory.turn(group), parity);
            if constexpr (kThreeProducts)
                compute_three_products(sums, ring, memory, first_block, k_tiles);
            else
                compute(sums, ring, memory, first_block, k_tiles);
            if constexpr (kSplitK > 1) {
                Part part;
                exchange(sums, part, ring, memory, parity);
                conclude(part, tiles, first_block, operands, memory, epilogue);
            } else {
                conclude(sums, tiles, first_block, operands, memory, epilogue);
            }
            if constexpr (kPingPong) pass_over(tiles, ring, k_tiles);
            parity ^= 1;
        }
    }

    // A part of the tile for each block: to the others go their sums, and theirs are added to this one's.
    __device__ __forceinline__ static void exchange(Sums& sums, Part& part, Ring& ring, const Memory& memory,
                                                    uint32_t parity) {
        constexpr int kThreadsOf = 128 * kConsumers, kChunks = kPartSums / 4;
        const int thread = threadIdx.x - 128, rank = rank_of_k();
        float4* received = reinterpret_cast<float4*>(memory.a(ring.stage)) + thread;
        const auto place = [](int other, int block, int chunk) {
            return (((other - 1) * kBlocksM + block) * kChunks + chunk) * kThreadsOf;
        };
        // Registers have no index: this block's part comes first, then that of the next rank, and so on.
#pragma unroll 1
        for (int i = 0; i < rank; ++i)
#pragma unroll
            for (int block = 0; block < kBlocksM; ++block) turn_round<kPartSums>(sums[block]);
        mbarrier_wait(memory.room(), parity);
#pragma unroll
        for (int other = 1; other < kSplitK; ++other)
#pragma unroll
            for (int block = 0; block < kBlocksM; ++block)
#pragma unroll
                for (int chunk = 0; chunk < kChunks; ++chunk) {
                    const float* from = &sums[block][other * kPartSums + chunk * 4];
                    store_async(received + place(other, block, chunk), memory.full(ring.stage),
                                (cluster_rank() + other * kCluster) % kBlocks,
                                make_float4(from[0], from[1], from[2], from[3]));
                }
        mbarrier_wait(memory.full(ring.stage), ring.parity);
#pragma unroll
        for (int block = 0; block < kBlocksM; ++block)
#pragma unroll
            for (int chunk = 0; chunk < kChunks; ++chunk) {
                float* to = &part[block][chunk * 4];
#pragma unroll
                for (int i = 0; i < 4; ++i) to[i] = sums[block][chunk * 4 + i];
#pragma unroll
                for (int other = 1; other < kSplitK; ++other) {
                    const float4 theirs = received[place(other, block, chunk)];
                    to[0] += theirs.x, to[1] += theirs.y, to[2] += theirs.z, to[3] += theirs.w;
                }
            }
        fence_proxy_async();  // bulk copies overwrite what came by another way
        __syncwarp();
        release(memory, ring.stage);
        ring.advance();
    }

    // From complete sums to results.
    template <class Epilogue>
    __device__ __forceinline__ static void conclude(Part& sums, const Tiles& tiles, int first_block,
                                                    const Operands& operands, const Memory& memory,
                                                    const Epilogue& epilogue) {
        const int m = tiles.m() + first_block * 64 + uniform(threadIdx.x / 32 % 4) * 16;
        const int n = tiles.n() + rank_of_k() * kPartN;
        // The last cluster may have a block too many, and the last tile parts.
        if ((kCluster > 1 && tiles.m() >= operands.M) || (kSplitK > 1 && n >= operands.N)) return;
        if constexpr (kScaled) {
            if (operands.lost) {
                float* slab = memory.slab(threadIdx.x / 32 - 4);
                note_lost(operands, tiles.part(n), lost_bits(operands).found(sums, slab, m, n));
            }
            undo_scale(operands).apply(sums, m, n);
        }
        finish(sums, operands, memory, m, n, epilogue);
    }

    // The other group's tile.
    __device__ __forceinline__ static void pass_over(Tiles& tiles, Ring& ring, int k_tiles) {
        tiles.advance();
        ring.skip(k_tiles);
    }

    // What the products of one stage read: descriptors, and how far from one k16 step to the next.
    struct Stage {
        static constexpr uint32_t kStepA = (kMajorA == Major::K ? 32 : kStep * 128) >> 4;
        static constexpr uint32_t kStepB = (kMajorB == Major::K ? 32 : kStep * 128) >> 4;
        uint64_t a_, b_;

        template <class AnyMemory>
        __device__ Stage(const AnyMemory& memory, int stage, int first_block)
            : a_(matrix_descriptor(memory.a(stage) + first_block * kPanelBytes, kPanelBytes)),
              b_(matrix_descriptor(memory.b(stage), kPanelBytes)) {}
        __device__ uint64_t a(int block, int step, int plane = 0) const {
            return a_ + ((plane * kPlaneA + block * kPanelBytes) >> 4) + step * kStepA;
        }
        __device__ uint64_t b(int step, int plane = 0) const { return b_ + (plane * kPlaneB >> 4) + step * kStepB; }
    };

    __device__ __forceinline__ static void product(float (&sums)[kSums], uint64_t a, uint64_t b, bool accumulate) {
        wgmma<Element, kMajorA, kMajorB>(sums, a, b, accumulate);
    }

    __device__ __forceinline__ static void compute(Sums& sums, Ring& ring, const Memory& memory, int first_block,
                                                   int k_tiles) {
        int previous = -1;
        for (int k_tile = 0; k_tile < k_tiles; ++k_tile, ring.advance()) {
            mbarrier_wait(memory.full(ring.stage), ring.parity);
            if (kPingPong && k_tile == k_tiles - 1) pass_turn(memory);
            const Stage stage(memory, ring.stage, first_block);
            wgmma_fence();
#pragma unroll
            for (int step = 0; step < kTileK / kStep; ++step)
#pragma unroll
                for (int block = 0; block < kBlocksM; ++block)
                    product(sums[block], stage.a(block, step), stage.b(step), k_tile > 0 || step > 0);
            wgmma_commit();
            wgmma_wait<1>();  // the next stage's products are queued before this one's have ended
            if (previous >= 0) release(memory, previous);
            previous = ring.stage;
        }
        wgmma_wait<0>();
        release(memory, previous);
        for (int block = 0; block < kBlocksM; ++block) hold_registers(sums[block]);
    }

    __device__ __forceinline__ static void compute_three_products(Sums& sums, Ring& ring, const Memory& memory,
                                                                  int first_block, int k_tiles) {
        constexpr int kSteps = Config::kPromote / kStep;
        float(&main)[kSums] = sums[0], chain[kSums], corrections[kSums];
#pragma unroll
        for (int i = 0; i < kSums; ++i) main[i] = corrections[i] = 0;
        int previous = -1;
        for (int k_tile = 0; k_tile < k_tiles; ++k_tile, ring.advance()) {
            mbarrier_wait(memory.full(ring.stage), ring.parity);
            const Stage stage(memory, ring.stage, first_block);
#pragma unroll
            for (int first = 0; first < kTileK / kStep; first += kSteps) {
                wgmma_fence();
#pragma unroll
                for (int step = first; step < first + kSteps; ++step)
                    product(chain, stage.a(0, step), stage.b(step), step > first);
                wgmma_commit();
#pragma unroll
                for (int step = first; step < first + kSteps; ++step) {
                    product(corrections, stage.a(0, step, 0), stage.b(step, 1), true);
                    product(corrections, stage.a(0, step, 1), stage.b(step, 0), true);
                }
                wgmma_commit();
                wgmma_wait<1>();  // the chain is complete; it is promoted while the corrections run
                if (first == 0 && previous >= 0) release(memory, previous);
                promote(main, chain);
            }
            previous = ring.stage;
        }
        wgmma_wait<0>();
        release(memory, previous);
        hold_registers(corrections);
#pragma unroll
        for (int i = 0; i < kSums; ++i) main[i] = fmaf(corrections[i], 0x1p-11f, main[i]);
    }

    __device__ __forceinline__ static void promote(float (&main)[kSums], float (&chain)[kSums]) {
        hold_registers(chain);
#pragma unroll
        for (int i = 0; i < kSums; ++i) main[i] = __fadd_rn(main[i], chain[i]);
        hold_registers(chain);
    }

    // That the producer fills stages in order is not order enough: a wait tells odd rounds from even, no more, so a
    // group that came to a stage a round early would take what the other still reads for its own. It waits, therefore,
    // until all the other's warps have seen their last stage full. Their last products still run when its first follow.
    __device__ __forceinline__ static void pass_turn(const Memory& memory) {
        const int other = (threadIdx.x / 128 - 1) ^ 1;
        if (threadIdx.x % 32 == 0) mbarrier_arrive(memory.turn(other));
    }

    // Tells every producer that fills this stage that this warp has read it: with multicast, that of each block.
    template <class AnyMemory> __device__ __forceinline__ static void release(const AnyMemory& memory, int stage) {
        const int lane = threadIdx.x % 32;
        if constexpr (kCluster > 1) {
            if (lane < kCluster) mbarrier_arrive_remote(memory.empty(stage), first_rank() + lane);
        } else {
            if (lane == 0) mbarrier_arrive(memory.empty(stage));
        }
    }

    __device__ __forceinline__ static LostBits<kBlocksM, kPartSums> lost_bits(const Operands& x) {
        return {x.split_a, x.split_b, x.M, x.N, x.K};
    }

    __device__ __forceinline__ static UndoScale<kBlocksM, kPartSums, Config::kByLineA, Config::kByLineB> undo_scale(
        const Operands& x) {
        return {x.split_a, x.split_b, x.M, x.N};
    }

    __device__ __forceinline__ static void note_lost(const Operands& operands, int64_t tile, bool lost) {
        constexpr int kFlags = 8 / kTileWarps;  // a warp
        const int lane = threadIdx.x % 32, warp = (threadIdx.x / 32 - 4) % kTileWarps;
        if (lane < kFlags) operands.lost[tile * 8 + warp * kFlags + lane] = lost;
    }

    // m: the warp's first row. A warp whose rows and columns all exist takes a path without bounds: there the epilogue
    // is straight code, whose loads the compiler can issue together and early.
    template <class Epilogue>
    __device__ __forceinline__ static void finish(Part& sums, const Operands& operands, const Memory& memory, int m,
                                                  int n, const Epilogue& epilogue) {
        if (kWhole || (m + (kBlocksM - 1) * 64 + 16 <= operands.M && n + kPartN <= operands.N))
            turn<true>(sums, operands, memory, m, n, epilogue);
        else
            turn<false>(sums, operands, memory, m, n, epilogue);
    }

    // Sums lie two columns a thread (see wgmma); the epilogue wants kVector, and whole lines a warp: through the slab.
    template <bool kInside, class Epilogue>
    __device__ __forceinline__ static void turn(Part& sums, const Operands& operands, const Memory& memory,
                                                int m, int n, const Epilogue& epilogue) {
        const int lane = threadIdx.x % 32;
        float* slab = memory.slab(threadIdx.x / 32 - 4);
#pragma unroll
        for (int block = 0; block < kBlocksM; ++block) {
#pragma unroll(kInside ? kPartN / kSlabColumns : 1)
            for (int column = 0; column < kPartN; column += kSlabColumns) {
                __syncwarp();
                write_slab(slab, &sums[block][kInside ? column / 2 : 0], lane);
                __syncwarp();
#pragma unroll(kInside ? 4 : 1)
                for (int part = 0; part < 4; ++part) {
                    const int slab_row = part * 4 + lane / 8, slab_column = lane % 8 * kVector;
                    float values[kVector];
#pragma unroll
                    for (int i = 0; i < kVector; i += 4)
                        *reinterpret_cast<float4*>(&values[i]) =
                            *reinterpret_cast<const float4*>(slab + slab_index(slab_row, slab_column + i));
                    const int64_t y = m + block * 64 + slab_row, x = n + column + slab_column;
                    const int64_t left = y < operands.M ? operands.N - x : 0;
                    const int count = kInside || left > kVector ? kVector : int(left);
                    epilogue.template operator()<kVector>(y, x, count, values);
                }
                if constexpr (!kInside) turn_round<kSlabColumns / 2>(sums[block]);
            }
        }
    }

    __device__ __forceinline__ static void write_slab(float* slab, const float* sums, int lane) {
#pragma unroll
        for (int i = 0; i < kSlabColumns / 2; i += 4) {
            float* upper = slab + slab_index(lane / 4, i / 4 * 8 + lane % 4 * 2);
            *reinterpret_cast<float2*>(upper) = make_float2(sums[i], sums[i + 1]);
            *reinterpret_cast<float2*>(upper + 8 * kSlabColumns) = make_float2(sums[i + 2], sums[i + 3]);
        }
    }

    // Chunks of 4 columns are swizzled so that neither the pairs written nor the chunks read meet in a bank: four rows
    // are written at once, so they take the chunk's bits 1 and 2; chunks 8 and up are read with those below, so bit 0.
    __device__ __forceinline__ static int slab_index(int row, int column) {
        const int chunk = column / 4;
        return row * kSlabColumns + (chunk ^ (row % 4) << 1 ^ chunk >> 3) * 4 + column % 4;
    }

    // Tells the compiler that a warp agrees on a number, which then lives in a uniform register.
    __device__ __forceinline__ static int uniform(int x) { return __shfl_sync(~0u, x, 0); }
};

}  // namespace fusewright

// ======== scalar.cuh
// Scalar functions that generated code calls where C++ has no operator with ATen's meaning.

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

// ======== gemm_simt.cuh
// Matrix product with a generated epilogue on the CUDA cores: epilogue(A [M, K] · B [K, N]), any strides, any sizes.
//
// A block computes a tile of the result. It walks along K: while its threads multiply one pair of tiles of A and B out
// of shared memory, the next pair is on its way from global memory to registers, and two buffers take turns. A thread
// computes MicroM x MicroN sums, so that each value it reads from shared memory is used that many times.
//
// A sum of K products in one chain has a rounding error that grows with K. So a thread sums kBlockK products at a time
// and adds each such block to a main sum. Main sums lie in shared memory, where each thread visits only its own:
// registers stay free, and no barrier is needed.

namespace fusewright {

// One operand's way from global to shared memory, where tile[k][row] lies. "Row" means a row of A or a column of B.
template <class Element, class Accumulator, int Tile, int TileK, int Threads, Major Layout, bool Vectorised, bool Whole>
struct SimtOperand {
    // A thread moves kWidth consecutive elements at once; neighbouring lanes cover the rows of an MN-major tile, else
    // kSpan along k (32 bytes of float or double, a sector of memory). Rows of the shared tile are padded by 4, so that
    // lanes which write to kSpan of them at once meet in no bank.
    static constexpr int kVector = 16 / sizeof(Accumulator), kWidth = Vectorised ? kVector : 1, kSpan = 2 * kVector;
    static constexpr int kMoves = Tile * TileK / (kWidth * Threads), kPitch = Tile + 4;
    static constexpr int kLanes = Layout == Major::MN ? Tile / kWidth : kSpan / kWidth;
    static_assert(!Vectorised || Layout != Major::Strided, "a vector needs a contiguous dimension");
    static_assert(TileK % kSpan == 0 && kMoves * kWidth * Threads == Tile * TileK);

    using SharedTile = Accumulator[TileK][kPitch];

    // Where in the tile the move `index` goes. Threads and moves are powers of two, so that an index is
    // threadIdx.x + move * Threads without carries, and coordinates of both terms can be added.
    __device__ __forceinline__ static constexpr int row_of(int index) {
        return Layout == Major::MN ? index % kLanes * kWidth : index / kLanes % Tile;
    }
    __device__ __forceinline__ static constexpr int k_of(int index) {
        return Layout == Major::MN ? index / kLanes : index % kLanes * kWidth + index / (kLanes * Tile) * kSpan;
    }

    const Element* source;  // the thread's first element of the next tile
    int64_t row_stride, k_stride;
    int rows;  // of the tile that exist
    Element staged[kMoves][kWidth];

    __device__ __forceinline__ SimtOperand(const Element* base, int64_t row_stride, int64_t k_stride, int64_t first_row,
                                           int64_t all_rows)
        : row_stride(Vectorised && Layout == Major::MN ? 1 : row_stride),
          k_stride(Vectorised && Layout == Major::K ? 1 : k_stride),
          rows(Whole || all_rows - first_row >= Tile ? Tile : int(all_rows - first_row)) {
        source = base + (first_row + row_of(threadIdx.x)) * this->row_stride + k_of(threadIdx.x) * this->k_stride;
    }

    // Starts to load the next tile, of which `depth` k exist. What lies outside is not read, and counts as 0. Past the
    // last of whole tiles nothing is loaded, and what was stays: nobody multiplies it.
    __device__ __forceinline__ void stage(int depth) {
#pragma unroll
        for (int i = 0; i < kMoves; ++i) {
            const Element* p = source + row_of(i * Threads) * row_stride + k_of(i * Threads) * k_stride;
            if (rows == Tile && depth == TileK)
                Access<kWidth, Element>::load(staged[i], p);
            else if constexpr (!Whole)
                load_vector(staged[i], p, count(i, depth));
        }
        source += TileK * k_stride;
    }

    // Writes the staged tile to shared memory.
    __device__ __forceinline__ void commit(SharedTile& tile) const {
#pragma unroll
        for (int i = 0; i < kMoves; ++i) {
            const int row = row_of(threadIdx.x) + row_of(i * Threads), k = k_of(threadIdx.x) + k_of(i * Threads);
            Accumulator values[kWidth];
#pragma unroll
            for (int j = 0; j < kWidth; ++j) values[j] = Accumulator(staged[i][j]);
            if constexpr (Layout == Major::MN) {
                Access<kWidth, Accumulator>::store(&tile[k][row], values);
            } else {
#pragma unroll
                for (int j = 0; j < kWidth; ++j) tile[k + j][row] = values[j];
            }
        }
    }

private:
    // How many elements of a move exist.
    __device__ __forceinline__ int count(int move, int depth) const {
        int thread = threadIdx.x;
        asm volatile("" : "+r"(thread));  // computes the rest here, where it is seldom needed: registers are dear
        const int row_count = rows - row_of(thread) - row_of(move * Threads);
        const int k_count = depth - k_of(thread) - k_of(move * Threads);
        if (row_count <= 0 || k_count <= 0) return 0;
        const int left = Layout == Major::MN ? row_count : k_count;
        return left < kWidth ? left : kWidth;
    }
};

// Vectorised: bases and strides are multiples of kAlignment bytes, but for the contiguous dimension, whose stride is 1.
// TileK: a multiple of 8 that leaves each thread at least one move of A and of B.
// Whole: M, N and K are multiples of the tile, and nothing is guarded. Unroll: steps along k that are straight code, an
// even divisor of TileK: all are fastest, few compile soonest.
// Epilogue: template <int V> void operator()(int64_t m, int64_t n, int count, const Accumulator (&sums)[V]) const
// finishes columns n … n + count - 1 of row m. All lanes of a warp call it together, those past the end with count <= 0,
// and in the order that store_bits asks for.
// Grid: x = ceil(M / TileM) · ceil(N / TileN). Block: kThreads. Dynamic shared memory: kSharedBytes.
template <class Element, class Accumulator, int TileM, int TileN, int TileK, Major MajorA, Major MajorB,
          bool Vectorised, int MicroM = 16, int MicroN = 8, bool Whole = false, int Unroll = TileK>
struct GemmSimt {
    // A warp's lanes stand 4 x 8. Each handles kVector rows and columns that lie together, several times over.
    static constexpr int kVector = 16 / sizeof(Accumulator), kLanesM = 4, kLanesN = 8;
    static constexpr int kWarpsM = TileM / (kLanesM * MicroM), kWarpsN = TileN / (kLanesN * MicroN);
    static constexpr int kThreads = 32 * kWarpsM * kWarpsN, kGroupsM = MicroM / kVector, kGroupsN = MicroN / kVector;
    // Products in one chain. Adding a block up costs a large tile more, since few warps are there to hide it; a small
    // tile often has a short K, of which a library would make several sums.
    static constexpr int kBlockK = MicroM * MicroN >= 128 ? 128 : MicroM * MicroN >= 64 ? 64 : 32;
    static constexpr int kGroupM = 8;    // tiles below each other that neighbouring blocks compute
    static constexpr int kAlignment = kVector * sizeof(Element);
    // A multiprocessor has 65536 registers: 128 for each thread while its sums take at most 32 of them, else 256.
    static constexpr int kSumRegisters = MicroM * MicroN * sizeof(Accumulator) / 4;
    static constexpr int kBlocksPerMultiprocessor = (kSumRegisters <= 32 ? 512 : 256) / kThreads;
    static_assert(kSumRegisters <= 128 && kBlocksPerMultiprocessor > 0);
    static_assert(TileK % Unroll == 0 && Unroll % 2 == 0);

    using A = SimtOperand<Element, Accumulator, TileM, TileK, kThreads, MajorA, Vectorised, Whole>;
    using B = SimtOperand<Element, Accumulator, TileN, TileK, kThreads, MajorB, Vectorised, Whole>;

    struct Tiles {
        typename A::SharedTile a;
        typename B::SharedTile b;
    };
    struct Shared {
        Tiles buffers[2];
        Accumulator sums[MicroM][kGroupsN][kThreads][kVector];
    };
    static constexpr int kSharedBytes = sizeof(Shared);

    // Strides are in elements. N < 2^31.
    template <class Epilogue>
    __device__ __forceinline__ static void run(const Element* a, int64_t a_row_stride, int64_t a_k_stride,
                                               const Element* b, int64_t b_k_stride, int64_t b_col_stride, int64_t M,
                                               int64_t N, int64_t K, const Epilogue& epilogue) {
        int64_t first_m;
        int first_n;
        locate(blockIdx.x, M, N, first_m, first_n);
        run_tile(a, a_row_stride, a_k_stride, b, b_k_stride, b_col_stride, M, N, K, first_m, first_n, epilogue);
    }

    // One tile. A block that computes several passes a barrier between them.
    template <class Epilogue>
    __device__ __forceinline__ static void run_tile(const Element* a, int64_t a_row_stride, int64_t a_k_stride,
                                                    const Element* b, int64_t b_k_stride, int64_t b_col_stride,
                                                    int64_t M, int64_t N, int64_t K, int64_t first_m, int first_n,
                                                    const Epilogue& epilogue) {
        extern __shared__ __align__(16) unsigned char dynamic_shared[];
        Shared& shared = *reinterpret_cast<Shared*>(dynamic_shared);
        A operand_a(a, a_row_stride, a_k_stride, first_m, M);
        B operand_b(b, b_col_stride, b_k_stride, first_n, N);

        const Accumulator zero[kVector] = {};
        for (int i = 0; i < MicroM * kGroupsN; ++i)
            Access<kVector, Accumulator>::store(shared.sums[i / kGroupsN][i % kGroupsN][threadIdx.x], zero);

        const auto stage = [&](int tile) {
            operand_a.stage(depth(K, tile));
            operand_b.stage(depth(K, tile));
        };
        const auto commit = [&](int tile) {
            operand_a.commit(shared.buffers[tile % 2].a);
            operand_b.commit(shared.buffers[tile % 2].b);
        };
        Fragments fragments[2];
        // One barrier is enough. Whoever passes it has read all of the buffer before this one, the next to be written.
        const auto enter = [&](int tile) {
            __syncthreads();
            stage(tile + 1);
            fragments[0].read(shared.buffers[tile % 2], 0);
        };

        // Each step reads what the next one multiplies, and a tile is committed before the last steps of the one before
        // it: while a thread waits for memory, it still has products to compute.
        const int tile_count = int((K + TileK - 1) / TileK);
        stage(0);
        commit(0);
        enter(0);
        for (int tile = 0; tile < tile_count;) {
            Accumulator sums[MicroM][MicroN] = {};
            do {
                const Tiles& tiles = shared.buffers[tile++ % 2];
#pragma unroll 1
                for (int first = 0; first < TileK; first += Unroll)
#pragma unroll
                    for (int step = 0; step < Unroll; ++step) {
                        const int k = first + step;
                        if (k == TileK * 3 / 4) commit(tile);
                        if (k + 1 < TileK)
                            fragments[(step + 1) % 2].read(tiles, k + 1);
                        else
                            enter(tile);
                        fragments[step % 2].multiply(sums);
                    }
            } while (tile < tile_count && tile % (kBlockK / TileK) != 0);
            add_block(shared, sums);
        }
        finish(shared, first_m, first_n, M, N, epilogue);
    }

    // Where a tile begins. Tiles go down kGroupM rows before they go on to the next columns: blocks that run together
    // then share rows of A and columns of B in the L2 cache.
    __device__ __forceinline__ static void locate(int tile, int64_t M, int64_t N, int64_t& first_m, int& first_n) {
        const int tiles_m = int((M + TileM - 1) / TileM), tiles_n = int((N + TileN - 1) / TileN);
        const int group = tile / (kGroupM * tiles_n), within = tile % (kGroupM * tiles_n);
        const int below = tiles_m - group * kGroupM, height = below < kGroupM ? below : kGroupM;
        first_m = int64_t(group * kGroupM + within % height) * TileM;
        first_n = within / height * TileN;
    }

private:
    // One k of a thread's rows of A and columns of B.
    struct Fragments {
        Accumulator x[MicroM], y[MicroN];

        __device__ __forceinline__ void read(const Tiles& tiles, int k) {
#pragma unroll
            for (int group = 0; group < kGroupsM; ++group)
                Access<kVector, Accumulator>::load(&x[group * kVector], &tiles.a[k][rows(group)]);
#pragma unroll
            for (int group = 0; group < kGroupsN; ++group)
                Access<kVector, Accumulator>::load(&y[group * kVector], &tiles.b[k][columns(group)]);
        }

        __device__ __forceinline__ void multiply(Accumulator (&sums)[MicroM][MicroN]) const {
#pragma unroll
            for (int i = 0; i < MicroM; ++i)
#pragma unroll
                for (int j = 0; j < MicroN; ++j) sums[i][j] = fma(x[i], y[j], sums[i][j]);
        }
    };

    // How many of the k in a tile exist: none past the last tile.
    __device__ __forceinline__ static int depth(int64_t K, int tile) {
        const int64_t left = K - int64_t(tile) * TileK;
        return left <= 0 ? 0 : left < TileK ? int(left) : TileK;
    }

    // A thread's rows and columns come in groups of kVector that lie together; between them lie those of other lanes.
    // Returns the first of a group, within the tile.
    __device__ __forceinline__ static int rows(int group) {
        const int warp = threadIdx.x / 32 % kWarpsM, lane = threadIdx.x % 32 / kLanesN;
        return ((warp * kGroupsM + group) * kLanesM + lane) * kVector;
    }
    __device__ __forceinline__ static int columns(int group) {
        const int warp = threadIdx.x / 32 / kWarpsM, lane = threadIdx.x % kLanesN;
        return ((warp * kGroupsN + group) * kLanesN + lane) * kVector;
    }

    // Adds a block's sums to the main sums.
    __device__ __forceinline__ static void add_block(Shared& shared, const Accumulator (&sums)[MicroM][MicroN]) {
#pragma unroll
        for (int i = 0; i < MicroM; ++i)
#pragma unroll
            for (int group = 0; group < kGroupsN; ++group) {
                Accumulator* place = shared.sums[i][group][threadIdx.x];
                Accumulator main[kVector];
                Access<kVector, Accumulator>::load(main, place);
#pragma unroll
                for (int v = 0; v < kVector; ++v) main[v] += sums[i][group * kVector + v];
                Access<kVector, Accumulator>::store(place, main);
                asm volatile("" ::: "memory");  // else all are loaded first, into registers that there are not
            }
    }

    // Eight lanes of a warp, side by side, write one row: whole lines, and whole bytes of a bit mask.
    template <class Epilogue>
    __device__ __forceinline__ static void finish(const Shared& shared, int64_t first_m, int first_n, int64_t M,
                                                  int64_t N, const Epilogue& epilogue) {
#pragma unroll 1
        for (int i = 0; i < MicroM; ++i)
#pragma unroll 1
            for (int group = 0; group < kGroupsN; ++group) {
                const int64_t m = first_m + rows(i / kVector) + i % kVector;
                const int64_t n = first_n + columns(group), left = N - n;
                Accumulator sums[kVector];
                Access<kVector, Accumulator>::load(sums, shared.sums[i][group][threadIdx.x]);
                const int count = Whole || left > kVector ? kVector : int(left);
                epilogue.template operator()<kVector>(m, n, Whole || m < M ? count : 0, sums);
            }
    }
};

}  // namespace fusewright

// ======== column_sum.cuh
// Sums of generated values over the rows of a matrix, one for each column: bias gradients and their like.
//
// A block takes a strip of columns, as wide as the lines of memory, and a range of rows. Its threads stand 8 along the
// strip and many down the rows; each sums its own rows, then the block adds up its threads. Sums are added in an order
// that depends on sizes alone, never on timing, and in short chains, because a chain's rounding error grows with its
// length.

namespace fusewright {

// Functor: static constexpr int kColumnSums: how many sums each column has, and
//   template <int V> void operator()(int64_t m, int64_t n, int count, Accumulator (&sums)[kColumnSums][V]) const
//     adds the values of columns n … n + count - 1 of row m. All lanes of a warp call it together, those past the end
//     with count <= 0, and in the order that store_bits asks for.
//   template <int V> void finish(int64_t split, int64_t n, int count, const Accumulator (&sums)[kColumnSums][V]) const
//     stores the sums of one range of rows. Called once for each V columns, not by all lanes.
// Grid: x = ceil(cols / kStrip), y = ceil(rows / rows_per_split).
template <class Functor, int Threads, int V, class Accumulator = float> struct ColumnSum {
    static constexpr int kThreads = Threads, kSums = Functor::kColumnSums;
    static constexpr int kLanes = 8, kStrip = kLanes * V;  // threads and columns along the strip
    static constexpr int kHeight = Threads / kLanes;       // rows that the block takes at once
    static constexpr int kChain = 32;                      // values in one chain of additions
    static_assert(Threads % 32 == 0 && V <= 16 && (V & (V - 1)) == 0);

    using Sums = Accumulator[kSums][V];

    __device__ __forceinline__ static void run(int64_t rows, int64_t cols, int64_t rows_per_split,
                                               const Functor& functor) {
        const int64_t n = int64_t(blockIdx.x) * kStrip + threadIdx.x % kLanes * V, left = cols - n;
        const int count = int(left < V ? left : V);
        const int64_t first = blockIdx.y * rows_per_split, split_end = first + rows_per_split;
        const int64_t end = split_end < rows ? split_end : rows;

        Sums total = {};
        for (int64_t top = first; top < end;) {
            Sums chain = {};
#pragma unroll 2
            for (int i = 0; i < kChain && top < end; ++i, top += kHeight) {
                const int64_t m = top + threadIdx.x / kLanes;
                functor(m, n, m < end ? count : 0, chain);
            }
            add(total, chain);
        }
        add_rows_of_warp(total);
        add_warps(total);
        if (threadIdx.x < kLanes) functor.finish(blockIdx.y, n, count, total);
    }

private:
    __device__ __forceinline__ static void add(Sums& sums, const Sums& more) {
#pragma unroll
        for (int s = 0; s < kSums; ++s)
#pragma unroll
            for (int i = 0; i < V; ++i) sums[s][i] += more[s][i];
    }

    // The lanes of a warp stand 8 along the strip and 4 down the rows.
    __device__ __forceinline__ static void add_rows_of_warp(Sums& sums) {
#pragma unroll
        for (int lanes = kLanes; lanes < 32; lanes *= 2)
#pragma unroll
            for (int s = 0; s < kSums; ++s)
#pragma unroll
                for (int i = 0; i < V; ++i) sums[s][i] += __shfl_xor_sync(0xffffffff, sums[s][i], lanes);
    }

    // Leaves the block's sums in its first 8 threads.
    __device__ __forceinline__ static void add_warps(Sums& sums) {
        __shared__ __align__(16) Accumulator shared[Threads / 32][kSums][kStrip];
        const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
        if (lane < kLanes)
#pragma unroll
            for (int s = 0; s < kSums; ++s) Access<V, Accumulator>::store(&shared[warp][s][lane * V], sums[s]);
        __syncthreads();
        if (threadIdx.x < kLanes)
            for (int other = 1; other < Threads / 32; ++other) {
                Sums more;
#pragma unroll
                for (int s = 0; s < kSums; ++s) Access<V, Accumulator>::load(more[s], &shared[other][s][lane * V]);
                add(sums, more);
            }
    }
};

}  // namespace fusewright

// ======== inference

namespace fused_split_lines_f16x2_f16x2 {

// float32 → fp16 halves by each line's own power of two, and the largest magnitude of every line.
__global__ void __launch_bounds__(256, fusewright::SplitLines::kBlocks)
split_lines_f16x2_f16x2(const float* __restrict__ x0, int64_t stride0, int64_t lines0, int64_t length0,
    int* halves0, const float* __restrict__ x1, int64_t stride1, int64_t lines1, int64_t length1,
    int* halves1, int64_t rows0, int64_t rows1) {
    fusewright::launch_before_wait();
    fusewright::SplitMatrix matrix = {x0, stride0, lines0, length0, halves0, /*Planes*/2, /*ByLine*/true};
    int64_t row = blockIdx.y, rows = rows0;
    if (row >= rows) {
        row -= rows, rows = rows1;
        matrix = {x1, stride1, lines1, length1, halves1, /*Planes*/2, /*ByLine*/true};
    }
    fusewright::SplitLines::split(matrix, int(row * gridDim.x + blockIdx.x), int(rows * gridDim.x));
}

}  // namespace fused_split_lines_f16x2_f16x2

namespace fused_addmm_mul_leaky_relu {

struct Epilogue {
    const float* __restrict__ bias;
    float* __restrict__ out;

    template <int V>
    __device__ __forceinline__ void operator()(int64_t m, int64_t n, int count, const float (&accumulator)[V]) const {
        float bias_v[V];
        fusewright::load_vector(bias_v, bias + n, count);
        float result0[V];
#pragma unroll
        for (int i = 0; i < V; ++i) {
            const float v0 = accumulator[i] + bias_v[i];  // addmm
            const float v1 = v0 * 2.0f;  // mul
            const bool v2 = v1 > 0.0f;
            const float v3 = v1 * 0.1f;
            const float v4 = v2 ? v1 : v3;  // leaky_relu
            result0[i] = v4;
        }
        fusewright::store_vector(out + m * 8192 + n, result0, count);
    }
};

struct Config {
    using Element = __half;
    static constexpr int kProducts = 3, kTileM = 128, kTileN = 128, kStages = 3;
    static constexpr int kCluster = 1, kSplitK = 1, kGroup = 8, kVector = 4;
    static constexpr int kPromote = 32;
    static constexpr fusewright::Major kMajorA = fusewright::Major::K, kMajorB = fusewright::Major::K;
    static constexpr bool kScaled = true, kPingPong = false;
    static constexpr bool kWhole = false;
    static constexpr bool kByLineA = true, kByLineB = true;
};
using Gemm = fusewright::GemmSm90<Config>;
static_assert(Gemm::kThreads == 384 && Gemm::kSharedBytes == 214080);

// addmm, mul, leaky_relu
__global__ void __launch_bounds__(Gemm::kThreads, 1)
fused_addmm_mul_leaky_relu(const __grid_constant__ fusewright::TensorMap a,
    const __grid_constant__ fusewright::TensorMap b, int64_t M, int64_t N, int64_t K,
    const int* __restrict__ a_halves, const int* __restrict__ b_halves, uint8_t* __restrict__ lost,
    const float* __restrict__ bias, float* __restrict__ out) {
    Gemm::run({a, b, M, N, K, fusewright::SplitOperand::of(a_halves, {2, M, K, /*ByLine*/true}, /*AlongK*/true),
        fusewright::SplitOperand::of(b_halves, {2, N, K, /*ByLine*/true}, /*AlongK*/true), lost},
        Epilogue{bias, out});
}

}  // namespace fused_addmm_mul_leaky_relu

namespace fused_addmm_mul_leaky_relu_patch {

struct Epilogue {
    const float* __restrict__ bias;
    float* __restrict__ out;

    template <int V>
    __device__ __forceinline__ void operator()(int64_t m, int64_t n, int count, const float (&accumulator)[V]) const {
        float bias_v[V];
        fusewright::load_vector(bias_v, bias + n, count);
        float result0[V];
#pragma unroll
        for (int i = 0; i < V; ++i) {
            const float v0 = accumulator[i] + bias_v[i];  // addmm
            const float v1 = v0 * 2.0f;  // mul
            const bool v2 = v1 > 0.0f;
            const float v3 = v1 * 0.1f;
            const float v4 = v2 ? v1 : v3;  // leaky_relu
            result0[i] = v4;
        }
        fusewright::store_vector(out + m * 8192 + n, result0, count);
    }
};

using Gemm = fusewright::GemmSimt<float, float, 128, 128, 8, fusewright::Major::K, fusewright::Major::K,
    true, 16, 8, /*Whole*/false, /*Unroll*/2>;

// addmm, mul, leaky_relu
__global__ void __launch_bounds__(Gemm::kThreads, Gemm::kBlocksPerMultiprocessor)
fused_addmm_mul_leaky_relu_patch(const float* __restrict__ a, int64_t a_row_stride, int64_t a_k_stride,
    const float* __restrict__ b, int64_t b_k_stride, int64_t b_col_stride, int64_t M, int64_t N, int64_t K,
    const int* __restrict__ a_halves, const int* __restrict__ b_halves, const uint8_t* __restrict__ lost,
    const float* __restrict__ bias, float* __restrict__ out) {
    fusewright::launch_before_wait();
    const fusewright::SplitPatch<128, 128, Gemm::kThreads, 128, 128> patch{
        fusewright::SplitOperand::of(a_halves, {2, M, K, /*ByLine*/true}, /*AlongK*/true),
        fusewright::SplitOperand::of(b_halves, {2, N, K, /*ByLine*/true}, /*AlongK*/true), lost, M, N};
    if (!patch.anywhere()) return;
    for (int tile = blockIdx.x; tile < patch.tiles(); tile += gridDim.x) {
        if (!__syncthreads_or(patch.sees(tile))) continue;
        const int m = patch.m(tile), n = patch.n(tile);
        Gemm::run_tile(a, a_row_stride, a_k_stride, b, b_k_stride, b_col_stride, M, N, K, m, n, Epilogue{bias, out});
    }
}

}  // namespace fused_addmm_mul_leaky_relu_patch

// ======== forward, in training: also stores what backward needs

namespace forward_sample_f16x2_f16x2 {

// Looks at a sample of each matrix, for its power of two.
__global__ void __launch_bounds__(256)
sample_f16x2_f16x2(const float* __restrict__ x0, int64_t stride0, int64_t lines0, int64_t length0,
    int* halves0, const float* __restrict__ x1, int64_t stride1, int64_t lines1, int64_t length1,
    int* halves1, int* __restrict__ samples) {
    fusewright::launch_before_wait();
    fusewright::SplitMatrix matrix = {x0, stride0, lines0, length0, halves0, /*Planes*/2};
    if (blockIdx.y == 1) matrix = {x1, stride1, lines1, length1, halves1, /*Planes*/2};
    fusewright::SplitF16::sample(matrix, samples + blockIdx.y * gridDim.x);
}

}  // namespace forward_sample_f16x2_f16x2

namespace forward_split_f16x2_f16x2 {

// float32 → fp16 halves, and the largest magnitude of every line and column.
__global__ void __launch_bounds__(256)
split_f16x2_f16x2(const float* __restrict__ x0, int64_t stride0, int64_t lines0, int64_t length0,
    int* halves0, const float* __restrict__ x1, int64_t stride1, int64_t lines1, int64_t length1,
    int* halves1, const int* __restrict__ samples, int64_t samples_each, int64_t blocks0, int64_t blocks1) {
    fusewright::launch_before_wait();
    fusewright::SplitMatrix matrix = {x0, stride0, lines0, length0, halves0, /*Planes*/2};
    int64_t block = blockIdx.x, blocks = blocks0;
    if (block >= blocks) {
        block -= blocks, blocks = blocks1, samples += samples_each;
        matrix = {x1, stride1, lines1, length1, halves1, /*Planes*/2};
    }
    fusewright::SplitF16::split(matrix, samples, int(samples_each), int(block), int(blocks));
}

}  // namespace forward_split_f16x2_f16x2

namespace forward_addmm_mul_leaky_relu {

struct Epilogue {
    const float* __restrict__ bias;
    float* __restrict__ out;
    uint8_t* __restrict__ mask;

    template <int V>
    __device__ __forceinline__ void operator()(int64_t m, int64_t n, int count, const float (&accumulator)[V]) const {
        float bias_v[V];
        fusewright::load_vector(bias_v, bias + n, count);
        float result0[V];
        bool result1[V];
#pragma unroll
        for (int i = 0; i < V; ++i) {
            const float v0 = accumulator[i] + bias_v[i];  // addmm
            const float v1 = v0 * 2.0f;  // mul
            const bool v2 = v1 > 0.0f;
            const float v3 = v1 * 0.1f;
            const float v4 = v2 ? v1 : v3;  // leaky_relu
            result0[i] = v4;
            result1[i] = v2;
        }
        fusewright::store_vector(out + m * 8192 + n, result0, count);
        fusewright::store_bits(mask + m * 1024, n, result1, count);
    }
};

struct Config {
    using Element = __half;
    static constexpr int kProducts = 3, kTileM = 128, kTileN = 128, kStages = 3;
    static constexpr int kCluster = 1, kSplitK = 1, kGroup = 8, kVector = 4;
    static constexpr int kPromote = 32;
    static constexpr fusewright::Major kMajorA = fusewright::Major::K, kMajorB = fusewright::Major::K;
    static constexpr bool kScaled = true, kPingPong = false;
    static constexpr bool kWhole = false;
    static constexpr bool kByLineA = false, kByLineB = false;
};
using Gemm = fusewright::GemmSm90<Config>;
static_assert(Gemm::kThreads == 384 && Gemm::kSharedBytes == 214080);

// addmm, mul, leaky_relu
__global__ void __launch_bounds__(Gemm::kThreads, 1)
fused_addmm_mul_leaky_relu(const __grid_constant__ fusewright::TensorMap a,
    const __grid_constant__ fusewright::TensorMap b, int64_t M, int64_t N, int64_t K,
    const int* __restrict__ a_halves, const int* __restrict__ b_halves, uint8_t* __restrict__ lost,
    const float* __restrict__ bias, float* __restrict__ out, uint8_t* __restrict__ mask) {
    Gemm::run({a, b, M, N, K, fusewright::SplitOperand::of(a_halves, {2, M, K}, /*AlongK*/true),
        fusewright::SplitOperand::of(b_halves, {2, N, K}, /*AlongK*/true), lost}, Epilogue{bias, out, mask});
}

}  // namespace forward_addmm_mul_leaky_relu

namespace forward_addmm_mul_leaky_relu_patch {

struct Epilogue {
    const float* __restrict__ bias;
    float* __restrict__ out;
    uint8_t* __restrict__ mask;

    template <int V>
    __device__ __forceinline__ void operator()(int64_t m, int64_t n, int count, const float (&accumulator)[V]) const {
        float bias_v[V];
        fusewright::load_vector(bias_v, bias + n, count);
        float result0[V];
        bool result1[V];
#pragma unroll
        for (int i = 0; i < V; ++i) {
            const float v0 = accumulator[i] + bias_v[i];  // addmm
            const float v1 = v0 * 2.0f;  // mul
            const bool v2 = v1 > 0.0f;
            const float v3 = v1 * 0.1f;
            const float v4 = v2 ? v1 : v3;  // leaky_relu
            result0[i] = v4;
            result1[i] = v2;
        }
        fusewright::store_vector(out + m * 8192 + n, result0, count);
        fusewright::store_bits(mask + m * 1024, n, result1, count);
    }
};

using Gemm = fusewright::GemmSimt<float, float, 128, 128, 8, fusewright::Major::K, fusewright::Major::K,
    true, 16, 8, /*Whole*/false, /*Unroll*/2>;

// addmm, mul, leaky_relu
__global__ void __launch_bounds__(Gemm::kThreads, Gemm::kBlocksPerMultiprocessor)
fused_addmm_mul_leaky_relu_patch(const float* __restrict__ a, int64_t a_row_stride, int64_t a_k_stride,
    const float* __restrict__ b, int64_t b_k_stride, int64_t b_col_stride, int64_t M, int64_t N, int64_t K,
    const int* __restrict__ a_halves, const int* __restrict__ b_halves, const uint8_t* __restrict__ lost,
    const float* __restrict__ bias, float* __restrict__ out, uint8_t* __restrict__ mask) {
    fusewright::launch_before_wait();
    const fusewright::SplitPatch<128, 128, Gemm::kThreads, 128, 128> patch{
        fusewright::SplitOperand::of(a_halves, {2, M, K}, /*AlongK*/true),
        fusewright::SplitOperand::of(b_halves, {2, N, K}, /*AlongK*/true), lost, M, N};
    if (!patch.anywhere()) return;
    for (int tile = blockIdx.x; tile < patch.tiles(); tile += gridDim.x) {
        if (!__syncthreads_or(patch.sees(tile))) continue;
        const int m = patch.m(tile), n = patch.n(tile);
        Gemm::run_tile(a, a_row_stride, a_k_stride, b, b_k_stride, b_col_stride, M, N, K, m, n,
            Epilogue{bias, out, mask});
    }
}

}  // namespace forward_addmm_mul_leaky_relu_patch

// ======== backward

namespace backward_leaky_relu_backward_mul_sum {

struct Epilogue {
    static constexpr int kColumnSums = 1;
    const uint8_t* __restrict__ mask;
    const float* __restrict__ grad;
    float* __restrict__ t1;
    float* __restrict__ out1;

    template <int V>
    __device__ __forceinline__ void operator()(int64_t m, int64_t n, int count, float (&sums)[kColumnSums][V]) const {
        bool mask_v[V];
        fusewright::load_bits(mask_v, mask + m * 1024, n, count);
        float grad_v[V];
        fusewright::load_vector(grad_v, grad + m * 8192 + n, count);
        float result0[V];
#pragma unroll
        for (int i = 0; i < V; ++i) {
            const float v0 = grad_v[i] * 0.1f;
            const float v1 = mask_v[i] ? grad_v[i] : v0;  // leaky_relu_backward
            const float v2 = v1 * 2.0f;  // mul
            result0[i] = v2;
            if (i < count) sums[0][i] += v2;
        }
        fusewright::store_vector(t1 + m * 8192 + n, result0, count);
    }

    template <int V>
    __device__ __forceinline__ void finish(int64_t split, int64_t n, int count, const float (&sums)[kColumnSums][V]) const {
        fusewright::store(out1 + n, 1, sums[0], count);
    }
};

using Kernel = fusewright::ColumnSum<Epilogue, 512, 4, float>;

// leaky_relu_backward, mul, sum
__global__ void __launch_bounds__(Kernel::kThreads)
fused_leaky_relu_backward_mul_sum(int64_t rows, int64_t cols, int64_t rows_per_split,
    const uint8_t* __restrict__ mask, const float* __restrict__ grad, float* __restrict__ t1,
    float* __restrict__ out1) {
    fusewright::launch_before_wait();
    Kernel::run(rows, cols, rows_per_split, Epilogue{mask, grad, t1, out1});
}

}  // namespace backward_leaky_relu_backward_mul_sum

namespace backward_sample_f16x2 {

// Looks at a sample of each matrix, for its power of two.
__global__ void __launch_bounds__(256)
sample_f16x2(const float* __restrict__ x0, int64_t stride0, int64_t lines0, int64_t length0, int* halves0,
    int* __restrict__ samples) {
    fusewright::launch_before_wait();
    fusewright::SplitMatrix matrix = {x0, stride0, lines0, length0, halves0, /*Planes*/2};
    fusewright::SplitF16::sample(matrix, samples + blockIdx.y * gridDim.x);
}

}  // namespace backward_sample_f16x2

namespace backward_split_f16x2 {

// float32 → fp16 halves, and the largest magnitude of every line and column.
__global__ void __launch_bounds__(256)
split_f16x2(const float* __restrict__ x0, int64_t stride0, int64_t lines0, int64_t length0, int* halves0,
    const int* __restrict__ samples, int64_t samples_each, int64_t blocks0) {
    fusewright::launch_before_wait();
    fusewright::SplitMatrix matrix = {x0, stride0, lines0, length0, halves0, /*Planes*/2};
    int64_t block = blockIdx.x, blocks = blocks0;
    fusewright::SplitF16::split(matrix, samples, int(samples_each), int(block), int(blocks));
}

}  // namespace backward_split_f16x2

namespace backward_mm {

struct Epilogue {
    float* __restrict__ out;

    template <int V>
    __device__ __forceinline__ void operator()(int64_t m, int64_t n, int count, const float (&accumulator)[V]) const {
        float result0[V];
#pragma unroll
        for (int i = 0; i < V; ++i) {
            result0[i] = accumulator[i];
        }
        fusewright::store_vector(out + m * 8192 + n, result0, count);
    }
};

struct Config {
    using Element = __half;
    static constexpr int kProducts = 3, kTileM = 128, kTileN = 128, kStages = 3;
    static constexpr int kCluster = 1, kSplitK = 1, kGroup = 8, kVector = 4;
    static constexpr int kPromote = 32;
    static constexpr fusewright::Major kMajorA = fusewright::Major::MN, kMajorB = fusewright::Major::MN;
    static constexpr bool kScaled = true, kPingPong = false;
    static constexpr bool kWhole = true;
    static constexpr bool kByLineA = false, kByLineB = false;
};
using Gemm = fusewright::GemmSm90<Config>;
static_assert(Gemm::kThreads == 384 && Gemm::kSharedBytes == 214080);

// mm
__global__ void __launch_bounds__(Gemm::kThreads, 1)
fused_mm(const __grid_constant__ fusewright::TensorMap a, const __grid_constant__ fusewright::TensorMap b,
    int64_t M, int64_t N, int64_t K, const int* __restrict__ a_halves, const int* __restrict__ b_halves,
    uint8_t* __restrict__ lost, float* __restrict__ out) {
    Gemm::run({a, b, M, N, K, fusewright::SplitOperand::of(a_halves, {2, K, M}, /*AlongK*/false),
        fusewright::SplitOperand::of(b_halves, {2, K, N}, /*AlongK*/false), lost}, Epilogue{out});
}

}  // namespace backward_mm

namespace backward_mm_patch {

struct Epilogue {
    float* __restrict__ out;

    template <int V>
    __device__ __forceinline__ void operator()(int64_t m, int64_t n, int count, const float (&accumulator)[V]) const {
        float result0[V];
#pragma unroll
        for (int i = 0; i < V; ++i) {
            result0[i] = accumulator[i];
        }
        fusewright::store_vector(out + m * 8192 + n, result0, count);
    }
};

using Gemm = fusewright::GemmSimt<float, float, 128, 128, 8, fusewright::Major::MN, fusewright::Major::MN,
    true, 16, 8, /*Whole*/false, /*Unroll*/2>;

// mm
__global__ void __launch_bounds__(Gemm::kThreads, Gemm::kBlocksPerMultiprocessor)
fused_mm_patch(const float* __restrict__ a, int64_t a_row_stride, int64_t a_k_stride,
    const float* __restrict__ b, int64_t b_k_stride, int64_t b_col_stride, int64_t M, int64_t N, int64_t K,
    const int* __restrict__ a_halves, const int* __restrict__ b_halves, const uint8_t* __restrict__ lost,
    float* __restrict__ out) {
    fusewright::launch_before_wait();
    const fusewright::SplitPatch<128, 128, Gemm::kThreads, 128, 128> patch{
        fusewright::SplitOperand::of(a_halves, {2, K, M}, /*AlongK*/false),
        fusewright::SplitOperand::of(b_halves, {2, K, N}, /*AlongK*/false), lost, M, N, K < 128};
    if (!patch.anywhere()) return;
    for (int tile = blockIdx.x; tile < patch.tiles(); tile += gridDim.x) {
        if (!__syncthreads_or(patch.sees(tile))) continue;
        const int m = patch.m(tile), n = patch.n(tile);
        Gemm::run_tile(a, a_row_stride, a_k_stride, b, b_k_stride, b_col_stride, M, N, K, m, n, Epilogue{out});
    }
}

}  // namespace backward_mm_patch

namespace backward_mm_2 {

struct Epilogue {
    float* __restrict__ out2;

    template <int V>
    __device__ __forceinline__ void operator()(int64_t m, int64_t n, int count, const float (&accumulator)[V]) const {
        float result0[V];
#pragma unroll
        for (int i = 0; i < V; ++i) {
            result0[i] = accumulator[i];
        }
        fusewright::store_vector(out2 + m * 8192 + n, result0, count);
    }
};

struct Config {
    using Element = __half;
    static constexpr int kProducts = 3, kTileM = 128, kTileN = 128, kStages = 3;
    static constexpr int kCluster = 1, kSplitK = 1, kGroup = 8, kVector = 4;
    static constexpr int kPromote = 32;
    static constexpr fusewright::Major kMajorA = fusewright::Major::K, kMajorB = fusewright::Major::MN;
    static constexpr bool kScaled = true, kPingPong = false;
    static constexpr bool kWhole = false;
    static constexpr bool kByLineA = false, kByLineB = false;
};
using Gemm = fusewright::GemmSm90<Config>;
static_assert(Gemm::kThreads == 384 && Gemm::kSharedBytes == 214080);

// mm
__global__ void __launch_bounds__(Gemm::kThreads, 1)
fused_mm_2(const __grid_constant__ fusewright::TensorMap a, const __grid_constant__ fusewright::TensorMap b,
    int64_t M, int64_t N, int64_t K, const int* __restrict__ a_halves, const int* __restrict__ b_halves,
    uint8_t* __restrict__ lost, float* __restrict__ out2) {
    Gemm::run({a, b, M, N, K, fusewright::SplitOperand::of(a_halves, {2, M, K}, /*AlongK*/true),
        fusewright::SplitOperand::of(b_halves, {2, K, N}, /*AlongK*/false), lost}, Epilogue{out2});
}

}  // namespace backward_mm_2

namespace backward_mm_2_patch {

struct Epilogue {
    float* __restrict__ out2;

    template <int V>
    __device__ __forceinline__ void operator()(int64_t m, int64_t n, int count, const float (&accumulator)[V]) const {
        float result0[V];
#pragma unroll
        for (int i = 0; i < V; ++i) {
            result0[i] = accumulator[i];
        }
        fusewright::store_vector(out2 + m * 8192 + n, result0, count);
    }
};

using Gemm = fusewright::GemmSimt<float, float, 128, 128, 8, fusewright::Major::K, fusewright::Major::MN,
    true, 16, 8, /*Whole*/false, /*Unroll*/2>;

// mm
__global__ void __launch_bounds__(Gemm::kThreads, Gemm::kBlocksPerMultiprocessor)
fused_mm_2_patch(const float* __restrict__ a, int64_t a_row_stride, int64_t a_k_stride,
    const float* __restrict__ b, int64_t b_k_stride, int64_t b_col_stride, int64_t M, int64_t N, int64_t K,
    const int* __restrict__ a_halves, const int* __restrict__ b_halves, const uint8_t* __restrict__ lost,
    float* __restrict__ out2) {
    fusewright::launch_before_wait();
    const fusewright::SplitPatch<128, 128, Gemm::kThreads, 128, 128> patch{
        fusewright::SplitOperand::of(a_halves, {2, M, K}, /*AlongK*/true),
        fusewright::SplitOperand::of(b_halves, {2, K, N}, /*AlongK*/false), lost, M, N};
    if (!patch.anywhere()) return;
    for (int tile = blockIdx.x; tile < patch.tiles(); tile += gridDim.x) {
        if (!__syncthreads_or(patch.sees(tile))) continue;
        const int m = patch.m(tile), n = patch.n(tile);
        Gemm::run_tile(a, a_row_stride, a_k_stride, b, b_k_stride, b_col_stride, M, N, K, m, n, Epilogue{out2});
    }
}

}  // namespace backward_mm_2_patch

// ======== freeze: the halves of parameters

namespace split_split_lines_f16x2 {

// float32 → fp16 halves by each line's own power of two, and the largest magnitude of every line.
__global__ void __launch_bounds__(256, fusewright::SplitLines::kBlocks)
split_lines_f16x2(const float* __restrict__ x0, int64_t stride0, int64_t lines0, int64_t length0,
    int* halves0, int64_t rows0) {
    fusewright::launch_before_wait();
    fusewright::SplitMatrix matrix = {x0, stride0, lines0, length0, halves0, /*Planes*/2, /*ByLine*/true};
    int64_t row = blockIdx.y, rows = rows0;
    fusewright::SplitLines::split(matrix, int(row * gridDim.x + blockIdx.x), int(rows * gridDim.x));
}

}  // namespace split_split_lines_f16x2

// ======== for the host code

// Whether a launch may begin while the one before it still ends: whether all kernels here are compiled for chips that can,
// and so wait. What they were compiled for counts, not the chip, which may run code for an older one.
bool can_overlap() {
#if defined(__CUDA_ARCH_LIST__)
    for (int arch : {__CUDA_ARCH_LIST__})
        if (arch < 900) return false;
    return true;
#else
    return false;
#endif
}

}  // namespace fusewright_gemm_multiply_leakyrelu_80ad6a8325dc
"""

# Compiled apart, so that nvcc reads nothing of torch, which takes it far longer than the kernels do.
CPP_SOURCE = r"""
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_strided.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>
#include <cuda_runtime.h>
#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>
#include <cuda.h>
#include <cuda_fp16.h>
#include <torch/csrc/autograd/custom_function.h>

namespace fusewright_gemm_multiply_leakyrelu_80ad6a8325dc {

// ======== the kernels, which are in CUDA_SOURCE

namespace fusewright { struct alignas(64) TensorMap { unsigned char opaque[128]; }; }
namespace fused_split_lines_f16x2_f16x2 { void split_lines_f16x2_f16x2(const float* x0, int64_t stride0,
    int64_t lines0, int64_t length0, int* halves0, const float* x1, int64_t stride1, int64_t lines1,
    int64_t length1, int* halves1, int64_t rows0, int64_t rows1); }
namespace fused_addmm_mul_leaky_relu { void fused_addmm_mul_leaky_relu(fusewright::TensorMap a,
    fusewright::TensorMap b, int64_t M, int64_t N, int64_t K, const int* a_halves, const int* b_halves,
    uint8_t* lost, const float* bias, float* out); }
namespace fused_addmm_mul_leaky_relu_patch { void fused_addmm_mul_leaky_relu_patch(const float* a,
    int64_t a_row_stride, int64_t a_k_stride, const float* b, int64_t b_k_stride, int64_t b_col_stride,
    int64_t M, int64_t N, int64_t K, const int* a_halves, const int* b_halves, const uint8_t* lost,
    const float* bias, float* out); }
namespace forward_sample_f16x2_f16x2 { void sample_f16x2_f16x2(const float* x0, int64_t stride0,
    int64_t lines0, int64_t length0, int* halves0, const float* x1, int64_t stride1, int64_t lines1,
    int64_t length1, int* halves1, int* samples); }
namespace forward_split_f16x2_f16x2 { void split_f16x2_f16x2(const float* x0, int64_t stride0, int64_t lines0,
    int64_t length0, int* halves0, const float* x1, int64_t stride1, int64_t lines1, int64_t length1,
    int* halves1, const int* samples, int64_t samples_each, int64_t blocks0, int64_t blocks1); }
namespace forward_addmm_mul_leaky_relu { void fused_addmm_mul_leaky_relu(fusewright::TensorMap a,
    fusewright::TensorMap b, int64_t M, int64_t N, int64_t K, const int* a_halves, const int* b_halves,
    uint8_t* lost, const float* bias, float* out, uint8_t* mask); }
namespace forward_addmm_mul_leaky_relu_patch { void fused_addmm_mul_leaky_relu_patch(const float* a,
    int64_t a_row_stride, int64_t a_k_stride, const float* b, int64_t b_k_stride, int64_t b_col_stride,
    int64_t M, int64_t N, int64_t K, const int* a_halves, const int* b_halves, const uint8_t* lost,
    const float* bias, float* out, uint8_t* mask); }
namespace backward_leaky_relu_backward_mul_sum { void fused_leaky_relu_backward_mul_sum(int64_t rows,
    int64_t cols, int64_t rows_per_split, const uint8_t* mask, const float* grad, float* t1, float* out1); }
namespace backward_sample_f16x2 { void sample_f16x2(const float* x0, int64_t stride0, int64_t lines0,
    int64_t length0, int* halves0, int* samples); }
namespace backward_split_f16x2 { void split_f16x2(const float* x0, int64_t stride0, int64_t lines0,
    int64_t length0, int* halves0, const int* samples, int64_t samples_each, int64_t blocks0); }
namespace backward_mm { void fused_mm(fusewright::TensorMap a, fusewright::TensorMap b, int64_t M, int64_t N,
    int64_t K, const int* a_halves, const int* b_halves, uint8_t* lost, float* out); }
namespace backward_mm_patch { void fused_mm_patch(const float* a, int64_t a_row_stride, int64_t a_k_stride,
    const float* b, int64_t b_k_stride, int64_t b_col_stride, int64_t M, int64_t N, int64_t K,
    const int* a_halves, const int* b_halves, const uint8_t* lost, float* out); }
namespace backward_mm_2 { void fused_mm_2(fusewright::TensorMap a, fusewright::TensorMap b, int64_t M,
    int64_t N, int64_t K, const int* a_halves, const int* b_halves, uint8_t* lost, float* out2); }
namespace backward_mm_2_patch { void fused_mm_2_patch(const float* a, int64_t a_row_stride,
    int64_t a_k_stride, const float* b, int64_t b_k_stride, int64_t b_col_stride, int64_t M, int64_t N,
    int64_t K, const int* a_halves, const int* b_halves, const uint8_t* lost, float* out2); }
namespace split_split_lines_f16x2 { void split_lines_f16x2(const float* x0, int64_t stride0, int64_t lines0,
    int64_t length0, int* halves0, int64_t rows0); }
bool can_overlap();

namespace {

// ======== host code

using Sizes = std::vector<c10::SymInt>;

// Messages are made without streams: where this is linked with a libstdc++ of its own, as some compilers do, the locales
// of its streams are not those that torch's copy has set up, and numbers crash it.
std::string text(c10::SymIntArrayRef sizes) {
    std::string result;
    for (const c10::SymInt& size : sizes)
        result += (result.empty() ? "" : ", ") + std::to_string(size.guard_int(__FILE__, __LINE__));
    return "[" + result + "]";
}

// Raise where an argument is not what the kernels take, also while a graph is traced, when sizes may be symbols.
void require_rank(const at::Tensor& t, const std::string& name, int64_t rank) {
    TORCH_CHECK(t.dim() == rank, name + " has shape " + text(t.sym_sizes()) + ", but these kernels take " +
                                     std::to_string(rank) + " dimensions");
}

void require_gpu(const at::Tensor& t, const std::string& name) {
    TORCH_CHECK(t.is_cuda() || t.is_meta(),
                name + " is on " + t.device().str() + "; move the model and its inputs to the GPU");
}

void require(const at::Tensor& t, const std::string& name, at::ScalarType dtype, c10::SymIntArrayRef shape,
             c10::Device device) {
    TORCH_CHECK(t.device() == device, name + " is on " + t.device().str() + ", but the model is on " + device.str() +
                                          "; move it there");
    TORCH_CHECK(t.scalar_type() == dtype, name + " is " + c10::toString(t.scalar_type()) +
                                              ", but these kernels take " + c10::toString(dtype));
    TORCH_CHECK(t.sym_sizes() == shape, name + " has shape " + text(t.sym_sizes()) + ", but these kernels take " +
                                            text(shape));
}

// The tensor as the kernels read it: with these strides and 16-byte alignment, copied only if it is not so already.
at::Tensor ready(const at::Tensor& t, at::IntArrayRef strides) {
    bool same = reinterpret_cast<uintptr_t>(t.data_ptr()) % 16 == 0;
    for (int64_t i = 0; i < t.dim(); ++i) same = same && (t.size(i) <= 1 || t.stride(i) == strides[i]);
    return same || t.numel() == 0 ? t : at::empty_strided(t.sizes(), strides, t.options()).copy_(t);
}

template <class T> T* pointer(const at::Tensor& t, int64_t offset = 0) { return static_cast<T*>(t.data_ptr()) + offset; }

// early: the kernel waits for the launch before it itself (launch_before_wait).
struct Shape {
    int64_t x, y, z;  // blocks
    int threads, shared_bytes;
    bool early = true;
    int cluster = 1;
};

// On the current stream; nothing for an empty grid.
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), const Shape& shape, const Arguments&... arguments) {
    if (shape.x == 0 || shape.y == 0 || shape.z == 0) return;
    if (shape.shared_bytes > 48 * 1024)
        C10_CUDA_CHECK(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                            cudaFuncAttributeMaxDynamicSharedMemorySize, shape.shared_bytes));
    cudaLaunchAttribute attributes[2];
    int count = 0;
    if (shape.early && can_overlap()) {
        attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
        attributes[count++].val.programmaticStreamSerializationAllowed = 1;
    }
    if (shape.cluster > 1) {
        attributes[count].id = cudaLaunchAttributeClusterDimension;
        attributes[count].val.clusterDim.x = shape.cluster;
        attributes[count].val.clusterDim.y = attributes[count].val.clusterDim.z = 1;
        ++count;
    }
    cudaLaunchConfig_t config{dim3(shape.x, shape.y, shape.z), dim3(shape.threads), size_t(shape.shared_bytes),
                              c10::cuda::getCurrentCUDAStream(), attributes, unsigned(count)};
    C10_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...));
}

// The driver's function, asked for by name: nothing more has to be linked.
decltype(&cuTensorMapEncodeTiled) tensor_map_encoder() {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult status;
#if CUDART_VERSION >= 12050
    C10_CUDA_CHECK(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &status));
#else
    C10_CUDA_CHECK(cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &status));
#endif
    TORCH_CHECK(found && status == cudaDriverEntryPointSuccess, "these kernels need a driver of CUDA 12.0 or later");
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(found);
}

// Tells the copy engine (TMA) where boxes of a tensor lie: extents, the innermost first; strides of the others.
template <class T, size_t rank>
fusewright::TensorMap tensor_map(T* start, CUtensorMapDataType type, const int64_t (&extents)[rank],
                                 const int64_t (&strides)[rank - 1], const uint32_t (&box)[rank],
                                 CUtensorMapSwizzle swizzle) {
    static_assert(sizeof(fusewright::TensorMap) == sizeof(CUtensorMap));
    static const auto encode = tensor_map_encoder();
    fusewright::TensorMap map{};
    cuuint64_t dims[rank], bytes[rank];
    cuuint32_t steps[rank];
    for (size_t i = 0; i < rank; ++i) {
        if (extents[i] == 0) return map;  // nothing is ever copied
        dims[i] = extents[i];
        bytes[i] = i == 0 ? sizeof(T) : strides[i - 1] * sizeof(T);
        steps[i] = 1;
    }
    const CUresult result =
        encode(reinterpret_cast<CUtensorMap*>(&map), type, rank, start, dims, bytes + 1, box, steps,
               CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
               CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    TORCH_CHECK(result == CUDA_SUCCESS, "the driver refuses a tensor map: CUDA error " + std::to_string(result));
    return map;
}

void fusewright_fused_check(const at::Tensor& weight_, const at::Tensor& bias_, const at::Tensor& x_) {
    require_gpu(weight_, "weight");
    require_rank(x_, "x", 2);
    const c10::SymInt batch = x_.sym_size(0);
    require(weight_, "weight", at::kFloat, {8192, 8192}, weight_.device());
    require(bias_, "bias", at::kFloat, {8192}, weight_.device());
    require(x_, "x", at::kFloat, {batch, 8192}, weight_.device());
}

at::Tensor fusewright_fused(const at::Tensor& weight_, const at::Tensor& bias_, const at::Tensor& x_) {
    fusewright_fused_check(weight_, bias_, x_);
    const c10::cuda::CUDAGuard guard(weight_.device());
    const int64_t batch = x_.size(0);
    const at::Tensor weight = ready(weight_, {8192, 1});
    const at::Tensor bias = ready(bias_, {1});
    const at::Tensor x = ready(x_, {8192, 1});
    const at::TensorOptions options = weight.options();
    at::Tensor halves, halves1, out;

    {  // encode x, encode weight
        halves = at::empty_strided({8193 * batch}, {1}, options.dtype(at::kInt));
        halves1 = at::empty_strided({67117056}, {1}, options.dtype(at::kInt));
        launch(fused_split_lines_f16x2_f16x2::split_lines_f16x2_f16x2,
            {264, std::min<int64_t>(16, (batch + 263) / 264) + 16, 1, 256, 0}, pointer<float>(x), 8192, batch, 8192,
            pointer<int32_t>(halves), pointer<float>(weight), 8192, 8192, 8192, pointer<int32_t>(halves1),
            std::min<int64_t>(16, (batch + 263) / 264), 16);
    }

    {  // addmm, mul, leaky_relu
        out = at::empty_strided({batch, 8192}, {8192, 1}, options.dtype(at::kFloat));
        at::Tensor lost = at::empty_strided({((batch + 127) / 128) * 512}, {1}, options.dtype(at::kByte));
        const auto halves_map = tensor_map(pointer<__half>(halves), CU_TENSOR_MAP_DATA_TYPE_FLOAT16, {8192, batch, 2},
            {8192, 8192 * batch}, {64, 64, 1}, CU_TENSOR_MAP_SWIZZLE_128B);
        const auto halves1_map = tensor_map(pointer<__half>(halves1), CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
            {8192, 8192, 2}, {8192, 67108864}, {64, 64, 1}, CU_TENSOR_MAP_SWIZZLE_128B);
        launch(fused_addmm_mul_leaky_relu::fused_addmm_mul_leaky_relu,
            {std::min<int64_t>(132, ((batch + 127) / 128) * 64), 1, 1, 384, 214080}, halves_map, halves1_map, batch,
            8192, 8192, pointer<int32_t>(halves), pointer<int32_t>(halves1), pointer<uint8_t>(lost),
            pointer<float>(bias), pointer<float>(out));
        launch(fused_addmm_mul_leaky_relu_patch::fused_addmm_mul_leaky_relu_patch,
            {std::min<int64_t>(263, ((batch + 127) / 128) * 64), 1, 1, 128, 82432}, pointer<float>(x), 8192, 1,
            pointer<float>(weight), 1, 8192, batch, 8192, 8192, pointer<int32_t>(halves), pointer<int32_t>(halves1),
            pointer<uint8_t>(lost), pointer<float>(bias), pointer<float>(out));
    }

    return out;
}

void fusewright_forward_check(const at::Tensor& weight_, const at::Tensor& bias_, const at::Tensor& x_) {
    require_gpu(weight_, "weight");
    require_rank(x_, "x", 2);
    const c10::SymInt batch = x_.sym_size(0);
    require(weight_, "weight", at::kFloat, {8192, 8192}, weight_.device());
    require(bias_, "bias", at::kFloat, {8192}, weight_.device());
    require(x_, "x", at::kFloat, {batch, 8192}, weight_.device());
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> fusewright_forward(const at::Tensor& weight_,
    const at::Tensor& bias_, const at::Tensor& x_) {
    fusewright_forward_check(weight_, bias_, x_);
    const c10::cuda::CUDAGuard guard(weight_.device());
    const int64_t batch = x_.size(0);
    const at::Tensor weight = ready(weight_, {8192, 1});
    const at::Tensor bias = ready(bias_, {1});
    const at::Tensor x = ready(x_, {8192, 1});
    const at::TensorOptions options = weight.options();
    at::Tensor halves, halves1, out, mask;

    {  // encode x, encode weight
        halves = at::empty_strided({8193 * batch + 8193}, {1}, options.dtype(at::kInt));
        halves1 = at::empty_strided({67125249}, {1}, options.dtype(at::kInt));
        at::Tensor samples = at::empty_strided({528}, {1}, options.dtype(at::kInt));
        launch(forward_sample_f16x2_f16x2::sample_f16x2_f16x2, {264, 2, 1, 256, 0}, pointer<float>(x), 8192, batch,
            8192, pointer<int32_t>(halves), pointer<float>(weight), 8192, 8192, 8192, pointer<int32_t>(halves1),
            pointer<int32_t>(samples));
        launch(forward_split_f16x2_f16x2::split_f16x2_f16x2,
            {16 * (std::min<int64_t>(66, (batch + 7) / 8)) + 1056, 1, 1, 256, 0}, pointer<float>(x), 8192, batch,
            8192, pointer<int32_t>(halves), pointer<float>(weight), 8192, 8192, 8192, pointer<int32_t>(halves1),
            pointer<int32_t>(samples), 264, 16 * (std::min<int64_t>(66, (batch + 7) / 8)), 1056);
    }

    {  // addmm, mul, leaky_relu
        out = at::empty_strided({batch, 8192}, {8192, 1}, options.dtype(at::kFloat));
        mask = at::empty_strided({batch, 1024}, {1024, 1}, options.dtype(at::kByte));
        at::Tensor lost = at::empty_strided({((batch + 127) / 128) * 512}, {1}, options.dtype(at::kByte));
        const auto halves_map = tensor_map(pointer<__half>(halves), CU_TENSOR_MAP_DATA_TYPE_FLOAT16, {8192, batch, 2},
            {8192, 8192 * batch}, {64, 64, 1}, CU_TENSOR_MAP_SWIZZLE_128B);
        const auto halves1_map = tensor_map(pointer<__half>(halves1), CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
            {8192, 8192, 2}, {8192, 67108864}, {64, 64, 1}, CU_TENSOR_MAP_SWIZZLE_128B);
        launch(forward_addmm_mul_leaky_relu::fused_addmm_mul_leaky_relu,
            {std::min<int64_t>(132, ((batch + 127) / 128) * 64), 1, 1, 384, 214080}, halves_map, halves1_map, batch,
            8192, 8192, pointer<int32_t>(halves), pointer<int32_t>(halves1), pointer<uint8_t>(lost),
            pointer<float>(bias), pointer<float>(out), pointer<uint8_t>(mask));
        launch(forward_addmm_mul_leaky_relu_patch::fused_addmm_mul_leaky_relu_patch,
            {std::min<int64_t>(263, ((batch + 127) / 128) * 64), 1, 1, 128, 82432}, pointer<float>(x), 8192, 1,
            pointer<float>(weight), 1, 8192, batch, 8192, 8192, pointer<int32_t>(halves), pointer<int32_t>(halves1),
            pointer<uint8_t>(lost), pointer<float>(bias), pointer<float>(out), pointer<uint8_t>(mask));
    }

    return {out, halves, halves1, mask};
}

void fusewright_backward_check(const at::Tensor& weight_, const at::Tensor& x_, const at::Tensor& saved_,
    const at::Tensor& saved2_, const at::Tensor& mask_, const at::Tensor& grad_) {
    require_gpu(weight_, "weight");
    require_rank(x_, "x", 2);
    const c10::SymInt batch = x_.sym_size(0);
    require(weight_, "weight", at::kFloat, {8192, 8192}, weight_.device());
    require(x_, "x", at::kFloat, {batch, 8192}, weight_.device());
    require(saved_, "saved", at::kInt, {8193 * batch + 8193}, weight_.device());
    require(saved2_, "saved2", at::kInt, {67125249}, weight_.device());
    require(mask_, "mask", at::kByte, {batch, 1024}, weight_.device());
    require(grad_, "grad", at::kFloat, {batch, 8192}, weight_.device());
}

std::vector<at::Tensor> fusewright_backward(const at::Tensor& weight_, const at::Tensor& x_,
    const at::Tensor& saved_, const at::Tensor& saved2_, const at::Tensor& mask_, const at::Tensor& grad_,
    at::IntArrayRef wanted) {
    fusewright_backward_check(weight_, x_, saved_, saved2_, mask_, grad_);
    const c10::cuda::CUDAGuard guard(weight_.device());
    const int64_t batch = x_.size(0);
    const at::Tensor weight = ready(weight_, {8192, 1});
    const at::Tensor x = ready(x_, {8192, 1});
    const at::Tensor saved = ready(saved_, {1});
    const at::Tensor saved2 = ready(saved2_, {1});
    const at::Tensor mask = ready(mask_, {1024, 1});
    const at::Tensor grad = ready(grad_, {8192, 1});
    const at::TensorOptions options = weight.options();
    at::Tensor t1, out1, halves, out, out2;

    if (wanted[0] || wanted[1] || wanted[2]) {  // leaky_relu_backward, mul, sum
        t1 = at::empty_strided({batch, 8192}, {8192, 1}, options.dtype(at::kFloat));
        out1 = at::empty_strided({8192}, {1}, options.dtype(at::kFloat));
        launch(backward_leaky_relu_backward_mul_sum::fused_leaky_relu_backward_mul_sum, {256, 1, 1, 512, 0}, batch,
            8192, batch, pointer<uint8_t>(mask), pointer<float>(grad), pointer<float>(t1), pointer<float>(out1));
    }

    if (wanted[0] || wanted[2]) {  // encode t1
        halves = at::empty_strided({8193 * batch + 8193}, {1}, options.dtype(at::kInt));
        at::Tensor samples = at::empty_strided({264}, {1}, options.dtype(at::kInt));
        launch(backward_sample_f16x2::sample_f16x2, {264, 1, 1, 256, 0}, pointer<float>(t1), 8192, batch, 8192,
            pointer<int32_t>(halves), pointer<int32_t>(samples));
        launch(backward_split_f16x2::split_f16x2, {16 * (std::min<int64_t>(66, (batch + 7) / 8)), 1, 1, 256, 0},
            pointer<float>(t1), 8192, batch, 8192, pointer<int32_t>(halves), pointer<int32_t>(samples), 264,
            16 * (std::min<int64_t>(66, (batch + 7) / 8)));
    }

    if (wanted[0]) {  // mm
        out = at::empty_strided({8192, 8192}, {8192, 1}, options.dtype(at::kFloat));
        at::Tensor lost = at::empty_strided({32768}, {1}, options.dtype(at::kByte));
        const auto halves_map = tensor_map(pointer<__half>(halves), CU_TENSOR_MAP_DATA_TYPE_FLOAT16, {8192, batch, 2},
            {8192, 8192 * batch}, {64, 64, 1}, CU_TENSOR_MAP_SWIZZLE_128B);
        const auto saved_map = tensor_map(pointer<__half>(saved), CU_TENSOR_MAP_DATA_TYPE_FLOAT16, {8192, batch, 2},
            {8192, 8192 * batch}, {64, 64, 1}, CU_TENSOR_MAP_SWIZZLE_128B);
        launch(backward_mm::fused_mm,
            {std::min<int64_t>(132, 4096 * (std::min<int64_t>(1, batch))), 1, 1, 384, 214080}, halves_map, saved_map,
            8192, 8192, batch, pointer<int32_t>(halves), pointer<int32_t>(saved), pointer<uint8_t>(lost),
            pointer<float>(out));
        launch(backward_mm_patch::fused_mm_patch, {263, 1, 1, 128, 82432}, pointer<float>(t1), 1, 8192,
            pointer<float>(x), 8192, 1, 8192, 8192, batch, pointer<int32_t>(halves), pointer<int32_t>(saved),
            pointer<uint8_t>(lost), pointer<float>(out));
    }

    if (wanted[2]) {  // mm
        out2 = at::empty_strided({batch, 8192}, {8192, 1}, options.dtype(at::kFloat));
        at::Tensor lost = at::empty_strided({((batch + 127) / 128) * 512}, {1}, options.dtype(at::kByte));
        const auto halves_map = tensor_map(pointer<__half>(halves), CU_TENSOR_MAP_DATA_TYPE_FLOAT16, {8192, batch, 2},
            {8192, 8192 * batch}, {64, 64, 1}, CU_TENSOR_MAP_SWIZZLE_128B);
        const auto saved2_map = tensor_map(pointer<__half>(saved2), CU_TENSOR_MAP_DATA_TYPE_FLOAT16, {8192, 8192, 2},
            {8192, 67108864}, {64, 64, 1}, CU_TENSOR_MAP_SWIZZLE_128B);
        launch(backward_mm_2::fused_mm_2, {std::min<int64_t>(132, ((batch + 127) / 128) * 64), 1, 1, 384, 214080},
            halves_map, saved2_map, batch, 8192, 8192, pointer<int32_t>(halves), pointer<int32_t>(saved2),
            pointer<uint8_t>(lost), pointer<float>(out2));
        launch(backward_mm_2_patch::fused_mm_2_patch,
            {std::min<int64_t>(263, ((batch + 127) / 128) * 64), 1, 1, 128, 82432}, pointer<float>(t1), 8192, 1,
            pointer<float>(weight), 8192, 1, batch, 8192, 8192, pointer<int32_t>(halves), pointer<int32_t>(saved2),
            pointer<uint8_t>(lost), pointer<float>(out2));
    }

    std::vector<at::Tensor> results;
    if (wanted[0]) results.push_back(out);
    if (wanted[1]) results.push_back(out1);
    if (wanted[2]) results.push_back(out2);
    return results;
}

void fusewright_split_check(const at::Tensor& weight_) {
    require_gpu(weight_, "weight");
    require(weight_, "weight", at::kFloat, {8192, 8192}, weight_.device());
}

at::Tensor fusewright_split(const at::Tensor& weight_) {
    fusewright_split_check(weight_);
    const c10::cuda::CUDAGuard guard(weight_.device());
    const at::Tensor weight = ready(weight_, {8192, 1});
    const at::TensorOptions options = weight.options();
    at::Tensor halves1;

    {  // encode weight
        halves1 = at::empty_strided({67117056}, {1}, options.dtype(at::kInt));
        launch(split_split_lines_f16x2::split_lines_f16x2, {264, 16, 1, 256, 0}, pointer<float>(weight), 8192, 8192,
            8192, pointer<int32_t>(halves1), 16);
    }

    return halves1;
}

void fusewright_frozen_check(const at::Tensor& weight_, const at::Tensor& bias_, const at::Tensor& x_,
    const at::Tensor& halves1_) {
    require_gpu(weight_, "weight");
    require_rank(x_, "x", 2);
    const c10::SymInt batch = x_.sym_size(0);
    require(weight_, "weight", at::kFloat, {8192, 8192}, weight_.device());
    require(bias_, "bias", at::kFloat, {8192}, weight_.device());
    require(x_, "x", at::kFloat, {batch, 8192}, weight_.device());
    require(halves1_, "halves1", at::kInt, {67117056}, weight_.device());
}

at::Tensor fusewright_frozen(const at::Tensor& weight_, const at::Tensor& bias_, const at::Tensor& x_,
    const at::Tensor& halves1_) {
    fusewright_frozen_check(weight_, bias_, x_, halves1_);
    const c10::cuda::CUDAGuard guard(weight_.device());
    const int64_t batch = x_.size(0);
    const at::Tensor weight = ready(weight_, {8192, 1});
    const at::Tensor bias = ready(bias_, {1});
    const at::Tensor x = ready(x_, {8192, 1});
    const at::Tensor halves1 = ready(halves1_, {1});
    const at::TensorOptions options = weight.options();
    at::Tensor halves, out;

    {  // encode x
        halves = at::empty_strided({8193 * batch}, {1}, options.dtype(at::kInt));
        launch(split_split_lines_f16x2::split_lines_f16x2,
            {264, std::min<int64_t>(16, (batch + 263) / 264), 1, 256, 0}, pointer<float>(x), 8192, batch, 8192,
            pointer<int32_t>(halves), std::min<int64_t>(16, (batch + 263) / 264));
    }

    {  // addmm, mul, leaky_relu
        out = at::empty_strided({batch, 8192}, {8192, 1}, options.dtype(at::kFloat));
        at::Tensor lost = at::empty_strided({((batch + 127) / 128) * 512}, {1}, options.dtype(at::kByte));
        const auto halves_map = tensor_map(pointer<__half>(halves), CU_TENSOR_MAP_DATA_TYPE_FLOAT16, {8192, batch, 2},
            {8192, 8192 * batch}, {64, 64, 1}, CU_TENSOR_MAP_SWIZZLE_128B);
        const auto halves1_map = tensor_map(pointer<__half>(halves1), CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
            {8192, 8192, 2}, {8192, 67108864}, {64, 64, 1}, CU_TENSOR_MAP_SWIZZLE_128B);
        launch(fused_addmm_mul_leaky_relu::fused_addmm_mul_leaky_relu,
            {std::min<int64_t>(132, ((batch + 127) / 128) * 64), 1, 1, 384, 214080}, halves_map, halves1_map, batch,
            8192, 8192, pointer<int32_t>(halves), pointer<int32_t>(halves1), pointer<uint8_t>(lost),
            pointer<float>(bias), pointer<float>(out));
        launch(fused_addmm_mul_leaky_relu_patch::fused_addmm_mul_leaky_relu_patch,
            {std::min<int64_t>(263, ((batch + 127) / 128) * 64), 1, 1, 128, 82432}, pointer<float>(x), 8192, 1,
            pointer<float>(weight), 1, 8192, batch, 8192, 8192, pointer<int32_t>(halves), pointer<int32_t>(halves1),
            pointer<uint8_t>(lost), pointer<float>(bias), pointer<float>(out));
    }

    return out;
}

at::Tensor fusewright_fused_meta(const at::Tensor& weight_, const at::Tensor& bias_, const at::Tensor& x_) {
    fusewright_fused_check(weight_, bias_, x_);
    const c10::SymInt batch = x_.sym_size(0);
    return at::empty_strided_symint(Sizes{batch, 8192}, Sizes{8192, 1}, weight_.options().dtype(at::kFloat));
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> fusewright_forward_meta(const at::Tensor& weight_,
    const at::Tensor& bias_, const at::Tensor& x_) {
    fusewright_forward_check(weight_, bias_, x_);
    const c10::SymInt batch = x_.sym_size(0);
    return {
        at::empty_strided_symint(Sizes{batch, 8192}, Sizes{8192, 1}, weight_.options().dtype(at::kFloat)),
        at::empty_strided_symint(Sizes{8193 * batch + 8193}, Sizes{1}, weight_.options().dtype(at::kInt)),
        at::empty_strided_symint(Sizes{67125249}, Sizes{1}, weight_.options().dtype(at::kInt)),
        at::empty_strided_symint(Sizes{batch, 1024}, Sizes{1024, 1}, weight_.options().dtype(at::kByte))};
}

std::vector<at::Tensor> fusewright_backward_meta(const at::Tensor& weight_, const at::Tensor& x_,
    const at::Tensor& saved_, const at::Tensor& saved2_, const at::Tensor& mask_, const at::Tensor& grad_,
    at::IntArrayRef wanted) {
    fusewright_backward_check(weight_, x_, saved_, saved2_, mask_, grad_);
    const c10::SymInt batch = x_.sym_size(0);
    std::vector<at::Tensor> results;
    if (wanted[0]) results.push_back(at::empty_strided_symint(Sizes{8192, 8192}, Sizes{8192, 1}, weight_.options().dtype(at::kFloat)));
    if (wanted[1]) results.push_back(at::empty_strided_symint(Sizes{8192}, Sizes{1}, weight_.options().dtype(at::kFloat)));
    if (wanted[2]) results.push_back(at::empty_strided_symint(Sizes{batch, 8192}, Sizes{8192, 1}, weight_.options().dtype(at::kFloat)));
    return results;
}

at::Tensor fusewright_split_meta(const at::Tensor& weight_) {
    fusewright_split_check(weight_);
    return at::empty_strided_symint(Sizes{67117056}, Sizes{1}, weight_.options().dtype(at::kInt));
}

at::Tensor fusewright_frozen_meta(const at::Tensor& weight_, const at::Tensor& bias_, const at::Tensor& x_,
    const at::Tensor& halves1_) {
    fusewright_frozen_check(weight_, bias_, x_, halves1_);
    const c10::SymInt batch = x_.sym_size(0);
    return at::empty_strided_symint(Sizes{batch, 8192}, Sizes{8192, 1}, weight_.options().dtype(at::kFloat));
}

// ======== gradients

// An operator through the dispatcher, where tracing sees it.
template <class Signature> auto operation(const char* name) {
    return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

struct Fused : torch::autograd::Function<Fused> {
    static at::Tensor forward(torch::autograd::AutogradContext* context,
        const at::Tensor& weight, const at::Tensor& bias, const at::Tensor& x) {
        const at::AutoDispatchBelowADInplaceOrView below;
        static const auto run = operation<decltype(fusewright_forward)>("fusewright_gemm_multiply_leakyrelu_80ad6a8325dc::forward");
        const auto results = run.call(weight, bias, x);
        context->save_for_backward({weight, x, std::get<1>(results), std::get<2>(results), std::get<3>(results)});
        return std::get<0>(results);
    }

    static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
        torch::autograd::variable_list gradients) {
        static const auto run = operation<decltype(fusewright_backward)>("fusewright_gemm_multiply_leakyrelu_80ad6a8325dc::backward");
        const auto saved = context->get_saved_variables();
        const std::vector<size_t> places{0, 1, 2};  // of the arguments that have gradients
        std::vector<int64_t> wanted;
        for (size_t place : places) wanted.push_back(context->needs_input_grad(place));
        const auto computed = run.call(saved[0], saved[1], saved[2], saved[3], saved[4], gradients[0], wanted);
        torch::autograd::variable_list result(3);
        size_t next = 0;
        for (size_t i = 0; i < places.size(); ++i)
            if (wanted[i]) result[places[i]] = computed[next++];
        return result;
    }
};

at::Tensor fused_autograd(const at::Tensor& weight, const at::Tensor& bias, const at::Tensor& x) {
    fusewright_fused_check(weight, bias, x);
    if (at::GradMode::is_enabled() && (weight.requires_grad() || bias.requires_grad() || x.requires_grad())) {
        const auto outputs = Fused::apply(weight, bias, x);
        return outputs;
    }
    const at::AutoDispatchBelowADInplaceOrView below;
    static const auto run = operation<decltype(fusewright_fused)>("fusewright_gemm_multiply_leakyrelu_80ad6a8325dc::fused");
    return run.call(weight, bias, x);
}

// What `backward` gives when its own gradient may be asked for: the same, and an error if it is.
struct FirstDerivative : torch::autograd::Function<FirstDerivative> {
    static torch::autograd::variable_list forward(torch::autograd::AutogradContext*,
        const at::Tensor& weight, const at::Tensor& x, const at::Tensor& saved, const at::Tensor& saved2, const at::Tensor& mask, const at::Tensor& grad, std::vector<int64_t> wanted) {
        const at::AutoDispatchBelowADInplaceOrView below;
        static const auto run = operation<decltype(fusewright_backward)>("fusewright_gemm_multiply_leakyrelu_80ad6a8325dc::backward");
        return run.call(weight, x, saved, saved2, mask, grad, wanted);
    }

    static torch::autograd::variable_list backward(torch::autograd::AutogradContext*, torch::autograd::variable_list) {
        TORCH_CHECK(false, "these kernels compute first derivatives only; use the original model for double backward");
    }
};

std::vector<at::Tensor> backward_autograd(const at::Tensor& weight, const at::Tensor& x, const at::Tensor& saved, const at::Tensor& saved2, const at::Tensor& mask, const at::Tensor& grad, at::IntArrayRef wanted) {
    fusewright_backward_check(weight, x, saved, saved2, mask, grad);
    if (at::GradMode::is_enabled() && (weight.requires_grad() || x.requires_grad() || saved.requires_grad() || saved2.requires_grad() || mask.requires_grad() || grad.requires_grad()))
        return FirstDerivative::apply(weight, x, saved, saved2, mask, grad, wanted.vec());
    const at::AutoDispatchBelowADInplaceOrView below;
    static const auto run = operation<decltype(fusewright_backward)>("fusewright_gemm_multiply_leakyrelu_80ad6a8325dc::backward");
    return run.call(weight, x, saved, saved2, mask, grad, wanted);
}

// ======== frozen: no gradients

at::Tensor frozen_autograd(const at::Tensor& weight, const at::Tensor& bias, const at::Tensor& x, const at::Tensor& halves1) {
    fusewright_frozen_check(weight, bias, x, halves1);
    TORCH_CHECK(!at::GradMode::is_enabled() || !(weight.requires_grad() || bias.requires_grad() || x.requires_grad()),
                "the model is frozen, so what is made of its parameters is kept, and a call cannot have gradients: "
                "call it under torch.no_grad(), or call its method thaw() to train it");
    const at::AutoDispatchBelowADInplaceOrView below;
    static const auto run = operation<decltype(fusewright_frozen)>("fusewright_gemm_multiply_leakyrelu_80ad6a8325dc::frozen");
    return run.call(weight, bias, x, halves1);
}

}  // namespace

TORCH_LIBRARY(fusewright_gemm_multiply_leakyrelu_80ad6a8325dc, library) {
    library.def("fused(Tensor weight, Tensor bias, Tensor x) -> Tensor");
    library.def("forward(Tensor weight, Tensor bias, Tensor x) -> (Tensor, Tensor, Tensor, Tensor)");
    library.def("backward(Tensor weight, Tensor x, Tensor saved, Tensor saved2, Tensor mask, Tensor grad, int[] wanted) -> Tensor[]");
    library.def("split(Tensor weight) -> Tensor");
    library.def("frozen(Tensor weight, Tensor bias, Tensor x, Tensor halves1) -> Tensor");
}

TORCH_LIBRARY_IMPL(fusewright_gemm_multiply_leakyrelu_80ad6a8325dc, CUDA, library) {
    library.impl("fused", fusewright_fused);
    library.impl("forward", fusewright_forward);
    library.impl("backward", fusewright_backward);
    library.impl("split", fusewright_split);
    library.impl("frozen", fusewright_frozen);
}

TORCH_LIBRARY_IMPL(fusewright_gemm_multiply_leakyrelu_80ad6a8325dc, Meta, library) {
    library.impl("fused", fusewright_fused_meta);
    library.impl("forward", fusewright_forward_meta);
    library.impl("backward", fusewright_backward_meta);
    library.impl("split", fusewright_split_meta);
    library.impl("frozen", fusewright_frozen_meta);
}

TORCH_LIBRARY_IMPL(fusewright_gemm_multiply_leakyrelu_80ad6a8325dc, Autograd, library) {
    library.impl("fused", fused_autograd);
    library.impl("backward", backward_autograd);
    library.impl("frozen", frozen_autograd);
}

}  // namespace fusewright_gemm_multiply_leakyrelu_80ad6a8325dc
"""

if torch.cuda.is_available():  # without a GPU the file can be imported and read, and its models built, but not run
    if torch.cuda.get_device_capability() != (9, 0):
        raise RuntimeError(
            "these kernels are for sm_90a (H200), and the GPU here is another: write the file again on this machine, "
            "or with `fusewright optimize --arch` for this GPU"
        )
    load_inline(
        name="fusewright_gemm_multiply_leakyrelu_80ad6a8325dc",
        cpp_sources=CPP_SOURCE,
        cuda_sources=CUDA_SOURCE,
        extra_cflags=["-O2"],
        extra_cuda_cflags=[
            "-O3",
            "--fmad=false",  # a product and a sum round apart, as in eager
            "-U__CUDA_NO_HALF_CONVERSIONS__",  # torch turns these conversions off; the kernels use them
            "-U__CUDA_NO_BFLOAT16_CONVERSIONS__",
            "-gencode=arch=compute_90a,code=sm_90a",
        ],
        is_python_module=False,
        no_implicit_headers=True,
    )


class ModelNew(nn.Module):
    """A matrix product, a multiplication and a LeakyReLU."""

    def __init__(self, in_features, out_features, multiplier, negative_slope):
        super().__init__()
        self.gemm = nn.Linear(in_features, out_features)
        self.multiplier = multiplier
        self.leaky_relu = nn.LeakyReLU(negative_slope)

    def forward(self, x):
        if [
            self.multiplier,
            self.leaky_relu.negative_slope,
        ] != [2.0, 0.1]:
            raise ValueError("these kernels were written for multiplier = 2.0, leaky_relu.negative_slope = 0.1")
        if self._halves:
            return torch.ops.fusewright_gemm_multiply_leakyrelu_80ad6a8325dc.frozen(self.gemm.weight, self.gemm.bias, x, *self._halves)
        else:
            return torch.ops.fusewright_gemm_multiply_leakyrelu_80ad6a8325dc.fused(self.gemm.weight, self.gemm.bias, x)

    # Between `freeze` and `thaw`: the fp16 halves of float32 parameters.
    _halves = ()

    def freeze(self):
        """For inference: splits the parameters into fp16 halves now, and no more in each call. Returns the model.

        Prints the memory that the halves take. Results stay the same, bit for bit. Until `thaw`, a call cannot have
        gradients, and the parameters must not change. Moving the model, or loading a state dict into it, thaws it.
        """
        with torch.no_grad():
            self._halves = (torch.ops.fusewright_gemm_multiply_leakyrelu_80ad6a8325dc.split(self.gemm.weight),)
        torch.cuda.synchronize(self._halves[0].device)  # whichever stream reads them
        size = sum(halves.numel() * halves.element_size() for halves in self._halves)
        print(f"freeze: keeps {size:,} bytes on the GPU, beside the parameters")
        return self

    def thaw(self):
        """Forgets what `freeze` keeps: the parameters may change, and calls have gradients. Returns the model."""
        self._halves = ()
        return self

    def _apply(self, *args, **kwargs):
        self.thaw()  # the parameters are about to be replaced
        return super()._apply(*args, **kwargs)

    def _load_from_state_dict(self, *args, **kwargs):
        self.thaw()
        return super()._load_from_state_dict(*args, **kwargs)


batch_size = 1024
in_features = 8192
out_features = 8192
multiplier = 2.0
negative_slope = 0.1


def get_inputs():
    return [torch.rand(batch_size, in_features)]


def get_init_inputs():
    return [in_features, out_features, multiplier, negative_slope]
