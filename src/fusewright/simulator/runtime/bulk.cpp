// Bulk tensor copies: PTX ISA, "Data Movement and Conversion Instructions: Tensor copy".
#include <cstring>

#include "cluster.hpp"

namespace fusewright_simulator {

namespace {

constexpr size_t kCopyAlignment = 128;  // of shared memory

void swap_lines(const TensorMap& map, char* box, size_t offset, unsigned line, char* values, bool to_shared) {
    const auto begin = static_cast<uint32_t>(offset + size_t(line) * map.line_bytes());
    for (unsigned i = 0; i < map.line_bytes(); i += 16) {
        char* shared = box + (swizzled(begin + i, map.swizzle) - offset);
        std::memcpy(to_shared ? shared : values + i, to_shared ? values + i : shared, 16);
    }
}

// To nearest, ties to even, and one NaN; not in the PTX ISA.
void round_to_tf32(std::vector<char>& floats) {
    for (size_t i = 0; i < floats.size(); i += 4) {
        uint32_t bits;
        std::memcpy(&bits, &floats[i], 4);
        if ((bits & 0x7fffffff) > 0x7f800000) bits = 0x7fffe000;
        else if ((bits & 0x7fffffff) < 0x7f800000) bits = (bits + 0xfff + (bits >> 13 & 1)) & ~0x1fffu;
        std::memcpy(&floats[i], &bits, 4);
    }
}

}  // namespace

// Returns the offset of `bytes` bytes of shared memory.
size_t Block::check_shared(Thread& thread, const void* pointer, size_t bytes, size_t alignment, const char* what,
                           const char* pc) {
    const auto address = reinterpret_cast<uintptr_t>(pointer);
    const size_t offset = offset_of(pointer);
    if (!holds(address) || !shadow.legal(offset, bytes))
        thread.fail(Failure::kOutOfBounds, pc,
                    std::string(what) + " of " + std::to_string(bytes) + " bytes at " +
                        (holds(address) ? describe_shared(offset) : "an address outside shared memory"));
    if (offset % alignment)
        thread.fail(Failure::kMisaligned, pc,
                    std::string(what) + " at " + describe_shared(offset) + ", shared address " +
                        std::to_string(offset) + ", which is no multiple of " + std::to_string(alignment));
    return offset;
}

const TensorMap& Block::check_map(Thread& thread, const void* pointer, const int* at, unsigned dimensions,
                                  const char* pc) {
    const auto* map = static_cast<const TensorMap*>(pointer);
    if (reinterpret_cast<uintptr_t>(map) % 64 || map->magic != TensorMap::kMagic)
        fail(thread, Failure::kUndefined, pc, "copies by what is no tensor map");
    if (map->dimensions != dimensions)
        fail(thread, Failure::kUndefined, pc,
             "copies a box of " + std::to_string(dimensions) + " dimensions of a tensor of " +
                 std::to_string(map->dimensions));
    if (at[0] * map->element_bytes % 16)
        fail(thread, Failure::kMisaligned, pc,
             "copies a box from element " + std::to_string(at[0]) + " of a line on, " +
                 std::to_string(at[0] * map->element_bytes) + " bytes, which is no multiple of 16");
    return *map;
}

void Block::tensor_load(Thread& thread, const void* destination, const void* pointer, const void* barrier,
                        const int* at, unsigned dimensions, unsigned blocks, const char* pc) {
    const TensorMap& map = check_map(thread, pointer, at, dimensions, pc);
    const size_t offset = check_shared(thread, destination, map.bytes(), kCopyAlignment, "copies a box", pc);
    const size_t counted = check_shared(thread, barrier, 8, 8, "counts a copy at an mbarrier", pc);
    if (blocks >> cluster_.size())
        fail(thread, Failure::kUndefined, pc,
             "multicasts to blocks that its cluster of " + std::to_string(cluster_.size()) + " does not have");
    map.each_line(at, [&](unsigned, uint64_t address, unsigned, unsigned bytes) {
        if (bytes) access(thread, Access::kRead, address, bytes, pc);
    });
    for (unsigned rank = 0; rank < cluster_.size(); ++rank) {
        if (blocks ? !(blocks >> rank & 1) : rank != rank_) continue;
        Block& target = cluster_.block(rank);
        if (target.live_ == 0)
            fail(thread, Failure::kUndefined, pc,
                 "copies to shared memory of " + target.title() + ", whose threads have all left the kernel");
        Mbarrier& mbarrier = target.find_mbarrier(thread, counted, pc);
        if (!mbarrier.published)
            fail(thread, Failure::kFence, pc,
                 "counts a copy at the mbarrier that was initialised at " + source(mbarrier.initialised) +
                     ", with neither fence.mbarrier_init nor fence.proxy.async between the two");
        target.shadow.launch_copy(thread, true, mbarrier.slot, offset, map.bytes(), pc);
        std::memset(target.memory(offset), 0xff, map.bytes());
        BulkLoad load{&target, &mbarrier, offset, map.bytes(), map, {}, {}, pc};
        std::copy_n(at, dimensions, load.at.begin());
        cluster_.loads.push_back(load);
    }
}

// PTX ISA, "st.async".
void Block::store_async(Thread& thread, const void* destination, const void* barrier, unsigned rank, const void* values,
                        unsigned bytes, const char* pc) {
    const size_t offset = check_shared(thread, destination, bytes, bytes, "stores", pc);
    const size_t counted = check_shared(thread, barrier, 8, 8, "counts a store at an mbarrier", pc);
    if (rank >= cluster_.size())
        fail(thread, Failure::kUndefined, pc,
             "stores to block " + std::to_string(rank) + " of its cluster, which has " +
                 std::to_string(cluster_.size()));
    Block& target = cluster_.block(rank);
    if (target.live_ == 0)
        fail(thread, Failure::kUndefined, pc,
             "stores to shared memory of " + target.title() + ", whose threads have all left the kernel");
    Mbarrier& mbarrier = target.find_mbarrier(thread, counted, pc);
    target.shadow.launch_copy(thread, false, mbarrier.slot, offset, bytes, pc);
    std::memset(target.memory(offset), 0xff, bytes);
    const char* first = static_cast<const char*>(values);
    cluster_.loads.push_back({&target, &mbarrier, offset, bytes, {}, {}, {first, first + bytes}, pc});
}

// Called between threads: not by one.
void Block::land_load(const BulkLoad& load) {
    if (load.stored.empty()) {
        const TensorMap& map = load.map;
        std::vector<char> line(map.line_bytes());
        map.each_line(load.at.data(), [&](unsigned i, uint64_t address, unsigned first, unsigned bytes) {
            std::fill(line.begin(), line.end(), 0);
            if (bytes) std::memcpy(line.data() + first, reinterpret_cast<const char*>(address), bytes);
            if (map.tf32) round_to_tf32(line);
            swap_lines(map, memory(load.destination), load.destination, i, line.data(), true);
        });
    } else {
        std::memcpy(memory(load.destination), load.stored.data(), load.bytes);
    }
    Mbarrier& barrier = *load.barrier;
    const uint32_t stamp = clock_.stamp(barrier.copies);
    shadow.land_copy(stamp, barrier.slot, load.destination, load.bytes, load.pc);
    clock_.release(barrier.copies, barrier.arriving);
    barrier.bytes -= static_cast<int64_t>(load.bytes);
    if (barrier.bytes < -Mbarrier::kMostBytes || (barrier.pending == 0 && barrier.bytes < 0))
        return set_failure(threads_[0], Failure::kPhase, load.pc,
                           "waits, and to the mbarrier at " + describe_shared(barrier.offset) + " came " +
                               std::to_string(-barrier.bytes) + " bytes more than this phase expects");
    complete_phase(barrier);
}

void Block::tensor_store(Thread& thread, const void* pointer, const void* from, const int* at, unsigned dimensions,
                         const char* pc) {
    const TensorMap& map = check_map(thread, pointer, at, dimensions, pc);
    for (unsigned i = 0; i < dimensions; ++i)
        if (at[i] < 0)  // not in the PTX ISA; an H200 stops with an illegal instruction
            fail(thread, Failure::kUndefined, pc,
                 "stores a box that begins before the tensor, at " + std::to_string(at[i]) + " of dimension " +
                     std::to_string(i));
    const size_t offset = check_shared(thread, from, map.bytes(), kCopyAlignment, "copies a box", pc);
    shadow.begin_read(thread, thread, offset, map.bytes(), pc);
    map.each_line(at, [&](unsigned, uint64_t address, unsigned, unsigned bytes) {
        if (!bytes) return;
        access(thread, Access::kWrite, address, bytes, pc);
        std::memset(reinterpret_cast<char*>(address), 0xff, bytes);
    });
    BulkStore store{map, {}, offset, thread.store_groups, false, false, {}, pc};
    std::copy_n(at, dimensions, store.at.begin());
    thread.stores.push_back(store);
}

namespace {

void land(const BulkStore& store) {
    store.map.each_line(store.at.data(), [&](unsigned i, uint64_t address, unsigned first, unsigned bytes) {
        std::memcpy(reinterpret_cast<char*>(address), store.box.data() + i * store.map.line_bytes() + first, bytes);
    });
}

}  // namespace

void Block::tensor_store_wait(Thread& thread, unsigned pending, bool read) {
    Warp& warp = warps_[thread.index / 32];
    bool any = false;
    size_t landed = 0;
    for (BulkStore& store : thread.stores) {
        if (!store.committed || store.group + pending >= thread.store_groups) break;
        if (!store.read) {
            const TensorMap& map = store.map;
            store.box.resize(map.bytes());
            for (unsigned i = 0; i < map.lines(); ++i)
                swap_lines(map, memory(store.source), store.source, i, store.box.data() + i * map.line_bytes(), false);
            shadow.end_read(clock_.stamp(warp.agent), thread.index / 32, store.source, map.bytes());
            store.read = any = true;
        }
        if (read) continue;
        land(store);
        ++landed;
    }
    thread.stores.erase(thread.stores.begin(), thread.stores.begin() + static_cast<ptrdiff_t>(landed));
    if (any) clock_.synchronise<Agent>({&warp.agent}, {&thread}, Clock::Extent::kSome);
}

// What has left shared memory arrives with the end of the kernel.
void Block::land_stores() {
    for (Thread& thread : threads_) {
        for (const BulkStore& store : thread.stores)
            if (store.read) land(store);
        thread.stores.clear();
    }
}

#define CALLER static_cast<const char*>(__builtin_return_address(0))

void tensor_load(void* destination, const void* map, void* barrier, const int* at, unsigned dimensions,
                 unsigned blocks) {
    Thread& thread = *current_thread();
    thread.block->tensor_load(thread, destination, map, barrier, at, dimensions, blocks, CALLER);
}

void store_async(void* destination, void* barrier, unsigned rank, const void* values, unsigned bytes) {
    Thread& thread = *current_thread();
    thread.block->store_async(thread, destination, barrier, rank, values, bytes, CALLER);
}

void tensor_store(const void* map, const void* source, const int* at, unsigned dimensions) {
    Thread& thread = *current_thread();
    thread.block->tensor_store(thread, map, source, at, dimensions, CALLER);
}

void tensor_store_commit() {
    Thread& thread = *current_thread();
    for (BulkStore& store : thread.stores) store.committed = true;
    ++thread.store_groups;
}

void tensor_store_wait(unsigned pending, bool read) {
    Thread& thread = *current_thread();
    thread.block->tensor_store_wait(thread, pending, read);
}

}  // namespace fusewright_simulator
