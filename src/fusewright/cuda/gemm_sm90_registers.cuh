// GemmSm90 whose operand A arrives as float32, K-major, and is split into fp16 halves in the consumers' registers: no
// walk over it beforehand, and nothing of it kept. For a weight that changes between calls.
//
// Let A be the weight [M = features, K] and B the split activations [N = rows, K]: the tensor cores then compute the
// transposed product, and the epilogue is called with (row, feature) as ever.
#pragma once
#include "gemm_sm90.cuh"

namespace fusewright {

// Config: as for GemmSm90; kTileM is 128, kTileN 128 or 256 (three products: 128), and both majors are K.
template <class Config> struct GemmSm90Registers {
    using Gemm = GemmSm90<Config>;
    using Operands = typename Gemm::Operands;
    using Ring = typename Gemm::Ring;
    using Tiles = typename Gemm::Tiles;
    static constexpr int kTileM = Gemm::kTileM, kTileN = Gemm::kTileN, kStages = Gemm::kStages;
    static constexpr int kCluster = Gemm::kCluster, kSums = Gemm::kSums, kThreads = Gemm::kThreads;
    static constexpr bool kThreeProducts = Gemm::kThreeProducts;
    static_assert(kTileM == 128 && Gemm::kMajorA == Major::K && Gemm::kMajorB == Major::K);

    // A's stage is two boxes of 32 floats a row; B's one or two planes, as in GemmSm90.
    static constexpr int kPlaneA = kTileM * 128, kPlaneB = kTileN * 128, kPlanesB = Gemm::kPlanes;
    static constexpr int kStageBytes = 2 * kPlaneA + kPlanesB * kPlaneB;
    // Slabs are transposed: 32 columns by a warp's 16 rows, padded so that what a warp writes meets in no bank.
    static constexpr int kSlabColumns = 32, kPitch = 20, kSlabBytes = kSlabColumns * kPitch * 4;
    static constexpr int kSlabs = kStages * kStageBytes, kBarriers = kSlabs + Gemm::kConsumerWarps * kSlabBytes;
    static constexpr int kSharedBytes = kBarriers + 2 * kStages * 8 + 1024;
    static_assert(kSharedBytes <= 232448);

    struct Memory {
        unsigned char* base;

        __device__ unsigned char* a(int stage) const { return base + stage * kStageBytes; }
        __device__ unsigned char* b(int stage) const { return a(stage) + 2 * kPlaneA; }
        __device__ float* slab(int warp) const { return reinterpret_cast<float*>(base + kSlabs + warp * kSlabBytes); }
        __device__ uint64_t* full(int stage) const { return reinterpret_cast<uint64_t*>(base + kBarriers) + stage; }
        __device__ uint64_t* empty(int stage) const { return full(kStages + stage); }
    };

    // magnitudes: the bits of the largest |x| of every row of A, zeroed by the caller; for the patch and the next s.
    template <class Epilogue>
    __device__ __forceinline__ static void run(const Operands& operands, uint32_t* magnitudes,
                                               const Epilogue& epilogue) {
        extern __shared__ unsigned char shared[];
        const Memory memory{shared + (-shared_address(shared) & 1023)};
        if (threadIdx.x == 0) {
            for (int stage = 0; stage < kStages; ++stage) {
                mbarrier_init(memory.full(stage), 1);
                mbarrier_init(memory.empty(stage), Gemm::kConsumerWarps * kCluster);
            }
            mbarrier_fence_init();
        }
        if constexpr (kCluster > 1) cluster_sync();
        else __syncthreads();
        if (threadIdx.x < 128) {
            registers_release<24>();
            if (threadIdx.x == 0) produce(operands, memory);
        } else {
            registers_acquire<240>();
            consume(operands, memory, magnitudes, epilogue);
        }
        if constexpr (kCluster > 1) cluster_sync();
    }

    // ---- Producer ---------------------------------------------------------------------------------------------------

    __device__ __forceinline__ static void produce(const Operands& operands, const Memory& memory) {
        Ring ring;
        for (Tiles tiles(operands); tiles.more(); tiles.advance()) {
            const int m = tiles.m(), n = tiles.n(), k_tiles = operands.k_tiles();
            for (int k_tile = 0; k_tile < k_tiles; ++k_tile, ring.advance()) {
                mbarrier_wait(memory.empty(ring.stage), ring.parity ^ 1);
                mbarrier_arrive_expect_tx(memory.full(ring.stage), kStageBytes);
                load(operands, memory, ring.stage, m, n, k_tile * Gemm::kTileK);
            }
        }
    }

    __device__ __forceinline__ static void load(const Operands& operands, const Memory& memory, int stage, int m, int n,
                                                int k) {
        uint64_t* full = memory.full(stage);
        const int rank = kCluster > 1 ? cluster_rank() : 0;
#pragma unroll
        for (int half = 0; half < 2; ++half)
#pragma unroll
            for (int row = 0; row < kTileM; row += 64)
                tensor_load(memory.a(stage) + half * kPlaneA + row * 128, &operands.a, full, k + half * 32, m + row, 0);
#pragma unroll
        for (int plane = 0; plane < kPlanesB; ++plane)
#pragma unroll
            for (int part = 0; part < kTileN; part += 64 * kCluster) {
                const int column = part + rank * 64;
                unsigned char* destination = memory.b(stage) + plane * kPlaneB + column * 128;
                if constexpr (kCluster > 1)
                    tensor_load_multicast(destination, &operands.b, full, k, n + column, plane, (1 << kCluster) - 1);
                else
                    tensor_load(destination, &operands.b, full, k, n + column, plane);
            }
    }

    // ---- Consumers --------------------------------------------------------------------------------------------------

    // A warp's 16 rows of A by 32 k, as two k16 steps of fragments (see wgmma_registers).
    struct Fragments {
        uint32_t hi[2][4], lo[2][4];
    };

    // What a thread reads of A and how it splits it.
    struct Source {
        int offset, lane;  // of the warp's first row
        float scale;
        uint32_t row_max[2];  // magnitudes of the thread's two rows
    };

    template <class Epilogue>
    __device__ __forceinline__ static void consume(const Operands& operands, const Memory& memory, uint32_t* magnitudes,
                                                   const Epilogue& epilogue) {
        Ring ring;
        const int group = Gemm::uniform(threadIdx.x / 128) - 1, warp = Gemm::uniform(threadIdx.x / 32) - 4;
        const int first = group * 64 + warp % 4 * 16, lane = threadIdx.x % 32;
        for (Tiles tiles(operands); tiles.more(); tiles.advance()) {
            Source source{first * 128, lane, split_scale(*operands.split_a.exponent), {}};
            float sums[1][kSums];
            if constexpr (kThreeProducts)
                compute_three_products(sums[0], ring, memory, source, operands.k_tiles());
            else
                compute(sums[0], ring, memory, source, operands.k_tiles());
            const int row = tiles.m() + first, n = tiles.n();
            if (n == 0) report(source, magnitudes, row, operands.M);
            Gemm::undo_scale(sums, operands);
            if (row + 16 <= operands.M && n + kTileN <= operands.N)
                turn<true>(sums[0], operands, memory.slab(warp), row, n, lane, epilogue);
            else
                turn<false>(sums[0], operands, memory.slab(warp), row, n, lane, epilogue);
        }
    }

    // Reads a box of A, 32 k, as pairs: values[row + 8?][pair], pair = 2 · step + upper half of the step's k. Odd rows
    // read the other step's pairs in place of these: so the rows that half a warp reads at once lie in different banks.
    __device__ __forceinline__ static void read(const unsigned char* box, const Source& source,
                                                float2 (&values)[2][4]) {
        const int r = source.lane / 4, q = source.lane % 4;
#pragma unroll
        for (int upper = 0; upper < 2; ++upper)
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const int chunk = 2 * (j ^ (r & 1) << 1) + q / 2;
                values[upper][j] = *reinterpret_cast<const float2*>(box + source.offset + (r + 8 * upper) * 128 +
                                                                    ((chunk ^ r) << 4) + q % 2 * 8);
            }
    }

