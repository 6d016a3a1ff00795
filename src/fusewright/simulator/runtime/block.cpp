#include "cluster.hpp"

#include <dlfcn.h>
#include <link.h>

#include <algorithm>
#include <cstring>
#include <numeric>

namespace fusewright_simulator {

namespace {

struct Module {
    uintptr_t address, begin, end, code_begin, code_end;
};

int find_module(dl_phdr_info* info, size_t, void* data) {
    auto& module = *static_cast<Module*>(data);
    for (int i = 0; i < info->dlpi_phnum; ++i) {
        const auto& header = info->dlpi_phdr[i];
        const uintptr_t begin = info->dlpi_addr + header.p_vaddr;
        if (header.p_type != PT_LOAD) continue;
        if (module.address - begin >= header.p_memsz) continue;
        module.begin = module.end = module.code_begin = begin;
        module.code_end = begin + header.p_memsz;
    }
    if (!module.begin) return 0;
    for (int i = 0; i < info->dlpi_phnum; ++i) {
        const auto& header = info->dlpi_phdr[i];
        if (header.p_type != PT_LOAD) continue;
        module.begin = std::min<uintptr_t>(module.begin, info->dlpi_addr + header.p_vaddr);
        module.end = std::max<uintptr_t>(module.end, info->dlpi_addr + header.p_vaddr + header.p_memsz);
    }
    return 1;
}

Index unflatten(uint64_t i, const uint32_t (&extent)[3]) {
    return {static_cast<unsigned>(i % extent[0]), static_cast<unsigned>(i / extent[0] % extent[1]),
            static_cast<unsigned>(i / extent[0] / extent[1])};
}

uint64_t flatten(Index at, const uint32_t (&extent)[3]) {
    return (uint64_t(at[2]) * extent[1] + at[1]) * extent[0] + at[0];
}

// Bytes by which an access lies outside a piece of memory.
uint64_t gap(uint64_t address, uint64_t bytes, uint64_t begin, uint64_t size) {
    if (address < begin) return begin - address;
    const uint64_t end = address + bytes;
    return end > begin + size ? end - (begin + size) : 0;
}

std::string position(Index at) {
    return "(" + std::to_string(at[0]) + ", " + std::to_string(at[1]) + ", " + std::to_string(at[2]) + ")";
}

}  // namespace

const char* const kLocalOverrun = "has written outside a local array, over what lies beside it";

std::string source(const char* pc) {
    Dl_info info;
    if (!pc || !dladdr(pc, &info)) return "an unknown place";
    char text[32];
    // One byte back: a return address may already belong to the next line.
    std::snprintf(text, sizeof text, "{pc:%zx}", static_cast<size_t>(pc - 1 - static_cast<char*>(info.dli_fbase)));
    return text;
}

Block::Block(Cluster& cluster) : shadow(*this, cluster.clock), cluster_(cluster), clock_(cluster.clock) {}

void Block::begin_launch(const SimulatorLaunch& launch) {
    launch_ = &launch;
    shared_ = reinterpret_cast<uintptr_t>(launch.anchor()) - launch.anchor_offset;
    Module module{reinterpret_cast<uintptr_t>(launch.entry), 0, 0, 0, 0};
    dl_iterate_phdr(find_module, &module);
    module_begin_ = module.begin;
    module_end_ = module.end;
    code_begin_ = module.code_begin;
    code_end_ = module.code_end;
    readable = writable = {};

    const size_t count = size_t(launch.block[0]) * launch.block[1] * launch.block[2];
    size_t bytes = 0;
    for (uint64_t i = 0; i < launch.variable_count; ++i)
        bytes = std::max<size_t>(bytes, launch.variables[i].offset + launch.variables[i].bytes);
    shadow.resize(bytes ? bytes + kGuardBytes : 0, count);
    for (uint64_t i = 0; i < launch.variable_count; ++i)
        shadow.allow(launch.variables[i].offset, launch.variables[i].bytes,
                     launch.variables[i].name ? Shadow::kChecked : Shadow::kIgnored);

    threads_.resize(count);
    order_.resize(count);
    live_lanes_.assign((count + 31) / 32, 0);
    exchange_lanes_.assign((count + 31) / 32, 0);
    warps_.resize((count + 31) / 32);
    warpgroups_.resize((count + 127) / 128);
    mbarriers_.clear();
    saved_.resize(cluster_.size() > 1 ? shadow.bytes() : 0);
    for (size_t i = 0; i < count; ++i) {
        threads_[i].block = this;
        threads_[i].index = static_cast<uint16_t>(i);
        threads_[i].position = unflatten(i, launch.block);
    }
}

void Block::begin_block(Index index, unsigned rank, SimulatorFailure& failure) {
    failure_ = &failure;
    index_ = index;
    rank_ = rank;
    resident_ = rank == 0;
    shadow.begin_block(rank);
    shuffle_threads();
    ready_.clear();
    gave_way_.clear();
    std::fill(live_lanes_.begin(), live_lanes_.end(), 0);
    std::fill(exchange_lanes_.begin(), exchange_lanes_.end(), 0);
    const auto base = static_cast<uint32_t>(rank * clock_.stride());
    for (Thread& thread : threads_) {
        static_cast<Agent&>(thread) = {base + thread.index, static_cast<uint16_t>(rank), clock_.now()};
        thread.state = Thread::kReady;
        thread.stack = nullptr;
        thread.uncommitted = 0;
        thread.fuel = kTurn;
        thread.recent.clear();
        thread.fault.signal = 0;
        thread.alone = false;
        thread.action = nullptr;
        thread.polled = ~uint64_t(0);
        thread.timed_out = false;
        thread.registers.clear();
        thread.store_groups = 0;
        live_lanes_[thread.index / 32] |= 1u << thread.lane();
    }
    for (size_t i = 0; i < warps_.size(); ++i) {
        const Agent agent{static_cast<uint32_t>(base + threads_.size() + i), static_cast<uint16_t>(rank), clock_.now()};
        warps_[i] = {agent, {}, {}, 0, 0, launch_->registers, 0};
    }
    for (auto& log : warpgroups_) log.clear();
    register_waiters_.clear();
    foreign_.clear();
    free_registers_ = 0;
    for (Thread* thread : order_) ready_.push_back(thread);
    for (Barrier& barrier : barriers_) barrier = {};
    live_ = static_cast<unsigned>(threads_.size());
    failed_ = false;
}

void Block::shuffle_threads() {
    const uint64_t index = flatten(index_, launch_->grid);
    for (size_t i = 0; i < order_.size(); ++i) order_[i] = &threads_[i];
    if (launch_->seed == 1) std::reverse(order_.begin(), order_.end());
    if (launch_->seed > 1) {
        std::mt19937_64 random(launch_->seed * 0x9e3779b97f4a7c15u + index);
        for (size_t i = order_.size(); i > 1; --i) std::swap(order_[i - 1], order_[random() % i]);
    }
    for (size_t i = 0; i < order_.size(); ++i) order_[i]->turn = static_cast<uint32_t>(i);
}

void Block::run_ready() {
    while (!ready_.empty() && !failed_) {
        Thread& thread = *ready_.front();
        if (interrupted()) return set_failure(thread, Failure::kInterrupted, nullptr, "");
        ready_.pop_front();
        resume(thread);
        if (thread.state == Thread::kFinished && thread.stack) {
            stacks_.give(thread.stack);
            thread.stack = nullptr;
        }
    }
}

void Block::end_block() {
    for (Thread& thread : threads_)
        if (thread.stack) stacks_.give(thread.stack);
    drop_copies();
    land_stores();
    shadow.forget_reads();
    for (const auto& [offset, barrier] : mbarriers_) shadow.allow(offset, 8, Shadow::kChecked);
    mbarriers_.clear();
    resident_ = true;
}

void Block::enter() {
    for (uint64_t i = 0; i < launch_->variable_count; ++i) {
        const SimulatorVariable& v = launch_->variables[i];
        std::memcpy(reinterpret_cast<char*>(shared_) + v.offset, &saved_[v.offset], v.bytes);
    }
    resident_ = true;
}

void Block::leave() {
    for (uint64_t i = 0; i < launch_->variable_count; ++i) {
        const SimulatorVariable& v = launch_->variables[i];
        std::memcpy(&saved_[v.offset], reinterpret_cast<char*>(shared_) + v.offset, v.bytes);
    }
    resident_ = false;
}

void Block::resume(Thread& thread) {
    if (!thread.stack) {
        thread.stack = stacks_.take();
        thread.stack->thread = &thread;
        prepare_context(thread.context, thread.stack, &Block::thread_main);
    }
    running = &thread;
    switch_context(scheduler_, thread.context);
    running = nullptr;
}

void Block::thread_main() {
    Thread& thread = *current_thread();
    thread.block->launch_->entry(thread.block->launch_->arguments);
    thread.block->finish_thread(thread);
    switch_context(thread.context, thread.block->scheduler_);
    __builtin_unreachable();
}

void Block::wait(Thread& thread) { switch_context(thread.context, scheduler_); }

void Block::make_ready(std::vector<Thread*>& threads) {
    std::sort(threads.begin(), threads.end(), [](Thread* a, Thread* b) { return a->turn < b->turn; });
    for (Thread* thread : threads) {
        thread->state = Thread::kReady;
        ready_.push_back(thread);
    }
}

void Block::set_failure(const Thread& thread, int kind, const char* pc, const std::string& message) {
    SimulatorFailure& failure = *failure_;
    failure.kind = kind;
    std::copy_n(index_.begin(), 3, failure.block);
    std::copy_n(thread.position.begin(), 3, failure.thread);
    Dl_info info;
    failure.pc = pc && dladdr(pc, &info) ? static_cast<uint64_t>(pc - 1 - static_cast<char*>(info.dli_fbase)) : 0;
    std::snprintf(failure.message, sizeof failure.message, "%s", message.c_str());
    failed_ = true;
}

// Called by the thread that runs, whichever is at fault.
void Block::fail(Thread& thread, int kind, const char* pc, const std::string& message) {
    set_failure(thread, kind, pc, message);
    Thread& running = *current_thread();
    running.block->failed_ = true;
    switch_context(running.context, running.block->scheduler_);
    __builtin_trap();  // the scheduler never resumes a thread of a failed block
}

void Block::report_fault() {
    Thread& thread = *current_thread();
    thread.block->report_fault(thread);
}

void Block::report_fault(Thread& thread) {
    const Fault& fault = thread.fault;
    if (fault.signal == SIGINT) fail(thread, Failure::kInterrupted, fault.pc, "");
    if (fault.signal == SIGFPE)
        fail(thread, Failure::kUndefined, fault.pc, "divides an integer by zero, or the least one by -1");
    if (fault.signal == SIGILL)
        fail(thread, Failure::kUndefined, fault.pc, "runs into a trap, which compilers put where only undefined behaviour leads");
    if (lowest(thread.stack) - fault.address - 1 < kStackGuardBytes)
        fail(thread, Failure::kStackOverflow, fault.pc,
             "needs more than " + std::to_string((kStackBytes - kStackGuardBytes) / 1024) +
                 " KiB of local memory: recursion without end, or arrays as large");
    if (fault.smashed) fail(thread, Failure::kOutOfBounds, fault.pc, kLocalOverrun);
    if (fault.call)
        fail(thread, Failure::kUndefined, fault.pc,
             std::string("calls a function through a ") + (fault.address ? "wild" : "null") + " pointer");
    fail(thread, Failure::kOutOfBounds, fault.pc, "uses an address where there is no memory");
}

std::string Block::name(size_t thread) const { return "thread " + position(threads_[thread].position); }

std::string Block::agent_name(size_t agent) const {
    if (agent < threads_.size()) return name(agent);
    agent -= threads_.size();
    if (agent < warps_.size()) return "an asynchronous operation of warp " + std::to_string(agent);
    for (const auto& [offset, barrier] : mbarriers_)
        if (barrier.slot == agent + threads_.size())
            return "a bulk copy counted at the mbarrier at " + describe_shared(offset);
    return "a bulk copy";
}

std::string Block::title() const { return "block " + position(index_); }

Block::Place Block::nearest_variable(uintptr_t address, size_t bytes) const {
    Place nearest;
    for (uint64_t i = 0; i < launch_->variable_count; ++i) {
        const SimulatorVariable& v = launch_->variables[i];
        const uint64_t distance = gap(address, bytes, shared_ + v.offset, v.bytes);
        if (v.name && distance < nearest.distance)
            nearest = {std::string("shared `") + v.name + "`", shared_ + v.offset, v.bytes, distance};
    }
    return nearest;
}

std::string Block::describe_shared(size_t offset) const {
    const Place nearest = nearest_variable(shared_ + offset, 1);
    return nearest.name.empty() ? "shared memory, of which it has none" : describe_in(nearest, shared_ + offset);
}

std::string Block::describe(uintptr_t address, size_t bytes) const {
    Place nearest = nearest_variable(address, bytes);
    for (uint64_t i = 0; i < launch_->range_count; ++i) {
        const SimulatorRange& range = launch_->ranges[i];
        const uint64_t distance = gap(address, bytes, range.begin, range.bytes);
        if (distance < nearest.distance)
            nearest = {std::string("`") + range.name + "`", range.begin, range.bytes, distance};
    }
    constexpr uint64_t kFar = 1 << 28;
    return nearest.distance < kFar ? describe_in(nearest, address)
                                   : "an address that is in none of the launch's buffers";
}

std::string Block::describe_in(const Place& place, uintptr_t address) {
    const std::string text =
        "byte " + std::to_string(static_cast<int64_t>(address - place.begin)) + " of " + place.name;
    return place.distance ? text + ", which has " + std::to_string(place.bytes) + " bytes" : text;
}

void Block::finish_thread(Thread& thread) {
    const unsigned warp = thread.index / 32;
    live_lanes_[warp] &= ~(1u << thread.lane());
    for (size_t i = warp * 32u; i < std::min<size_t>(threads_.size(), warp * 32u + 32); ++i)
        if (threads_[i].state == Thread::kAtBarrier)
            fail(thread, Failure::kDivergence, threads_[i].pc,
                 "has left the kernel, but " + name(threads_[i].index) + " of the same warp waits at barrier " +
                     std::to_string(threads_[i].barrier));
    if (live_ == 1) check_nothing_in_flight(thread);
    thread.state = Thread::kFinished;
    --live_;
    ++cluster_.progress;
    try_exchange(warp);
    for (Barrier& barrier : barriers_)
        if (barrier_is_full(barrier)) complete_barrier(barrier);
    cluster_.check_barrier();
}

// The last thread leaves: the block's shared memory goes to others.
void Block::check_nothing_in_flight(Thread& thread) {
    check_warpgroups(thread);
    for (const BulkLoad& load : cluster_.loads)
        if (load.target == this)
            fail(thread, Failure::kInFlight, load.pc,
                 "leaves the kernel, and a bulk copy to shared memory of its block has not been waited for");
    for (const auto& [id, arrival] : foreign_) {
        const auto knows = [&, rank = arrival.thread->rank, id = id, stamp = arrival.stamp](const Thread& own) {
            return clock_.ordered(own, rank, id, stamp);
        };
        if (std::none_of(threads_.begin(), threads_.end(), knows))
            fail(thread, Failure::kUndefined, arrival.pc,
                 "leaves the kernel as the last of its block, where " +
                     arrival.thread->block->name(arrival.thread->index) + " of " + arrival.thread->block->title() +
                     " arrives at an mbarrier, and nothing says that it has");
    }
    for (const Thread& other : threads_)
        for (const BulkStore& store : other.stores)
            if (!store.read)
                fail(thread, Failure::kOperand, store.pc,
                     "leaves the kernel, and a bulk store that reads its block's shared memory has not been waited for");
    for (const Warp& warp : warps_)
        if (!warp.products.empty())
            fail(thread, Failure::kOperand, warp.products.front().pc,
                 "leaves the kernel, and a product of its block has not been waited for");
}

void Block::cluster_sync(Thread& thread, const char* pc) {
    thread.state = Thread::kAtCluster;
    thread.pc = pc;
    cluster_.synchronise(thread);
    wait(thread);
}

}  // namespace fusewright_simulator
