// GemmSm90 whose operand A arrives as float32, as it lies in memory, and is rounded to fp16 in the consumers' registers:
// with nothing done beforehand, and nothing of it kept. For a weight that few products read and that may have changed
// since the last call.
//
// Tensor cores take A from registers, but B not. So let A be the weight [M = features, K] and B the split activations
// [N = rows, K]: this computes the transposed product, and calls the epilogue with (row, feature) as ever.
#pragma once
#include "gemm_sm90.cuh"

namespace fusewright {

// Config: as for GemmSm90, of __half, scaled, one product, cooperative, kTileM 128 and kVector 4. Of A only the exponent
// need be given: one for all rows.
template <class Config> struct GemmSm90Registers {
    using Gemm = GemmSm90<Config>;
    using Operands = typename Gemm::Operands;
    using Ring = typename Gemm::Ring;
    using Tiles = typename Gemm::Tiles;
    static constexpr int kTileM = Gemm::kTileM, kTileN = Gemm::kTileN, kTileK = Gemm::kTileK, kSums = Gemm::kSums;
    static_assert(kTileM == 128 && Gemm::kVector == 4 && !Gemm::kThreeProducts && Gemm::kScaled && !Gemm::kPingPong &&
                  Gemm::kSplitK == 1);
    static_assert(!Config::kByLineA);

    // A box holds 32 floats of each of 64 lines: of 64 rows where A is K-major, else of 64 k.
    static constexpr bool kAlongK = Gemm::kMajorA == Major::K;
    static constexpr int kBox = 32, kLineBytes = 128, kBytesA = kTileM * kTileK * 4;
    using Memory = typename Gemm::template MemoryFor<kBytesA>;
    static constexpr int kThreads = Gemm::kThreads, kSharedBytes = Memory::kBytes;

    template <class Epilogue>
    __device__ __forceinline__ static void run(const Operands& operands, const Epilogue& epilogue) {
        Gemm::template run<GemmSm90Registers>(operands, epilogue);
    }

    // Boxes of the same columns lie below each other, so that all lines of such a panel are kLineBytes apart.
    __device__ __forceinline__ static void load_a(const Operands& operands, const Memory& memory, int stage, int m,
                                                  int k) {
        constexpr int kLines = kAlongK ? kTileM : kTileK, kLength = kAlongK ? kTileK : kTileM;
        const int x = kAlongK ? k : m, y = kAlongK ? m : k;
#pragma unroll
        for (int column = 0; column < kLength; column += kBox)
#pragma unroll
            for (int line = 0; line < kLines; line += Gemm::kPanel)
                tensor_load(memory.a(stage) + (column / kBox * kLines + line) * kLineBytes, &operands.a,
                            memory.full(stage), x + column, y + line, 0);
    }

    template <class Epilogue>
    __device__ __forceinline__ static void consume(const Operands& operands, const Memory& memory,
                                                   const Epilogue& epilogue) {
        Ring ring;
        const int group = Gemm::uniform(threadIdx.x / 128) - 1, warp = Gemm::uniform(threadIdx.x / 32) - 4;
        float* slab = memory.slab(warp);
        for (Tiles tiles(operands); tiles.more(); tiles.advance()) {
            Rows rows{warp * 16, int(threadIdx.x % 32), split_scale(*operands.split_a.exponent), {}};
            typename Gemm::Sums sums;
            compute(sums[0], ring, memory, rows, group, operands.k_tiles());
            const int m = tiles.m() + rows.first, n = tiles.n();
            if (tiles.m() >= operands.M) continue;  // the last cluster may have a block too many
            if (operands.lost) {
                bool lost = out_of_range(rows, *operands.split_a.exponent);
                lost |= loses_bits(sums, operands, slab, rows, m, n);
                Gemm::note_lost(operands, tile(tiles, operands), lost);
            }
            Gemm::undo_scale(operands).apply(sums, m, n);
            if (Gemm::kWhole || (m + 16 <= operands.M && n + kTileN <= operands.N))
                turn<true>(sums[0], operands, slab, m, n, epilogue);
            else
                turn<false>(sums[0], operands, slab, m, n, epilogue);
        }
    }

    // ---- A, from shared memory to registers -------------------------------------------------------------------------

    // The 16 rows of A that a warp multiplies, of which each thread holds two: lane / 4 and the eighth after it.
    struct Rows {
        int first, lane;  // first: of the tile's
        float scale, largest[2];
    };

    // 32 k as fragments of two k16 steps (see wgmma_registers).
    using Fragments = uint32_t[2][4];

    // A thread's pairs of 32 k, by row, then by the k8 that they are of.
    using Pairs = float2[2][4];

    // Odd rows read the other step's pairs in place of these: so the rows that half a warp reads at once lie in different
    // banks.
    __device__ __forceinline__ static void read_along_k(const unsigned char* box, const Rows& rows, Pairs& pairs) {
        const int r = rows.lane / 4, q = rows.lane % 4;
#pragma unroll
        for (int upper = 0; upper < 2; ++upper)
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const int chunk = 2 * (j ^ (r & 1) << 1) + q / 2;
                pairs[upper][j] = *reinterpret_cast<const float2*>(box + (rows.first + r + 8 * upper) * kLineBytes +
                                                                   ((chunk ^ r) << 4) + q % 2 * 8);
            }
    }

