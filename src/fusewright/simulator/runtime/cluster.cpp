#include "cluster.hpp"

#include <algorithm>
#include <map>
#include <tuple>

namespace fusewright_simulator {

void Cluster::begin_launch(const SimulatorLaunch& launch) {
    launch_ = &launch;
    const size_t size = size_t(launch.cluster[0]) * launch.cluster[1] * launch.cluster[2];
    while (blocks_.size() < size) blocks_.push_back(std::make_unique<Block>(*this));
    blocks_.resize(size);
    for (auto& block : blocks_) block->begin_launch(launch);
}

bool Cluster::run(uint64_t index, SimulatorFailure& failure) {
    index_ = index;
    failed_ = false;
    arrived_.clear();
    loads.clear();
    progress = idle_turns_ = 0;
    news = false;
    const size_t threads = size_t(launch_->block[0]) * launch_->block[1] * launch_->block[2];
    clock.begin(size(), threads + (threads + 31) / 32 + kMostMbarriers);
    Index first{}, inside{};
    for (unsigned axis = 0; axis < 3; ++axis) {
        const unsigned clusters = launch_->grid[axis] / launch_->cluster[axis];
        first[axis] = static_cast<unsigned>(index % clusters) * launch_->cluster[axis];
        index /= clusters;
    }
    for (unsigned rank = 0; rank < size(); ++rank) {
        unsigned rest = rank;
        for (unsigned axis = 0; axis < 3; ++axis) {
            inside[axis] = first[axis] + rest % launch_->cluster[axis];
            rest /= launch_->cluster[axis];
        }
        blocks_[rank]->begin_block(inside, rank, failure);
    }
    resident_ = blocks_[0].get();
    while (!failed_ && (run_blocks() || next_turns(false) || land_loads() || time_out() || next_turns(true))) {
    }
    if (!failed_ && live() > 0) {
        failed_ = true;
        report_deadlock();
    }
    enter(*blocks_[0]);
    for (const BulkLoad& load : loads)  // after a failure: as if never written
        load.target->shadow.land_copy(0, load.barrier->slot, load.destination, load.bytes, nullptr);
    for (auto& block : blocks_) block->end_block();
    return !failed_;
}

unsigned Cluster::live() const {
    unsigned live = 0;
    for (const auto& block : blocks_) live += block->live();
    return live;
}

void Cluster::enter(Block& block) {
    if (resident_ == &block) return;
    resident_->leave();
    block.enter();
    resident_ = &block;
}

// Runs each block as far as it comes. Returns whether any could run.
bool Cluster::run_blocks() {
    bool ran = false;
    for (size_t i = 0; i < size() && !failed_; ++i) {
        Block& block = *blocks_[launch_->seed % 2 ? size() - 1 - i : i];
        if (!block.ready()) continue;
        enter(block);
        block.run_ready();
        failed_ = block.failed();
        ran = true;
    }
    return ran;
}

// Nobody can go on: copies arrive for which somebody waits, one after another until that helps.
bool Cluster::land_loads() {
    bool landed = false;
    for (size_t i = 0; i < loads.size() && !failed_;) {
        const size_t at = launch_->seed % 2 ? loads.size() - 1 - i : i;
        if (loads[at].barrier->waiting.empty()) {
            ++i;
            continue;
        }
        const BulkLoad load = loads[at];
        loads.erase(loads.begin() + static_cast<ptrdiff_t>(at));
        load.target->land_load(load);
        failed_ = load.target->failed();
        landed = true;
        ++progress;
        if (load.barrier->waiting.empty()) break;
    }
    return landed;
}

// Lets waits for an mbarrier return without success, once for each state of the cluster.
bool Cluster::time_out() {
    bool any = false;
    for (auto& block : blocks_) {
        std::vector<Thread*> woken;
        for (Thread& thread : block->threads()) {
            if (thread.state != Thread::kAtMbarrier || thread.polled == progress) continue;
            auto& waiting = thread.mbarrier->waiting;
            waiting.erase(std::find(waiting.begin(), waiting.end(), &thread));
            thread.polled = progress;
            thread.timed_out = true;
            woken.push_back(&thread);
        }
        any |= !woken.empty();
        block->make_ready(woken);
    }
    return any;
}

// Those who gave way go on. waiting: even if they seem to wait, until they have for so long that they always will.
bool Cluster::next_turns(bool waiting) {
    size_t turns = 0;
    for (auto& block : blocks_) turns += block->gave_way();
    if (!turns || (!news && !waiting)) return false;
    constexpr uint64_t kPatience = 1 << 13, kOfEach = 64;
    idle_turns_ = news ? 0 : idle_turns_ + turns;
    news = false;
    if (idle_turns_ >= std::max(kPatience, kOfEach * live())) return false;
    for (auto& block : blocks_) block->next_turns();
    return true;
}

void Cluster::synchronise(Thread& thread) {
    arrived_.push_back(&thread);
    ++progress;
    check_barrier();
}

void Cluster::check_barrier() {
    if (arrived_.empty() || arrived_.size() < live()) return;
    std::vector<Thread*> threads;
    std::swap(threads, arrived_);
    clock.synchronise(threads, threads, Clock::Extent::kCluster);
    for (auto& block : blocks_) {
        std::vector<Thread*> own;
        for (Thread* thread : threads)
            if (thread->block == block.get()) own.push_back(thread);
        block->make_ready(own);
    }
}

void Cluster::report_deadlock() {
    // One line for all who wait for the same thing at the same place.
    std::map<std::tuple<unsigned, int, uint64_t, uint32_t, const char*>, std::pair<const Thread*, unsigned>> groups;
    const Thread* first = nullptr;
    bool looping = false;
    for (auto& block : blocks_)
        for (const Thread& thread : block->threads()) {
            if (thread.state == Thread::kFinished) continue;
            // Best one who waits in a loop: others may only wait for that.
            if (!first || (thread.state == Thread::kGaveWay && first->state != Thread::kGaveWay)) first = &thread;
            looping |= thread.state == Thread::kGaveWay;
            uint64_t what = thread.index / 32;
            if (thread.state == Thread::kAtBarrier) what = thread.barrier;
            if (thread.state == Thread::kAtMbarrier) what = thread.mbarrier->offset;
            if (thread.state == Thread::kGaveWay) what = thread.address;
            auto& group = groups[{block->rank(), thread.state, what,
                                  thread.state == Thread::kInExchange ? thread.mask : 0, thread.pc}];
            if (!group.first) group.first = &thread;
            ++group.second;
        }
    std::string message = "and the others that are left can never go on:";
    for (const auto& entry : groups) {
        const auto& [thread, count] = entry.second;
        message += "\n  " + (size() > 1 ? thread->block->title() + ": " : std::string()) +
                   thread->block->waiting_for(*thread);
        if (count > 1) message += ", and so do " + std::to_string(count - 1) + " more";
    }
    const uint64_t blocks = uint64_t(launch_->grid[0]) * launch_->grid[1] * launch_->grid[2];
    if (looping && blocks > size()) message += "\n  Blocks run one after another: none can wait for a later one.";
    first->block->set_failure(*first, Failure::kDeadlock, first->pc, message);
}

}  // namespace fusewright_simulator
