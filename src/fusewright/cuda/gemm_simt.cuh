// Matrix product with a generated epilogue on the CUDA cores: epilogue(A [M, K] · B [K, N]), any strides, any sizes.
//
// A block computes a tile of the result. It walks along K: while its threads multiply one pair of tiles of A and B out
// of shared memory, the next pair is on its way from global memory to registers, and two buffers take turns. A thread
// computes MicroM x MicroN sums, so that each value it reads from shared memory is used that many times.
//
// A sum of K products in one chain has a rounding error that grows with K. So a thread sums kBlockK products at a time
// and adds each such block to a main sum. Main sums lie in shared memory, where each thread visits only its own:
// registers stay free, and no barrier is needed.
#pragma once
#include "major.cuh"
#include "vector.cuh"

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
