// Every access of instrumented kernel code arrives here: the functions that -fsanitize=thread calls.
#include <algorithm>
#include <cstring>

#include "cluster.hpp"

namespace fusewright_simulator {

namespace {

const char* verb(Access access) {
    return access == Access::kRead ? "reads " : access == Access::kWrite ? "writes " : "updates ";
}

}  // namespace

void Block::access(Thread& thread, Access access, uintptr_t address, size_t bytes, const char* pc) {
    if (holds(address)) {
        const size_t offset = address - shared_;
        if (!shadow.legal(offset, bytes))
            fail(thread, Failure::kOutOfBounds, pc,
                 verb(access) + std::to_string(bytes) + " bytes at " + describe_shared(offset));
        const auto legality = shadow.legality(offset);
        if (legality == Shadow::kIgnored) return;
        if (legality == Shadow::kBarrier)
            fail(thread, Failure::kUndefined, pc,
                 std::string(verb(access)) + describe_shared(offset) + ", where an mbarrier lies");
        return shadow.touch(thread, access, offset, bytes, pc);
    }
    const auto top = reinterpret_cast<uintptr_t>(thread.stack);
    if (top - address < kStackBytes) {  // the thread's own local memory
        if (thread.registers.watched(address, bytes)) check_registers(thread, access, address, bytes, pc);
        return;
    }
    bool read_only = false;
    const SimulatorRange* late = nullptr;
    for (uint64_t i = 0; i < launch_->range_count; ++i) {
        const SimulatorRange& range = launch_->ranges[i];
        const Span span{range.begin, range.bytes};
        if (!span.holds(address, bytes)) continue;
        if (!range.early && !thread.alone) {
            late = &range;
            continue;
        }
        // A span that is kept is not looked at again, whichever thread comes.
        if (access == Access::kRead) {
            if (range.early) readable = span;
            return;
        }
        if (range.writable) {
            if (range.early) writable = span;
            return;
        }
        read_only = true;
    }
    if (late)
        fail(thread, Failure::kFence, pc,
             std::string(verb(access)) + "`" + late->name + "`, which its launch does not name as read ahead, before " +
                 "launch_before_wait");
    if (access == Access::kRead && address >= module_begin_ && address + bytes <= module_end_) return;  // constants
    if (read_only)
        fail(thread, Failure::kReadOnly, pc,
             std::string(verb(access)) + std::to_string(bytes) + " bytes of a buffer that the launch says it only reads");
    fail(thread, Failure::kOutOfBounds, pc,
         verb(access) + std::to_string(bytes) + " bytes at " + describe(address, bytes));
}

void Block::give_way(Thread& thread, uintptr_t address, size_t bytes, const char* pc) {
    thread.fuel += kTurn;
    uint64_t value = 0;
    std::memcpy(&value, reinterpret_cast<const void*>(address), std::min(bytes, sizeof value));
    // Whoever has read the same from the same few places for many turns is waiting.
    const uint64_t seen = address * 0x9e3779b97f4a7c15u ^ value * 0xc2b2ae3d27d4eb4fu;
    constexpr size_t kFew = 16;
    auto& recent = thread.recent;
    if (std::find(recent.begin(), recent.end(), seen) == recent.end()) {
        if (recent.size() == kFew) recent.erase(recent.begin());
        recent.push_back(seen);
        cluster_.news = true;
    }
    thread.address = address;
    thread.pc = pc;
    thread.state = Thread::kGaveWay;
    gave_way_.push_back(&thread);
    wait(thread);
}

void Block::next_turns() {
    make_ready(gave_way_);
    gave_way_.clear();
}

// ---- Asynchronous copies ----------------------------------------------------------------------------------------

void Block::async_copy(Thread& thread, char* destination, const char* source, unsigned bytes, unsigned source_bytes,
                       const char* pc) {
    const auto to = reinterpret_cast<uintptr_t>(destination);
    const auto from = reinterpret_cast<uintptr_t>(source);
    if ((bytes != 4 && bytes != 8 && bytes != 16) || source_bytes > bytes)
        fail(thread, Failure::kUndefined, pc, "asks for an asynchronous copy of a size that cp.async does not have");
    if (to % bytes || (source_bytes && from % bytes))
        fail(thread, Failure::kMisaligned, pc,
             "copies " + std::to_string(bytes) + " bytes asynchronously between addresses that are no multiple of it");
    if (!holds(to) || !shadow.legal(to - shared_, bytes))
        fail(thread, Failure::kOutOfBounds, pc,
             "copies " + std::to_string(bytes) + " bytes to " +
                 (holds(to) ? describe_shared(to - shared_) : "an address outside shared memory"));
    if (source_bytes) access(thread, Access::kRead, from, source_bytes, pc);
    shadow.launch_copy(thread, false, thread.index, to - shared_, bytes, pc);
    std::memset(destination, 0xff, bytes);
    thread.copies.push_back({destination, source, bytes, source_bytes, pc});
    ++thread.uncommitted;
}

void Block::async_wait(Thread& thread, unsigned pending, const char*) {
    size_t landed = 0;
    while (thread.group_sizes.size() > pending) {
        landed += thread.group_sizes.front();
        thread.group_sizes.pop_front();
    }
    for (size_t i = 0; i < landed; ++i) {
        const AsyncCopy& copy = thread.copies[i];
        std::memcpy(copy.destination, copy.source, copy.source_bytes);
        std::memset(copy.destination + copy.source_bytes, 0, copy.bytes - copy.source_bytes);
        shadow.land_copy(thread.clock, thread.index, offset_of(copy.destination), copy.bytes, copy.pc);
    }
    thread.copies.erase(thread.copies.begin(), thread.copies.begin() + static_cast<ptrdiff_t>(landed));
}

void Block::drop_copies() {
    for (Thread& thread : threads_) {
        thread.clock = 0;  // as if never written
        for (const AsyncCopy& copy : thread.copies)
            shadow.land_copy(thread.clock, thread.index, offset_of(copy.destination), copy.bytes, nullptr);
        thread.copies.clear();
        thread.group_sizes.clear();
    }
}

#define CALLER static_cast<const char*>(__builtin_return_address(0))

void async_copy(void* destination, const void* source, unsigned bytes, unsigned source_bytes) {
    Thread& thread = *current_thread();
    thread.block->async_copy(thread, static_cast<char*>(destination), static_cast<const char*>(source), bytes,
                             source_bytes, CALLER);
}

void async_commit() {
    Thread& thread = *current_thread();
    thread.group_sizes.push_back(thread.uncommitted);
    thread.uncommitted = 0;
}

void async_wait(unsigned pending) {
    Thread& thread = *current_thread();
    thread.block->async_wait(thread, pending, CALLER);
}

void launch_before_wait() { current_thread()->alone = true; }

void async_wait_all() {
    async_commit();
    Thread& thread = *current_thread();
    thread.block->async_wait(thread, 0, CALLER);
}

// ---- Ordinary accesses ------------------------------------------------------------------------------------------

namespace {

[[gnu::noinline]] void report_misaligned(Thread& thread, Access access, size_t bytes, const char* pc) {
    thread.fail(Failure::kMisaligned, pc,
                std::string(verb(access)) + std::to_string(bytes) + " bytes at an address that is no multiple of " +
                    std::to_string(bytes));
}

[[gnu::always_inline]] inline void check(Access access, const void* pointer, size_t bytes, bool aligned,
                                         const char* pc) {
    const auto address = reinterpret_cast<uintptr_t>(pointer);
    Thread& thread = *current_thread();
    Block& block = *thread.block;
    if (aligned && address % bytes) report_misaligned(thread, access, bytes, pc);
    const Block::Span& last = access == Access::kRead ? block.readable : block.writable;
    if (!last.holds(address, bytes)) block.access(thread, access, address, bytes, pc);
    if ((thread.fuel -= access == Access::kAtomic ? kAtomicCost : 1) <= 0) [[unlikely]]
        block.give_way(thread, address, bytes, pc);
}

}  // namespace

void check_atomic(const void* pointer, size_t bytes) { check(Access::kAtomic, pointer, bytes, true, CALLER); }

}  // namespace fusewright_simulator