    __device__ __forceinline__ static void split(const float2 (&values)[2][4], Source& source, Fragments& fragments) {
        const bool odd = source.lane / 4 % 2;
#pragma unroll
        for (int upper = 0; upper < 2; ++upper) {
            uint32_t hi[4], lo[4];
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const float2 v = values[upper][j];
                const uint32_t x = __float_as_uint(v.x) & 0x7fffffff, y = __float_as_uint(v.y) & 0x7fffffff;
                source.row_max[upper] = max(source.row_max[upper], max(x, y));
                halves(v.x * source.scale, v.y * source.scale, hi[j], lo[j]);
            }
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int step = i / 2, slot = 2 * (i % 2) + upper, other = i ^ 2;
                fragments.hi[step][slot] = odd ? hi[other] : hi[i];
                if constexpr (kThreeProducts) fragments.lo[step][slot] = odd ? lo[other] : lo[i];
            }
        }
    }

    __device__ __forceinline__ static void halves(float x, float y, uint32_t& hi, uint32_t& lo) {
        const __half2 rounded = __floats2half2_rn(x, y);
        hi = *reinterpret_cast<const uint32_t*>(&rounded);
        if constexpr (kThreeProducts) {
            const float2 back = __half22float2(rounded);
            const __half2 rest = __floats2half2_rn((x - back.x) * 0x1p11f, (y - back.y) * 0x1p11f);
            lo = *reinterpret_cast<const uint32_t*>(&rest);
        }
    }

    __device__ __forceinline__ static uint64_t b(const Memory& memory, int stage, int step, int plane) {
        return matrix_descriptor(memory.b(stage), Gemm::kPanelBytes) + (plane * kPlaneB >> 4) + step * 2;
    }

    // While the tensor cores multiply one box of A, the next is read and rounded into the other fragments.
    __device__ __forceinline__ static void compute(float (&sums)[kSums], Ring& ring, const Memory& memory,
                                                   Source& source, int k_tiles) {
        Fragments fragments[2];
        int previous = -1;
        for (int k_tile = 0; k_tile < k_tiles; ++k_tile, ring.advance()) {
            mbarrier_wait(memory.full(ring.stage), ring.parity);
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                float2 values[2][4];
                read(memory.a(ring.stage) + half * kPlaneA, source, values);
                split(values, source, fragments[half]);
                wgmma_fence();
#pragma unroll
                for (int step = 0; step < 2; ++step)
                    wgmma_registers(sums, fragments[half].hi[step], b(memory, ring.stage, 2 * half + step, 0),
                                    k_tile > 0 || half > 0 || step > 0);
                wgmma_commit();
                wgmma_wait<1>();
                if (half == 0 && previous >= 0) Gemm::release(memory, previous);
            }
            previous = ring.stage;
        }
        wgmma_wait<0>();
        Gemm::release(memory, previous);
        hold_registers(sums);
    }

    // Sums leave no registers for second fragments: the other warpgroup's products run while this one splits.
    __device__ __forceinline__ static void compute_three_products(float (&main)[kSums], Ring& ring,
                                                                  const Memory& memory, Source& source, int k_tiles) {
        float chain[kSums], corrections[kSums];
#pragma unroll
        for (int i = 0; i < kSums; ++i) main[i] = corrections[i] = 0;
        for (int k_tile = 0; k_tile < k_tiles; ++k_tile, ring.advance()) {
            mbarrier_wait(memory.full(ring.stage), ring.parity);
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                Fragments fragments;
                float2 values[2][4];
                read(memory.a(ring.stage) + half * kPlaneA, source, values);
                split(values, source, fragments);
                wgmma_fence();
#pragma unroll
                for (int step = 0; step < 2; ++step)
                    wgmma_registers(chain, fragments.hi[step], b(memory, ring.stage, 2 * half + step, 0), step > 0);
                wgmma_commit();
#pragma unroll
                for (int step = 0; step < 2; ++step) {
                    const uint64_t hi = b(memory, ring.stage, 2 * half + step, 0);
                    const uint64_t lo = b(memory, ring.stage, 2 * half + step, 1);
                    wgmma_registers(corrections, fragments.hi[step], lo, true);
                    wgmma_registers(corrections, fragments.lo[step], hi, true);
                }
                wgmma_commit();
                wgmma_wait<1>();
                Gemm::promote(main, chain);
                wgmma_wait<0>();
            }
            Gemm::release(memory, ring.stage);
        }
        hold_registers(corrections);
