// What a kernel compiled for the host asks of the simulator's runtime. Included by both sides.
#pragma once
#include <cstddef>
#include <cstdint>

namespace fusewright_simulator {

// The running thread's coordinates along axis 0, 1, 2. Constant within a thread, so the compiler may keep them.
__attribute__((const)) unsigned thread_index(unsigned axis);
__attribute__((const)) unsigned block_index(unsigned axis);
__attribute__((const)) unsigned block_extent(unsigned axis);
__attribute__((const)) unsigned grid_extent(unsigned axis);
__attribute__((const)) unsigned lane_index();

// Where a synchronising call stands in the source: two copies of one call, made by inlining, are the same place.
struct Site {
    const char* file;
    unsigned line;
};

// Waits until `threads` threads of the block (0: all that have not left the kernel) have arrived at barrier `id`.
// Returns how many of them passed a true `predicate`.
unsigned barrier_sync(unsigned id, unsigned threads, bool predicate, Site site);
// Arrives at the barrier for those who wait at it, without waiting.
void barrier_arrive(unsigned id, unsigned threads, Site site);

// What each lane of a warp brought to a collective operation; `present` are the lanes that took part.
struct Exchange {
    uint64_t values[32];
    uint32_t present;
};
// Waits for every lane in `mask` to bring a value to the same `operation`. Orders memory only for "__syncwarp".
const Exchange& exchange(const char* operation, uint32_t mask, uint64_t value, Site site);

// Reports a bug of the kernel and never returns. The text goes on from "thread … ".
[[noreturn]] void fail_undefined(const char* text);
[[noreturn]] void fail_trap(const char* text);
[[noreturn]] void fail_local_overrun(const void* place);

// Checks a read and write of one atomic operation.
void check_atomic(const void* pointer, size_t bytes);

// cp.async: `bytes` are written to shared memory, the first `source_bytes` of them from `source` and the rest as zeros,
// as late as the thread's waits permit.
void async_copy(void* destination, const void* source, unsigned bytes, unsigned source_bytes);
void async_commit();
// Completes all but the latest `pending` committed groups of this thread.
void async_wait(unsigned pending);
// Completes every copy of this thread, committed or not.
void async_wait_all();

// Waits until the launch before this one has ended.
void launch_before_wait();

// Types of the tensor cores' factors; of a TF32 number's word the lower 13 bits are ignored.
enum class Factor : uint8_t { Half, Bfloat16, Tf32 };
// What a thread gets from mma.sync: d (2 × 2) += two rows of A · two columns of B, of 32 bytes each.
void mma(float (&d)[4], const uint32_t (&rows)[2][8], const uint32_t (&columns)[2][8], Factor type);

// ---- Hopper ---------------------------------------------------------------------------------------------------------

// Where a pointer into shared memory lies there, as 32-bit addresses count it.
uint32_t shared_address(const void* pointer);

unsigned cluster_rank();
// Waits for every thread of the cluster that has not left the kernel.
void cluster_sync();

// setmaxnreg: this warp has `count` registers a thread from here on; more, if `acquires`, else fewer.
void set_registers(unsigned count, bool acquires);

void mbarrier_init(void* barrier, uint32_t arrivals);
void mbarrier_fence_init();
// Arrives, in block `rank` of the cluster, or in its own (kOwnBlock), after the phase was made to expect `bytes` more.
constexpr unsigned kOwnBlock = ~0u;
void mbarrier_arrive(void* barrier, uint32_t bytes, unsigned rank);
// Whether the phase of this parity has completed. Lets the others run before it says no.
bool mbarrier_wait(void* barrier, uint32_t parity);

void fence_proxy_async();
// Bulk tensor copies. at: coordinates of the box, innermost first. blocks: of the cluster, as bits; 0: its own.
void tensor_load(void* destination, const void* map, void* barrier, const int* at, unsigned dimensions,
                 unsigned blocks);
// Arrives in block `rank` of the cluster, and is counted there as a copy is.
void store_async(void* destination, void* barrier, unsigned rank, const void* values, unsigned bytes);
void tensor_store(const void* map, const void* source, const int* at, unsigned dimensions);
void tensor_store_commit();
// read: waits only until shared memory has been read.
void tensor_store_wait(unsigned pending, bool read);

// What one thread gives to a wgmma: d (64 × columns, float32) = (accumulate ? d : 0) + A (64 × k) · B (k × columns), of k
// numbers in 32 bytes.
struct Product {
    float* d;                    // this thread's columns / 2 accumulators
    const uint32_t* a_registers;  // its 4 registers of A, or null: A is described by `a`
    uint64_t a, b;
    uint32_t columns;
    Factor type;
    bool a_transposed, b_transposed, accumulate;  // transposed: MN-major
};
void wgmma(const Product& product);
void wgmma_fence();
void wgmma_commit();
void wgmma_wait(unsigned pending);

}  // namespace fusewright_simulator