using fusewright_simulator::Access;
using fusewright_simulator::check;

extern "C" {

void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}

#define ACCESSES(BYTES)                                                                                         \
    void __tsan_read##BYTES(void* p) { check(Access::kRead, p, BYTES, true, CALLER); }                          \
    void __tsan_write##BYTES(void* p) { check(Access::kWrite, p, BYTES, true, CALLER); }                        \
    void __tsan_unaligned_read##BYTES(void* p) { check(Access::kRead, p, BYTES, false, CALLER); }               \
    void __tsan_unaligned_write##BYTES(void* p) { check(Access::kWrite, p, BYTES, false, CALLER); }             \
    void __tsan_read_write##BYTES(void* p) {                                                                    \
        check(Access::kRead, p, BYTES, true, CALLER);                                                           \
        check(Access::kWrite, p, BYTES, true, CALLER);                                                          \
    }                                                                                                           \
    void __tsan_unaligned_read_write##BYTES(void* p) {                                                          \
        check(Access::kRead, p, BYTES, false, CALLER);                                                          \
        check(Access::kWrite, p, BYTES, false, CALLER);                                                         \
    }
ACCESSES(1)
ACCESSES(2)
ACCESSES(4)
ACCESSES(8)
ACCESSES(16)

// -fsanitize=alignment: a pointer or reference that is less aligned than its type.
struct MisalignedType {
    struct {
        const char* file;
        uint32_t line, column;
    } location;
    const struct {
        uint16_t kind, info;
        char name[1];
    }* type;
    uint8_t log_alignment, check;
};
[[noreturn]] void __ubsan_handle_type_mismatch_v1_abort(const MisalignedType* found, const void*) {
    fusewright_simulator::current_thread()->fail(
        fusewright_simulator::Failure::kMisaligned, CALLER,
        std::string("uses an address as one of ") + found->type->name + ", but it is no multiple of " +
            std::to_string(1u << found->log_alignment));
}

void __tsan_read_range(void* p, unsigned long bytes) { check(Access::kRead, p, bytes, false, CALLER); }
void __tsan_write_range(void* p, unsigned long bytes) { check(Access::kWrite, p, bytes, false, CALLER); }

}  // extern "C"
