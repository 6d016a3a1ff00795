// One running block: its threads, barriers, shared memory, and the scheduler that runs the threads in turn.
#pragma once
#include <array>
#include <cstdint>
#include <deque>
#include <map>
#include <random>
#include <string>
#include <vector>

#include "../include/api.hpp"
#include "fiber.hpp"
#include "hopper.hpp"
#include "launch.hpp"
#include "shadow.hpp"
#include "signals.hpp"

namespace fusewright_simulator {

struct Failure {
    // The order is that of ERRORS in fusewright/simulator/library.py.
    enum Kind {
        kInterrupted = -1,
        kNone,
        kDeadlock,
        kDivergence,
        kOutOfBounds,
        kMisaligned,
        kUninitialised,
        kRace,
        kInFlight,
        kReadOnly,
        kUndefined,
        kTrap,
        kOperand,
        kFence,
        kPhase,
        kStackOverflow
    };
};

// Behind each variable in shared memory lie so many bytes of nothing (GUARD_BYTES in fusewright/simulator/assembly.py).
constexpr size_t kGuardBytes = 256;
// What a thread may spend before it gives way, at an access. Accesses cost 1; what threads wait with costs more. A prime,
// so that the ends of turns do not keep step with a loop.
constexpr int32_t kTurn = 4093, kAtomicCost = 16, kCollectiveCost = 64;

class Block;
class Cluster;
using Index = std::array<unsigned, 3>;

extern const char* const kLocalOverrun;

// Names the source line of a code address in a message: Python replaces `{pc:…}`.
std::string source(const char* pc);

struct AsyncCopy {
    char* destination;
    const char* source;
    unsigned bytes, source_bytes;
    const char* pc;
};

struct Thread : Agent {
    enum State : uint8_t { kReady, kAtBarrier, kInExchange, kAtMbarrier, kAtCluster, kForRegisters, kGaveWay, kFinished };

    Block* block;
    int32_t fuel;  // what it may still spend on accesses before it gives way
    uint16_t index;  // within the block; x runs fastest
    State state;
    uint32_t turn;  // in this schedule
    Index position;
    Context context;
    StackTop* stack;

    // What it waits for.
    const char* operation;  // of an exchange
    uint32_t mask;
    uint64_t value;
    unsigned barrier;
    bool predicate;
    unsigned counted;  // result of a barrier: true predicates
    Site site;
    const char* pc;
    Exchange received;
    void (Block::*action)(Thread&);  // of an exchange: what the last lane to come does for the warp
    Mbarrier* mbarrier;
    uint32_t parity;
    uint64_t polled;  // the cluster's progress when it was last told that the phase is not complete
    bool timed_out;

    Product product;  // what it brings to a wgmma
    Registers registers;
    std::vector<BulkStore> stores;  // in flight, oldest first
    uint64_t store_groups;          // committed

    std::vector<AsyncCopy> copies;     // in flight, oldest first
    std::deque<unsigned> group_sizes;  // committed groups, oldest first
    unsigned uncommitted;

    std::vector<uint64_t> recent;  // what it saw at the ends of its turns, each once, the latest last
    uintptr_t address;             // of its access at the end of the last one
    Fault fault;
    bool alone;  // has waited until the launch before this one had ended

    unsigned lane() const { return index % 32; }
    [[noreturn]] void fail(int kind, const char* pc, const std::string& message);
};

class Block {
  public:
    explicit Block(Cluster& cluster);
    // Prepares for the blocks of one launch, on the calling OS thread.
    void begin_launch(const SimulatorLaunch& launch);
    // Prepares for the block at `index` of the grid, number `rank` of its cluster.
    void begin_block(Index index, unsigned rank, SimulatorFailure& failure);
    // Runs threads until each one waits or there was a failure.
    void run_ready();
    void end_block();
    bool ready() const { return !ready_.empty(); }
    // Blocks of a cluster share the OS thread, and so the place of their shared memory: they take turns in it.
    void enter();
    void leave();

