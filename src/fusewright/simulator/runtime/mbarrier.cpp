// mbarriers: phases that complete when so many threads have arrived and so many bytes of bulk copies.
#include "cluster.hpp"

namespace fusewright_simulator {

void Block::mbarrier_init(Thread& thread, const void* barrier, uint32_t arrivals, const char* pc) {
    const size_t offset = check_shared(thread, barrier, 8, 8, "initialises an mbarrier", pc);
    if (mbarriers_.count(offset))
        fail(thread, Failure::kUndefined, pc,
             "initialises an mbarrier at " + describe_shared(offset) + ", where there is one already");
    if (arrivals < 1 || arrivals > Mbarrier::kMostArrivals || mbarriers_.size() == kMostMbarriers)
        fail(thread, Failure::kUndefined, pc, "initialises an mbarrier with " + std::to_string(arrivals) + " arrivals");
    shadow.touch(thread, Access::kWrite, offset, 8, pc);
    shadow.allow(offset, 8, Shadow::kBarrier);
    Mbarrier& made = mbarriers_[offset];
    made = {};
    made.offset = offset;
    made.expected = made.pending = arrivals;
    made.initialiser = thread;
    made.initialised = pc;
    made.slot = static_cast<uint16_t>(threads_.size() + warps_.size() + mbarriers_.size() - 1);
    made.copies = {static_cast<uint32_t>(rank_ * clock_.stride() + made.slot), static_cast<uint16_t>(rank_),
                   clock_.now()};
}

// fence.mbarrier_init publishes what this thread initialised; a proxy fence (`all`), what it knows of.
void Block::publish_mbarriers(Thread& thread, bool all) {
    for (auto& [offset, barrier] : mbarriers_)
        barrier.published |= barrier.initialiser.id == thread.id ||
                             (all && clock_.ordered(thread, rank_, barrier.initialiser.id, barrier.initialiser.clock));
}

void Block::fence_proxy(Thread& thread) {
    publish_mbarriers(thread, true);
    clock_.fence(thread);
}

Mbarrier& Block::find_mbarrier(Thread& thread, size_t offset, const char* pc) {
    const auto found = mbarriers_.find(offset);
    if (found == mbarriers_.end())
        thread.fail(Failure::kUndefined, pc,
             "takes " + describe_shared(offset) + " for an mbarrier, but none has been initialised there");
    Mbarrier& barrier = found->second;
    if (!clock_.ordered(thread, rank_, barrier.initialiser.id, barrier.initialiser.clock))
        thread.fail(Failure::kRace, pc,
             "uses the mbarrier at " + describe_shared(offset) + ", which was initialised at " +
                 source(barrier.initialised) + ", and no barrier orders the two");
    return barrier;
}

void Block::mbarrier_arrive(Thread& thread, const void* pointer, uint32_t bytes, unsigned rank, const char* pc) {
    const size_t offset = check_shared(thread, pointer, 8, 8, "arrives at an mbarrier", pc);
    if (rank != kOwnBlock && rank >= cluster_.size())
        fail(thread, Failure::kUndefined, pc,
             "arrives at an mbarrier of block " + std::to_string(rank) + " of its cluster, which has " +
                 std::to_string(cluster_.size()));
    Block& target = rank == kOwnBlock ? *this : cluster_.block(rank);
    if (target.live_ == 0)
        fail(thread, Failure::kUndefined, pc,
             "arrives at an mbarrier of " + target.title() + ", whose threads have all left the kernel");
    Mbarrier& barrier = target.find_mbarrier(thread, offset, pc);
    barrier.bytes += bytes;
    if (barrier.bytes > Mbarrier::kMostBytes)
        fail(thread, Failure::kPhase, pc,
             "makes the mbarrier at " + describe_shared(offset) + " expect " + std::to_string(barrier.bytes) +
                 " bytes; it counts to " + std::to_string(Mbarrier::kMostBytes));
    if (barrier.pending == 0)
        fail(thread, Failure::kPhase, pc,
             "arrives at the mbarrier at " + describe_shared(offset) + ", where all " +
                 std::to_string(barrier.expected) + " arrivals of this phase have been and " +
                 std::to_string(barrier.bytes - bytes) + " bytes are still to come");
    if (&target != this) target.foreign_[thread.id] = {&thread, thread.clock, pc};
    clock_.release(thread, barrier.arriving);
    --barrier.pending;
    ++cluster_.progress;
    if (barrier.pending == 0 && barrier.bytes < 0)
        fail(thread, Failure::kPhase, pc,
             "completes the arrivals at the mbarrier at " + describe_shared(offset) + ", where " +
                 std::to_string(-barrier.bytes) + " bytes more arrived than were expected");
    target.complete_phase(barrier);
}

void Block::complete_phase(Mbarrier& barrier) {
    if (barrier.pending > 0 || barrier.bytes != 0) return;
    ++barrier.phase;
    barrier.pending = barrier.expected;
    barrier.completed.join(barrier.arriving);
    barrier.arriving.clear();
    std::vector<Thread*> waiting;
    std::swap(waiting, barrier.waiting);
    make_ready(waiting);
}

bool Block::mbarrier_wait(Thread& thread, const void* pointer, uint32_t parity, const char* pc) {
    const size_t offset = check_shared(thread, pointer, 8, 8, "waits at an mbarrier", pc);
    if (parity > 1)
        fail(thread, Failure::kUndefined, pc,
             "waits for parity " + std::to_string(parity) + ", which is neither 0 nor 1");
    Mbarrier& barrier = find_mbarrier(thread, offset, pc);
    while ((barrier.phase & 1) == parity) {
        thread.state = Thread::kAtMbarrier;
        thread.mbarrier = &barrier;
        thread.parity = parity;
        thread.pc = pc;
        barrier.waiting.push_back(&thread);
        wait(thread);
        if (!thread.timed_out) continue;
        thread.timed_out = false;
        return false;
    }
    clock_.acquire(thread, barrier.completed);
    return true;
}

#define CALLER static_cast<const char*>(__builtin_return_address(0))

void mbarrier_init(void* barrier, uint32_t arrivals) {
    Thread& thread = *current_thread();
    thread.block->mbarrier_init(thread, barrier, arrivals, CALLER);
}

void mbarrier_fence_init() {
    Thread& thread = *current_thread();
    thread.block->publish_mbarriers(thread, false);
}

void mbarrier_arrive(void* barrier, uint32_t bytes, unsigned rank) {
    Thread& thread = *current_thread();
    thread.block->mbarrier_arrive(thread, barrier, bytes, rank, CALLER);
}

bool mbarrier_wait(void* barrier, uint32_t parity) {
    Thread& thread = *current_thread();
    return thread.block->mbarrier_wait(thread, barrier, parity, CALLER);
}

void fence_proxy_async() {
    Thread& thread = *current_thread();
    thread.block->fence_proxy(thread);
}

}  // namespace fusewright_simulator
