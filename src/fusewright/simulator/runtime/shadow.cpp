#include "shadow.hpp"

#include <sys/mman.h>

#include <algorithm>
#include <new>

#include "block.hpp"

namespace fusewright_simulator {

namespace {

// Zeroed memory that costs nothing until it is touched.
void* reserve(size_t bytes) {
    void* memory =
        mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    return memory;
}

}  // namespace

Shadow::~Shadow() {
    if (words_) munmap(words_, capacity_ / 4 * sizeof(Cell));
    if (byte_cells_) munmap(byte_cells_, capacity_ * sizeof(Cell));
    if (readers_) munmap(readers_, reader_bytes_);
}

void Shadow::resize(size_t bytes, size_t threads) {
    bytes_ = bytes;  // exactly: what lies right behind is other memory
    bytes = (bytes + 4095) / 4096 * 4096;
    if (bytes > capacity_) {
        if (words_) munmap(words_, capacity_ / 4 * sizeof(Cell));
        if (byte_cells_) munmap(byte_cells_, capacity_ * sizeof(Cell));
        words_ = static_cast<Cell*>(reserve(bytes / 4 * sizeof(Cell)));
        byte_cells_ = static_cast<Cell*>(reserve(bytes * sizeof(Cell)));
        capacity_ = bytes;
    }
    if (bytes * threads * sizeof(uint32_t) > reader_bytes_) {
        if (readers_) munmap(readers_, reader_bytes_);
        reader_bytes_ = bytes * threads * sizeof(uint32_t);
        readers_ = static_cast<uint32_t*>(reserve(reader_bytes_));
    }
    // Stamps left over from earlier launches are all below the floor: they need no clearing.
    threads_ = threads;
    warps_ = (threads + 31) / 32;
    granules_.clear();
    warp_stamps_.clear();
    legal_.assign(bytes, 0);
    split_.assign(bytes / 4, 0);
}

void Shadow::begin_block(unsigned rank) {
    rank_ = rank;
    base_ = rank * clock_.stride();
}

void Shadow::allow(size_t offset, size_t bytes, Legality legality) {
    std::fill_n(legal_.begin() + static_cast<ptrdiff_t>(offset), bytes, legality);
}

void Shadow::split(size_t word) {
    split_[word] = 1;
    const Cell& cell = words_[word];
    for (size_t i = 0; i < 4; ++i) {
        byte_cells_[word * 4 + i] = cell;
        if (cell.shared && i > 0) std::copy_n(readers(word * 4), threads_, readers(word * 4 + i));
    }
    words_[word] = {};  // until the next launch, which may look at words again
}

template <class F> void Shadow::each_cell(size_t offset, size_t bytes, F visit) {
    const size_t end = offset + bytes;
    while (offset < end) {
        const size_t word = offset / 4;
        const bool whole = offset % 4 == 0 && end - offset >= 4;
        if (!whole && !split_[word]) split(word);
        if (split_[word]) {
            visit(byte_cells_[offset], offset);
            offset += 1;
        } else {
            visit(words_[word], offset);
            offset += 4;
        }
    }
}

void Shadow::touch(Thread& thread, Access access, size_t offset, size_t bytes, const char* pc) {
    each_cell(offset, bytes, [&](Cell& cell, size_t at) { touch_cell(thread, access, cell, at, pc); });
}

inline void Shadow::touch_cell(Thread& thread, Access access, Cell& cell, size_t offset, const char* pc) {
    if (access != Access::kWrite) check_read(thread, thread, cell, offset, pc);
    if (access == Access::kRead) return record_read(thread, cell, offset, pc);
    check_write(thread, access, cell, offset, pc);
    cell = {thread.clock, 0, pc, nullptr, thread.index, 0, access == Access::kAtomic, false, true};
}

inline void Shadow::check_read(Thread& thread, const Agent& agent, Cell& cell, size_t offset, const char* pc) {
    if (cell.write < clock_.birth())
        thread.fail(Failure::kUninitialised, pc,
                    "reads " + owner_.describe_shared(offset) + ", which no thread of this block has written");
    if (cell.write == kInFlight) report_in_flight(thread, "reads ", cell, offset, pc);
    if (!cell.atomic && !ordered(agent, cell.writer, cell.write))
        report_race(thread, offset, false, cell.writer, true, cell.write_pc, pc);
}

inline void Shadow::record_read(Thread& thread, Cell& cell, size_t offset, const char* pc) {
    if (cell.atomic && !ordered(thread, cell.writer, cell.write))
        report_race(thread, offset, false, cell.writer, true, cell.write_pc, pc);
    if (cell.shared) {
        readers(offset)[thread.index] = thread.clock;
    } else if (cell.reader != thread.index && !ordered(thread, cell.reader, cell.read)) {
        uint32_t* stamps = readers(offset);
        std::fill_n(stamps, threads_, 0u);
        stamps[cell.reader] = cell.read;
        stamps[thread.index] = thread.clock;
        cell.shared = true;
    }
    cell.read = thread.clock > cell.read ? thread.clock : cell.read;
    cell.reader = thread.index;
    cell.read_pc = pc;
}

inline void Shadow::check_write(Thread& thread, Access access, Cell& cell, size_t offset, const char* pc) {
    if (cell.write == kInFlight) report_in_flight(thread, "writes ", cell, offset, pc);
    const bool both_atomic = access == Access::kAtomic && cell.atomic;
    if (!both_atomic && !ordered(thread, cell.writer, cell.write))
        report_race(thread, offset, true, cell.writer, true, cell.write_pc, pc);
    if (!granules_.empty()) check_async_reads(thread, offset, pc);
    if (cell.read <= clock_.floor(thread, rank_)) return;
    if (!cell.shared) {
        if (!ordered(thread, cell.reader, cell.read))
            report_race(thread, offset, true, cell.reader, false, cell.read_pc, pc);
        return;
    }
    const uint32_t* stamps = readers(offset);
    for (size_t other = 0; other < threads_; ++other)
        if (!ordered(thread, other, stamps[other])) report_race(thread, offset, true, other, false, cell.read_pc, pc);
}

void Shadow::check_async_reads(Thread& thread, size_t offset, const char* pc) {
    const Granule& granule = granules_[offset / 16];
    if (granule.in_flight)
        thread.fail(Failure::kOperand, pc,
                    "writes " + owner_.describe_shared(offset) + ", which an asynchronous operation started at " +
                        source(granule.pc) + " and not waited for may still be reading");
    if (granule.latest <= clock_.floor(thread, rank_)) return;
    const uint32_t* stamps = &warp_stamps_[offset / 16 * warps_];
    for (size_t warp = 0; warp < warps_; ++warp)
        if (!ordered(thread, threads_ + warp, stamps[warp]))
            report_race(thread, offset, true, threads_ + warp, false, granule.pc, pc);
}

void Shadow::launch_copy(Thread& thread, bool bulk, uint16_t writer, size_t offset, size_t bytes, const char* pc) {
    each_cell(offset, bytes, [&](Cell& cell, size_t at) {
        check_write(thread, Access::kWrite, cell, at, pc);
        if (bulk) check_fenced(thread, thread, cell, at, "is about to be overwritten by", pc);
        cell = {kInFlight, 0, pc, nullptr, writer, 0, false, false, !bulk};
    });
}

void Shadow::land_copy(uint32_t stamp, uint16_t writer, size_t offset, size_t bytes, const char* pc) {
    each_cell(offset, bytes, [&](Cell& cell, size_t) {
        cell = {stamp, 0, pc, nullptr, writer, 0, false, false, cell.generic};
    });
}

void Shadow::begin_read(Thread& thread, const Agent& agent, size_t offset, size_t bytes, const char* pc) {
    if (granules_.empty()) {
        granules_.assign((bytes_ + 15) / 16 + 1, {});
        warp_stamps_.assign(granules_.size() * warps_, 0);
    }
    each_cell(offset, bytes, [&](Cell& cell, size_t at) {
        check_read(thread, agent, cell, at, pc);
        check_fenced(thread, agent, cell, at, "is about to be read by", pc);
    });
    for (size_t i = offset / 16; i < (offset + bytes + 15) / 16; ++i) {
        ++granules_[i].in_flight;
        granules_[i].pc = pc;
    }
}

void Shadow::end_read(uint32_t stamp, unsigned warp, size_t offset, size_t bytes) {
    for (size_t i = offset / 16; i < (offset + bytes + 15) / 16; ++i) {
        --granules_[i].in_flight;
        granules_[i].latest = stamp;
        warp_stamps_[i * warps_ + warp] = stamp;
    }
}

void Shadow::forget_reads() {
    for (Granule& granule : granules_) granule.in_flight = 0;
}

// Writes by threads go through the generic proxy: a fence must lie between them and the asynchronous proxy's accesses.
void Shadow::check_fenced(Thread& thread, const Agent& agent, const Cell& cell, size_t offset, const char* verb,
                          const char* pc) {
    const bool generic = cell.write >= clock_.birth() && cell.generic;
    if (generic && !clock_.fenced(agent, static_cast<uint32_t>(base_ + cell.writer), cell.write))
        thread.fail(Failure::kFence, pc,
                    "starts an asynchronous operation, and " + owner_.describe_shared(offset) + ", which " +
                        owner_.agent_name(cell.writer) + " wrote at " + source(cell.write_pc) + ", " + verb +
                        " it with no fence.proxy.async between the two");
}

void Shadow::report_in_flight(Thread& thread, const char* verb, const Cell& cell, size_t offset, const char* pc) {
    thread.fail(Failure::kInFlight, pc,
                verb + owner_.describe_shared(offset) + ", which an asynchronous copy of " +
                    owner_.agent_name(cell.writer) + " (" + source(cell.write_pc) + ") may still be writing");
}

void Shadow::report_race(Thread& thread, size_t offset, bool writes, size_t other, bool other_wrote,
                         const char* other_pc, const char* pc) {
    thread.fail(Failure::kRace, pc,
                std::string(writes ? "writes " : "reads ") + owner_.describe_shared(offset) + ", which " +
                    owner_.agent_name(other) + (other_wrote ? " wrote at " : " read at ") + source(other_pc) +
                    ", and no barrier orders the two");
}

}  // namespace fusewright_simulator