    // Called from fibers.
    unsigned barrier_sync(Thread& thread, unsigned id, unsigned threads, bool predicate, bool waits, Site site,
                          const char* pc);
    const Exchange& exchange(Thread& thread, const char* operation, uint32_t mask, uint64_t value, Site site,
                             const char* pc);
    void async_copy(Thread& thread, char* destination, const char* source, unsigned bytes, unsigned source_bytes,
                    const char* pc);
    void async_wait(Thread& thread, unsigned pending, const char* pc);
    // Ends a thread's turn after so many accesses: whoever waits for memory to change must let the others run.
    void give_way(Thread& thread, uintptr_t address, size_t bytes, const char* pc);
    size_t gave_way() const { return gave_way_.size(); }
    void next_turns();  // makes those ready who gave way
    // Goes on in the fiber of a thread that got a signal.
    static void report_fault();
    void access(Thread& thread, Access access, uintptr_t address, size_t bytes, const char* pc);
    [[noreturn]] void fail(Thread& thread, int kind, const char* pc, const std::string& message);
    void set_failure(const Thread& thread, int kind, const char* pc, const std::string& message);
    void cluster_sync(Thread& thread, const char* pc);

    // Registers that move between warps (warpgroup.cpp).
    void set_registers(Thread& thread, unsigned count, bool acquires, const char* pc);

    // mbarriers (mbarrier.cpp).
    void mbarrier_init(Thread& thread, const void* barrier, uint32_t arrivals, const char* pc);
    void publish_mbarriers(Thread& thread, bool all);
    void fence_proxy(Thread& thread);
    void mbarrier_arrive(Thread& thread, const void* barrier, uint32_t bytes, unsigned rank, const char* pc);
    bool mbarrier_wait(Thread& thread, const void* barrier, uint32_t parity, const char* pc);
    Mbarrier& find_mbarrier(Thread& thread, size_t offset, const char* pc);
    void complete_phase(Mbarrier& barrier);

    // Bulk tensor copies (bulk.cpp).
    void tensor_load(Thread& thread, const void* destination, const void* map, const void* barrier, const int* at,
                     unsigned dimensions, unsigned blocks, const char* pc);
    void store_async(Thread& thread, const void* destination, const void* barrier, unsigned rank, const void* values,
                     unsigned bytes, const char* pc);
    void tensor_store(Thread& thread, const void* map, const void* source, const int* at, unsigned dimensions,
                      const char* pc);
    void tensor_store_wait(Thread& thread, unsigned pending, bool read);
    void land_load(const BulkLoad& load);

    // Products of warpgroups (warpgroup.cpp).
    void collective(Thread& thread, const char* operation, uint64_t value, void (Block::*action)(Thread&),
                    const char* pc);
    void issue_product(Thread& thread);
    void commit_products(Thread& thread);
    void wait_for_products(Thread& thread);
    void fence_registers(Thread& thread);
    void move_registers(Thread& thread);
    void check_registers(Thread& thread, Access access, uintptr_t address, size_t bytes, const char* pc);

    // Where byte `offset` of this block's shared memory is now.
    char* memory(size_t offset) {
        return resident_ ? reinterpret_cast<char*>(shared_) + offset : saved_.data() + offset;
    }
    size_t offset_of(const void* pointer) const { return reinterpret_cast<uintptr_t>(pointer) - shared_; }
    std::vector<Thread>& threads() { return threads_; }
    unsigned rank() const { return rank_; }
    unsigned live() const { return live_; }
    bool failed() const { return failed_; }
    void make_ready(std::vector<Thread*>& threads);
    std::string waiting_for(const Thread& thread) const;

    bool in_code(uintptr_t pc) const { return pc - code_begin_ < code_end_ - code_begin_; }
    bool holds(uintptr_t address) const { return address - shared_ < shadow.bytes(); }
    std::string name(size_t thread) const;             // "thread (3, 0, 0)"
    std::string agent_name(size_t agent) const;        // the same of any agent of the block
    std::string title() const;                         // "block (1, 0, 0)"
    std::string describe_shared(size_t offset) const;  // "byte 12 of shared `tile`"
    std::string describe(uintptr_t address, size_t bytes) const;  // the same of any memory
    const SimulatorLaunch& launch() const { return *launch_; }
    Index index() const { return index_; }