#pragma unroll
        for (int i = 0; i < kSums; ++i) main[i] = fmaf(corrections[i], 0x1p-11f, main[i]);
    }

    // Four lanes share a row.
    __device__ __forceinline__ static void report(const Source& source, uint32_t* magnitudes, int row, int64_t rows) {
#pragma unroll
        for (int upper = 0; upper < 2; ++upper) {
            uint32_t largest = source.row_max[upper];
            largest = max(largest, __shfl_xor_sync(~0u, largest, 1));
            largest = max(largest, __shfl_xor_sync(~0u, largest, 2));
            const int64_t at = row + upper * 8 + source.lane / 4;
            if (source.lane % 4 == 0 && at < rows) atomicMax(magnitudes + at, largest);
        }
    }

    // The epilogue's rows are columns here: a warp passes 8 of them at a time, 16 consecutive features each.
    template <bool kWhole, class Epilogue>
    __device__ __forceinline__ static void turn(const float (&sums)[kSums], const Operands& operands, float* slab,
                                                int row, int n, int lane, const Epilogue& epilogue) {
#pragma unroll
        for (int column = 0; column < kTileN; column += kSlabColumns) {
            __syncwarp();
#pragma unroll
            for (int i = 0; i < kSlabColumns / 2; ++i)
                slab[(i / 4 * 8 + lane % 4 * 2 + i % 2) * kPitch + lane / 4 + i / 2 % 2 * 8] = sums[column / 2 + i];
            __syncwarp();
#pragma unroll(kWhole ? 4 : 1)
            for (int part = 0; part < 4; ++part) {
                const int y = part * 8 + lane / 4, x = lane % 4 * 4;
                alignas(16) float values[4];
                *reinterpret_cast<float4*>(values) = *reinterpret_cast<const float4*>(slab + y * kPitch + x);
                const int64_t out_row = n + column + y, feature = row + x;
                const int64_t left = out_row < operands.N ? operands.M - feature : 0;
                epilogue.template operator()<4>(out_row, feature, kWhole || left > 4 ? 4 : int(left), values);
            }
        }
    }
};

}  // namespace fusewright
