// Barriers, warp collectives, and what to say when nobody can go on.
#include <algorithm>
#include <cstring>

#include "cluster.hpp"

namespace fusewright_simulator {

namespace {

bool same(Site a, Site b) { return a.line == b.line && std::strcmp(a.file, b.file) == 0; }

std::string hexadecimal(uint32_t value) {
    char text[16];
    std::snprintf(text, sizeof text, "0x%08x", value);
    return text;
}

}  // namespace

unsigned Block::barrier_sync(Thread& thread, unsigned id, unsigned threads, bool predicate, bool waits, Site site,
                             const char* pc) {
    const std::string what = "barrier " + std::to_string(id);
    if (id >= barriers_.size())
        fail(thread, Failure::kUndefined, pc, "uses " + what + ", but a block has barriers 0 to 15");
    if (threads % 32 != 0 || (threads == 0 && !waits))
        fail(thread, Failure::kUndefined, pc,
             "names " + std::to_string(threads) + " threads at " + what + ", which is not a whole number of warps");
    Barrier& barrier = barriers_[id];
    if (!barrier.arrived.empty() && barrier.expected != threads)
        fail(thread, Failure::kDivergence, pc,
             "expects " + std::to_string(threads) + " threads at " + what + ", where " +
                 name(barrier.arrived[0]->index) + " expects " + std::to_string(barrier.expected));
    thread.barrier = id;
    thread.site = site;
    thread.pc = pc;
    thread.predicate = predicate;
    if (thread.fuel > 0) thread.fuel -= kCollectiveCost;
    if (waits) check_warp_at_barrier(thread);
    barrier.expected = threads;
    barrier.arrived.push_back(&thread);
    if (waits) {
        thread.state = Thread::kAtBarrier;
        barrier.waiting.push_back(&thread);
    }
    if (barrier_is_full(barrier)) complete_barrier(barrier);
    if (waits) wait(thread);
    return thread.counted;
}

// The lanes of a warp must come to a barrier together: the hardware counts warps, not lanes.
void Block::check_warp_at_barrier(Thread& thread) {
    const size_t begin = thread.index / 32 * 32u;
    const size_t end = std::min<size_t>(threads_.size(), begin + 32);
    const std::string what = "arrives at barrier " + std::to_string(thread.barrier);
    for (size_t i = begin; i < end; ++i) {
        const Thread& other = threads_[i];
        if (other.state == Thread::kFinished)
            fail(thread, Failure::kDivergence, thread.pc,
                 what + ", but " + name(other.index) + " of the same warp has left the kernel");
        if (other.state == Thread::kInExchange && (other.mask >> thread.lane() & 1))
            fail(thread, Failure::kDivergence, thread.pc, what + ", but " + waiting_for(other));
        if (other.state == Thread::kAtBarrier && (other.barrier != thread.barrier || !same(other.site, thread.site)))
            fail(thread, Failure::kDivergence, thread.pc, what + ", but " + waiting_for(other));
    }
}

bool Block::barrier_is_full(const Barrier& barrier) const {
    if (barrier.arrived.empty()) return false;
    return barrier.arrived.size() >= (barrier.expected ? barrier.expected : live_);
}

void Block::complete_barrier(Barrier& barrier) {
    Barrier completed;
    std::swap(completed, barrier);
    const auto counted = static_cast<unsigned>(std::count_if(completed.arrived.begin(), completed.arrived.end(),
                                                             [](const Thread* thread) { return thread->predicate; }));
    for (Thread* thread : completed.waiting) thread->counted = counted;
    clock_.synchronise(completed.arrived, completed.waiting,
                       completed.waiting.size() == live_ ? Clock::Extent::kBlock : Clock::Extent::kSome);
    ++cluster_.progress;
    make_ready(completed.waiting);
}

const Exchange& Block::exchange(Thread& thread, const char* operation, uint32_t mask, uint64_t value, Site site,
                                const char* pc) {
    const unsigned warp = thread.index / 32;
    const std::string what = std::string("calls ") + operation + " with mask " + hexadecimal(mask);
    if (!(mask >> thread.lane() & 1)) fail(thread, Failure::kDivergence, pc, what + ", which leaves itself out");
    for (size_t i = warp * 32u; i < std::min<size_t>(threads_.size(), warp * 32u + 32); ++i) {
        const Thread& other = threads_[i];
        const bool named = mask >> other.lane() & 1;
        if (named && other.state == Thread::kAtBarrier)
            fail(thread, Failure::kDivergence, pc, what + ", but " + waiting_for(other));
        if (other.state == Thread::kInExchange && (named || (other.mask >> thread.lane() & 1)) &&
            (other.mask != mask || std::strcmp(other.operation, operation) != 0))
            fail(thread, Failure::kDivergence, pc, what + ", but " + waiting_for(other));
    }
    thread.operation = operation;
    thread.mask = mask;
    thread.value = value;
    thread.site = site;
    thread.pc = pc;
    thread.state = Thread::kInExchange;
    if (thread.fuel > 0) thread.fuel -= kCollectiveCost;
    exchange_lanes_[warp] |= 1u << thread.lane();
    const uint32_t present = mask & live_lanes_[warp];
    if ((present & ~exchange_lanes_[warp]) == 0) {
        if (thread.action) (this->*thread.action)(thread);
        complete_exchange(warp, mask, present);
    }
    wait(thread);
    thread.action = nullptr;
    return thread.received;
}

// A lane has left: those who waited for it go on without it.
void Block::try_exchange(unsigned warp) {
    for (unsigned lane = 0; lane < 32; ++lane) {
        if (!(exchange_lanes_[warp] >> lane & 1)) continue;
        const uint32_t mask = threads_[warp * 32 + lane].mask;
        const uint32_t present = mask & live_lanes_[warp];
        if ((present & ~exchange_lanes_[warp]) == 0) complete_exchange(warp, mask, present);
    }
}

void Block::complete_exchange(unsigned warp, uint32_t mask, uint32_t present) {
    std::vector<Thread*> group;
    Exchange all{};
    all.present = present;
    for (unsigned lane = 0; lane < 32; ++lane)
        if (present >> lane & 1) {
            group.push_back(&threads_[warp * 32 + lane]);
            all.values[lane] = group.back()->value;
        }
    for (Thread* thread : group) thread->received = all;
    // Of the warp's collectives only this one orders memory.
    if (std::strcmp(group[0]->operation, "__syncwarp") == 0) 
        clock_.synchronise(group, group, group.size() == live_ ? Clock::Extent::kBlock : Clock::Extent::kSome);
    ++cluster_.progress;
    exchange_lanes_[warp] &= ~mask;
    make_ready(group);
}

std::string Block::waiting_for(const Thread& thread) const {
    std::string text = name(thread.index) + " waits ";
    const std::string place = " (" + source(thread.pc) + ")";
    if (thread.state == Thread::kAtBarrier) {
        const Barrier& barrier = barriers_[thread.barrier];
        return text + "at barrier " + std::to_string(thread.barrier) + place + ", where " +
               std::to_string(barrier.arrived.size()) + " of " +
               std::to_string(barrier.expected ? barrier.expected : live_) + " threads have arrived";
    }
    if (thread.state == Thread::kAtMbarrier) {
        const Mbarrier& barrier = *thread.mbarrier;
        return text + "for the phase of parity " + std::to_string(thread.parity) + " of the mbarrier at " +
               describe_shared(barrier.offset) + place + ", which is in phase " + std::to_string(barrier.phase) +
               " with " + std::to_string(barrier.expected - barrier.pending) + " of " +
               std::to_string(barrier.expected) + " arrivals and " + std::to_string(barrier.bytes) +
               " bytes still to come";
    }
    if (thread.state == Thread::kGaveWay) {
        const bool local = reinterpret_cast<uintptr_t>(thread.stack) - thread.address < kStackBytes;
        return text + "in a loop for memory to change, " +
               (local ? "its own" : "at " + describe(thread.address, 1)) + place;
    }
    if (thread.state == Thread::kAtCluster)
        return text + "at the cluster's barrier" + place + ", where " + std::to_string(cluster_.arrived()) + " of " +
               std::to_string(cluster_.live()) + " threads have arrived";
    const unsigned warp = thread.index / 32;
    if (thread.state == Thread::kForRegisters)
        return text + "for " + std::to_string(warps_[warp].wanted) + " registers a thread" + place +
               "; its block has " + std::to_string(free_registers_) + " left";
    return text + "in " + thread.operation + place + " for lanes " +
           hexadecimal(thread.mask & live_lanes_[warp] & ~exchange_lanes_[warp]) + " of its warp";
}

// ---- What kernels call ------------------------------------------------------------------------------------------

#define CALLER static_cast<const char*>(__builtin_return_address(0))

unsigned thread_index(unsigned axis) { return current_thread()->position[axis]; }
unsigned block_index(unsigned axis) { return current_thread()->block->index()[axis]; }
unsigned block_extent(unsigned axis) { return current_thread()->block->launch().block[axis]; }
unsigned grid_extent(unsigned axis) { return current_thread()->block->launch().grid[axis]; }
unsigned lane_index() { return current_thread()->lane(); }

unsigned barrier_sync(unsigned id, unsigned threads, bool predicate, Site site) {
    Thread& thread = *current_thread();
    return thread.block->barrier_sync(thread, id, threads, predicate, true, site, CALLER);
}

void barrier_arrive(unsigned id, unsigned threads, Site site) {
    Thread& thread = *current_thread();
    thread.block->barrier_sync(thread, id, threads, false, false, site, CALLER);
}

const Exchange& exchange(const char* operation, uint32_t mask, uint64_t value, Site site) {
    Thread& thread = *current_thread();
    return thread.block->exchange(thread, operation, mask, value, site, CALLER);
}

void fail_undefined(const char* text) { current_thread()->fail(Failure::kUndefined, CALLER, text); }
void fail_local_overrun(const void* place) {
    current_thread()->fail(Failure::kOutOfBounds, static_cast<const char*>(place), kLocalOverrun);
}
void fail_trap(const char* text) { current_thread()->fail(Failure::kTrap, CALLER, text); }

}  // namespace fusewright_simulator