    Shadow shadow;
    // The last global ranges found, one for reads and one for writes.
    struct Span {
        uintptr_t begin = 0, bytes = 0;
        bool holds(uintptr_t address, size_t size) const {
            return address >= begin && address + size <= begin + bytes;
        }
    } readable, writable;

  private:
    struct Barrier {
        unsigned expected = 0;
        std::vector<Thread*> arrived, waiting;
    };

    void shuffle_threads();
    void resume(Thread& thread);
    void wait(Thread& thread);
    void check_nothing_in_flight(Thread& thread);
    size_t check_shared(Thread& thread, const void* pointer, size_t bytes, size_t alignment, const char* what,
                        const char* pc);
    const TensorMap& check_map(Thread& thread, const void* map, const int* at, unsigned dimensions, const char* pc);
    void record_aligned(Thread& thread, const char* operation, uint64_t a, uint64_t b, const char* pc);
    void check_warpgroups(Thread& thread);
    void grant_registers();
    template <class F> void each_operand(const IssuedProduct& product, unsigned warp, F visit);
    void check_operand(Thread& thread, const Descriptor& operand, const char* which, const char* pc);
    void lend_registers(Thread& thread, IssuedProduct& product, const char* pc);
    unsigned read_chunk(uint32_t at, Factor type, uint32_t (&values)[8]);
    std::vector<uint32_t> factors(const IssuedProduct& product, unsigned warp);
    std::vector<uint32_t> columns(const IssuedProduct& product);
    void execute(IssuedProduct& product, unsigned warp);
    void land_stores();
    void finish_thread(Thread& thread);
    void complete_barrier(Barrier& barrier);
    bool barrier_is_full(const Barrier& barrier) const;
    void check_warp_at_barrier(Thread& thread);
    void try_exchange(unsigned warp);
    void complete_exchange(unsigned warp, uint32_t mask, uint32_t present);
    [[noreturn]] void report_fault(Thread& thread);
    // A piece of memory that has a name, and how far from some access it lies; 0: all of the access is in there.
    struct Place {
        std::string name;
        uint64_t begin = 0, bytes = 0, distance = ~uint64_t(0);
    };
    Place nearest_variable(uintptr_t address, size_t bytes) const;
    static std::string describe_in(const Place& place, uintptr_t address);
    void drop_copies();
    static void thread_main();

    Cluster& cluster_;
    Clock& clock_;
    unsigned rank_ = 0;  // in the cluster
    const SimulatorLaunch* launch_ = nullptr;
    uintptr_t shared_ = 0;  // address of the module's thread-local storage on this OS thread
    uintptr_t module_begin_ = 0, module_end_ = 0, code_begin_ = 0, code_end_ = 0;
    bool resident_ = true;
    std::vector<char> saved_;  // shared memory, while others are resident
    Index index_{};
    std::vector<Thread> threads_;
    std::vector<Thread*> order_;  // by rank
    std::deque<Thread*> ready_;
    std::vector<Thread*> gave_way_;
    std::array<Barrier, 16> barriers_;
    std::vector<uint32_t> live_lanes_;      // by warp: not finished
    std::vector<uint32_t> exchange_lanes_;  // by warp: waiting in an exchange
    std::map<size_t, Mbarrier> mbarriers_;  // by offset
    struct Arrival {
        const Thread* thread;
        uint32_t stamp;
        const char* pc;
    };
    std::map<uint32_t, Arrival> foreign_;  // latest at these mbarriers of each thread of another block
    std::vector<Warp> warps_;
    std::vector<std::vector<Aligned>> warpgroups_;  // what each has executed together
    uint64_t free_registers_ = 0;
    std::deque<unsigned> register_waiters_;  // warps
    unsigned live_ = 0;
    bool failed_ = false;
    SimulatorFailure* failure_ = nullptr;
    Context scheduler_;
    StackPool stacks_;
};

inline void Thread::fail(int kind, const char* pc, const std::string& message) {
    block->fail(*this, kind, pc, message);
}

}  // namespace fusewright_simulator
