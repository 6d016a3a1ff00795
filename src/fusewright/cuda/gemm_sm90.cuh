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
#pragma once
#include "launch.cuh"
#include "lost_bits.cuh"
#include "sm90.cuh"
#include "split_f16.cuh"
#include "undo_scale.cuh"
#include "vector.cuh"

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