    // Here a pair lies in two lines. What a warp reads at once is in different banks as it is.
    __device__ __forceinline__ static void read_across_k(const unsigned char* box, const Rows& rows, Pairs& pairs) {
        const int r = rows.lane / 4, q = rows.lane % 4;
        box += rows.first / kBox * kTileK * kLineBytes;
        const auto at = [&](int upper, int j, int i) {
            const int line = 8 * j + 2 * q + i, chunk = (rows.first % kBox + 8 * upper + r) / 4;
            return *reinterpret_cast<const float*>(box + line * kLineBytes + ((chunk ^ line % 8) << 4) + r % 4 * 4);
        };
#pragma unroll
        for (int upper = 0; upper < 2; ++upper)
#pragma unroll
            for (int j = 0; j < 4; ++j) pairs[upper][j] = make_float2(at(upper, j, 0), at(upper, j, 1));
    }

    __device__ __forceinline__ static void round(const Pairs& pairs, Rows& rows, Fragments& fragments) {
        const bool exchanged = kAlongK && rows.lane / 4 % 2;
#pragma unroll
        for (int upper = 0; upper < 2; ++upper) {
            uint32_t rounded[4];
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const float2 v = pairs[upper][j];
                rows.largest[upper] = fmaxf(rows.largest[upper], fmaxf(fabsf(v.x), fabsf(v.y)));
                const __half2 both = __floats2half2_rn(v.x * rows.scale, v.y * rows.scale);
                rounded[j] = *reinterpret_cast<const uint32_t*>(&both);
            }
#pragma unroll
            for (int j = 0; j < 4; ++j)
                fragments[j / 2][2 * (j % 2) + upper] = exchanged ? rounded[j ^ 2] : rounded[j];
        }
    }

    __device__ __forceinline__ static void read(const Memory& memory, int stage, int half, const Rows& rows,
                                                Pairs& pairs) {
        if constexpr (kAlongK)
            read_along_k(memory.a(stage) + half * kTileM * kLineBytes, rows, pairs);
        else
            read_across_k(memory.a(stage) + half * kBox * kLineBytes, rows, pairs);
    }

    // While the tensor cores multiply 32 k of A, the next are read and rounded into the other fragments.
    __device__ __forceinline__ static void compute(float (&sums)[kSums], Ring& ring, const Memory& memory, Rows& rows,
                                                   int group, int k_tiles) {
        Fragments fragments[2];
        int previous = -1;
        for (int k_tile = 0; k_tile < k_tiles; ++k_tile, ring.advance()) {
            mbarrier_wait(memory.full(ring.stage), ring.parity);
            const typename Gemm::Stage stage(memory, ring.stage, group);
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                Pairs pairs;
                read(memory, ring.stage, half, rows, pairs);
                round(pairs, rows, fragments[half]);
                wgmma_fence();
#pragma unroll
                for (int step = 0; step < 2; ++step)
                    wgmma_registers<Gemm::kMajorB>(sums, fragments[half][step], stage.b(2 * half + step),
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

    // ---- Sums -------------------------------------------------------------------------------------------------------

    // The tile's place as the epilogue sees it.
    __device__ __forceinline__ static int64_t tile(const Tiles& tiles, const Operands& operands) {
        return tiles.n() / kTileN * ((operands.M + kTileM - 1) / kTileM) + tiles.m() / kTileM;
    }

    // A warp has seen all of its rows, and so knows their magnitudes. Nobody else needs to: it speaks of what is out of
    // range as it does of lost bits. A row with a NaN needs no patch, for all its products are NaN.
    __device__ __forceinline__ static bool out_of_range(Rows& rows, int exponent) {
        bool found = false;
#pragma unroll
        for (int upper = 0; upper < 2; ++upper) {
            float& largest = rows.largest[upper];  // of what four lanes have seen, then of the row
            largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 1));
            largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 2));
            found |= split_out_of_range(__float_as_int(largest), exponent);
        }
        return __any_sync(~0u, found);
    }

    // m: of the warp's first row.
    __device__ __forceinline__ static bool loses_bits(typename Gemm::Sums& sums, const Operands& operands,
                                                      float* slab, const Rows& rows, int m, int n) {
        if (rows.lane % 4 == 0) slab[rows.lane / 4] = rows.largest[0], slab[rows.lane / 4 + 8] = rows.largest[1];
        __syncwarp();
        Operands known = operands;
        known.split_a.magnitudes = reinterpret_cast<const int*>(slab) - m;
        return Gemm::lost_bits(known).found(sums, slab, m, n);
    }

    // The epilogue's rows are columns here: a warp passes 8 of them at a time, 16 consecutive features each.
    template <bool kInside, class Epilogue>
    __device__ __forceinline__ static void turn(float (&sums)[kSums], const Operands& operands, float* slab, int m,
                                                int n, const Epilogue& epilogue) {
        constexpr int kColumns = 32;
        const int lane = threadIdx.x % 32;
#pragma unroll(kInside ? kTileN / kColumns : 1)
        for (int column = 0; column < kTileN; column += kColumns) {
            __syncwarp();
#pragma unroll
            for (int i = 0; i < kColumns / 2; ++i)
                slab[slab_index(i / 4 * 8 + lane % 4 * 2 + i % 2, i / 2 % 2 * 8 + lane / 4)] =
                    sums[(kInside ? column / 2 : 0) + i];
            __syncwarp();
#pragma unroll(kInside ? 4 : 1)
            for (int part = 0; part < 4; ++part) {
                const int slab_row = part * 8 + lane / 4, slab_column = lane % 4 * 4;
                alignas(16) float values[4];
                *reinterpret_cast<float4*>(values) =
                    *reinterpret_cast<const float4*>(slab + slab_index(slab_row, slab_column));
                const int64_t y = n + column + slab_row, x = m + slab_column;
                const int64_t left = y < operands.N ? operands.M - x : 0;
                epilogue.template operator()<4>(y, x, kInside || left > 4 ? 4 : int(left), values);
            }
            if constexpr (!kInside) turn_round<kColumns / 2>(sums);
        }
    }

    // Rows of 16, two in a line. Chunks of 4 are swizzled so that neither what is written nor what is read meets in a bank.
    __device__ __forceinline__ static int slab_index(int row, int column) {
        const int line = row / 2, chunk = row % 2 * 4 + column / 4;
        return line * 32 + (chunk ^ line % 4 * 2) * 4 + column % 4;
    }
};

}  // namespace fusewright
