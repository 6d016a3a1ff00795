// Matrix product of few rows with a generated epilogue on the CUDA cores: epilogue(A [M, K] · B [K, N]).
//
// With few rows the time is that of reading B, once. So every thread keeps several pieces of B on their way: it copies
// them to places of its own in shared memory, a ring of kStages, and needs no barrier to read them back. What all
// threads share is a panel of A, as accumulators, which lies in shared memory while the block goes along it.
//
// A thread computes all Rows of kVector neighbouring columns, from every eighth piece of K: eight lanes share columns.
// After each panel they add up what they have, and each keeps some of the rows. A chain is kPanel / 8 products long;
// the panels' sums are added to main sums. Blocks may split K: the epilogue then gets each split's sums.
#pragma once
#include "async.cuh"
#include "major.cuh"
#include "vector.cuh"

namespace fusewright {

// Rows: 8 or 16 rows of A that a block takes. A: K is contiguous; B: K or the columns are, as MajorB says. Lines of both
// start at multiples of kAlignmentA and kAlignmentB bytes.
// Epilogue: template <int V> void operator()(int64_t m, int64_t n, int count, const Accumulator (&sums)[V]) const
// finishes columns n … n + count - 1 of row m; the rows of split s follow those of split s - 1: m counts from s · M. All
// lanes of a warp call it together, those past the end with count <= 0, and in the order that store_bits asks for.
// Grid: x = ceil(M / Rows) · ceil(N / kColumns), y = splits. Block: kThreads. Dynamic shared memory: kSharedBytes.
template <class Element, class Accumulator, int Rows, Major MajorB> struct GemmSkinny {
    static constexpr int kThreads = 256, kBlocksPerMultiprocessor = 2, kStages = 4;
    static constexpr int kVector = 16 / sizeof(Accumulator), kDepth = 16 / sizeof(Element);
    static constexpr int kLanesK = 8, kLanesN = 4;          // lane = lane along K · kLanesN + lane along the columns
    static constexpr int kColumns = kThreads / kLanesK * kVector;
    static constexpr int kStep = kLanesK * kDepth;          // k that a stage of the ring holds
    static constexpr int kPanel = 2048 / sizeof(Accumulator), kSteps = kPanel / kStep;
    static constexpr int kOwned = Rows / kLanesK;           // rows that a lane finishes
    // A thread's piece of B is kVector columns by kDepth k, in lines along K or along the columns.
    static constexpr int kLines = MajorB == Major::K ? kVector : kDepth;
    static constexpr int kLineWidth = MajorB == Major::K ? kDepth : kVector;
    static constexpr int kAlignmentA = kVector * sizeof(Element), kAlignmentB = kLineWidth * sizeof(Element);
    static_assert(MajorB != Major::Strided && Rows % kLanesK == 0 && kPanel % kStep == 0);

    struct Shared {
        __align__(16) Accumulator a[Rows][kPanel];
        __align__(16) Element b[kStages][kLines][kThreads][kLineWidth];
    };
    static constexpr int kSharedBytes = sizeof(Shared);

    // Strides are in elements. k_per_split: a multiple of 16 bytes of elements.
    template <class Epilogue>
    __device__ __forceinline__ static void run(const Element* a, int64_t a_row_stride, const Element* b,
                                               int64_t b_line_stride, int64_t M, int64_t N, int64_t K,
                                               int64_t k_per_split, const Epilogue& epilogue) {
        extern __shared__ __align__(16) unsigned char dynamic_shared[];
        Shared& shared = *reinterpret_cast<Shared*>(dynamic_shared);
        const int64_t row_blocks = (M + Rows - 1) / Rows, first_m = blockIdx.x % row_blocks * Rows;
        const int64_t n = blockIdx.x / row_blocks * kColumns + column(), left = N - n;
        const int count = int(left < kVector ? left : kVector);
        const int64_t first_k = blockIdx.y * k_per_split;
        const int64_t depth = K - first_k < k_per_split ? K - first_k : k_per_split;  // none if negative

        const int lane_k = threadIdx.x % 32 / kLanesN;
        const Piece piece{b + (MajorB == Major::K ? n * b_line_stride + first_k + lane_k * kDepth
                                                  : (first_k + lane_k * kDepth) * b_line_stride + n),
                          b_line_stride, count, depth - lane_k * kDepth};
        const int steps = int((depth + kStep - 1) / kStep);
        for (int step = 0; step < kStages - 1; ++step) piece.copy(shared, step);

        Accumulator main[kOwned][kVector] = {};
        for (int first = 0; first < steps; first += kSteps) {
            const int64_t panel = int64_t(first) * kStep;
            __syncthreads();  // all have read the panel before
            fill_panel(shared, a + first_m * a_row_stride + first_k + panel, a_row_stride, M - first_m, depth - panel);
            __syncthreads();

            Accumulator sums[Rows][kVector] = {};
            const int end = steps - first < kSteps ? steps - first : kSteps;
#pragma unroll 1
            for (int i = 0; i < end; ++i) {
                copy_async_wait<kStages - 2>();
                piece.copy(shared, first + i + kStages - 1);  // to where the step before this one was
                multiply(shared, first + i, &shared.a[0][i * kStep + lane_k * kVector], sums);
            }
            fold(sums);
#pragma unroll
            for (int i = 0; i < kOwned; ++i)
#pragma unroll
                for (int v = 0; v < kVector; ++v) main[i][v] += sums[i][v];
        }
#pragma unroll
        for (int i = 0; i < kOwned; ++i) {
            const int64_t m = first_m + lane_k * kOwned + i;
            epilogue.template operator()<kVector>(blockIdx.y * M + m, n, m < M ? count : 0, main[i]);
        }
    }

private:
    // The thread's first column, within the block.
    __device__ __forceinline__ static int column() {
        return (threadIdx.x / 32 * kLanesN + threadIdx.x % kLanesN) * kVector;
    }

    // The thread's pieces of B, one a step. What lies outside is not read, and counts as 0.
    struct Piece {
        const Element* first;
        int64_t line_stride;
        int columns;    // that exist, of kVector
        int64_t depth;  // k that exist from the first one on

        // Starts to copy the piece of a step to its stage. Steps past the last are copied too, as zeros.
        __device__ __forceinline__ void copy(Shared& shared, int step) const {
            const int64_t k = int64_t(step) * kStep, left = depth - k;
            const int deep = left < kDepth ? left < 0 ? 0 : int(left) : kDepth, wide = columns < 0 ? 0 : columns;
            const int lines = MajorB == Major::K ? wide : deep, width = MajorB == Major::K ? deep : wide;
            const Element* source = first + k * (MajorB == Major::K ? 1 : line_stride);
#pragma unroll
            for (int line = 0; line < kLines; ++line)
                copy_async<kAlignmentB>(shared.b[step % kStages][line][threadIdx.x], source + line * line_stride,
                                        line < lines ? width * int(sizeof(Element)) : 0);
            copy_async_commit();
        }
    };

    // Rows of A along a panel, of which `rows` and `depth` exist, as accumulators. A lane reads kVector of its kDepth k
    // at a time, and those that lanes read together lie together.
    __device__ __forceinline__ static void fill_panel(Shared& shared, const Element* a, int64_t row_stride,
                                                      int64_t rows, int64_t depth) {
        constexpr int kAcross = kPanel / kVector;
#pragma unroll 8
        for (int i = threadIdx.x; i < Rows * kAcross; i += kThreads) {
            const int row = i / kAcross, k = i % kAcross * kVector;
            const int64_t left = row < rows ? depth - k : 0;
            Element elements[kVector];
            load_vector(elements, a + row * row_stride + k, int(left < kVector ? left : kVector));
            Accumulator values[kVector];
#pragma unroll
            for (int j = 0; j < kVector; ++j) values[j] = Accumulator(elements[j]);
            const int place = (k % kDepth / kVector * kLanesK + k % kStep / kDepth) * kVector;
            Access<kVector, Accumulator>::store(&shared.a[row][k / kStep * kStep + place], values);
        }
    }

    // Adds the products of a step. a: the lane's first k of it.
    __device__ __forceinline__ static void multiply(const Shared& shared, int step, const Accumulator* a,
                                                    Accumulator (&sums)[Rows][kVector]) {
        const auto& lines = shared.b[step % kStages];
#pragma unroll 1  // registers are dear
        for (int k = 0; k < kDepth; k += kVector) {
            Accumulator y[kVector][kVector];  // lines, whichever way they run
#pragma unroll
            for (int i = 0; i < kVector; ++i) {
                Element line[kVector];
                Access<kVector, Element>::load(
                    line, MajorB == Major::K ? &lines[i][threadIdx.x][k] : lines[k + i][threadIdx.x]);
#pragma unroll
                for (int j = 0; j < kVector; ++j) y[i][j] = Accumulator(line[j]);
            }
#pragma unroll
            for (int row = 0; row < Rows; ++row) {
                Accumulator x[kVector];
                Access<kVector, Accumulator>::load(x, a + row * kPanel + k * kLanesK);
#pragma unroll
                for (int j = 0; j < kVector; ++j)
#pragma unroll
                    for (int v = 0; v < kVector; ++v)
                        sums[row][v] = fma(x[j], MajorB == Major::K ? y[v][j] : y[j][v], sums[row][v]);
            }
        }
    }

    // Adds up over the lanes that share columns: half of the Count rows go to the lane that differs in bit Lanes, half
    // stay. In the end each has the rows from its lane along K · kOwned on.
    template <int Count = Rows, int Lanes = 16>
    __device__ __forceinline__ static void fold(Accumulator (&sums)[Rows][kVector]) {
        constexpr int kHalf = Count / 2;
        const bool upper = threadIdx.x & Lanes;
#pragma unroll
        for (int i = 0; i < kHalf; ++i)
#pragma unroll
            for (int v = 0; v < kVector; ++v) {
                const Accumulator kept = upper ? sums[i + kHalf][v] : sums[i][v];
                const Accumulator given = upper ? sums[i][v] : sums[i + kHalf][v];
                sums[i][v] = kept + __shfl_xor_sync(0xffffffff, given, Lanes);
            }
        if constexpr (Lanes > kLanesN) fold<kHalf, Lanes / 2>(sums);
    }
};

}  // namespace fusewright
