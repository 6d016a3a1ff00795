// What is known about every byte of shared memory: who wrote and read it last, and whether that is ordered before now.
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

#include "clock.hpp"

namespace fusewright_simulator {

class Block;
struct Thread;

enum class Access { kRead, kWrite, kAtomic };

// Shared memory of one running block. Offsets are bytes from the start of the module's thread-local storage. Agents are
// numbered within the block: its threads first, then what else writes.
class Shadow {
  public:
    Shadow(const Block& owner, const Clock& clock) : owner_(owner), clock_(clock) {}
    ~Shadow();
    // Makes room, for offsets below `bytes` and blocks of `threads` threads, and forgets which bytes are legal.
    void resize(size_t bytes, size_t threads);
    // The block is number `rank` of its cluster, from here on.
    void begin_block(unsigned rank);
    enum Legality : uint8_t { kIllegal, kChecked, kIgnored, kBarrier };
    void allow(size_t offset, size_t bytes, Legality legality);
    bool legal(size_t offset, size_t bytes) const {
        return offset + bytes <= bytes_ && legal_[offset] && legal_[offset + bytes - 1];
    }
    Legality legality(size_t offset) const { return static_cast<Legality>(legal_[offset]); }
    size_t bytes() const { return bytes_; }

    // Checks and records an access to legal bytes; reports a failure through `thread`'s block and then does not return.
    void touch(Thread& thread, Access access, size_t offset, size_t bytes, const char* pc);
    // From here until `land_copy`, an asynchronous copy that `thread` started may write these bytes at any time.
    // bulk: by the asynchronous proxy. writer: the agent that the copy belongs to.
    void launch_copy(Thread& thread, bool bulk, uint16_t writer, size_t offset, size_t bytes, const char* pc);
    void land_copy(uint32_t stamp, uint16_t writer, size_t offset, size_t bytes, const char* pc);
    // The asynchronous proxy reads legal bytes for `agent`, started by `thread`: from here until `end_read` at any time.
    void begin_read(Thread& thread, const Agent& agent, size_t offset, size_t bytes, const char* pc);
    void end_read(uint32_t stamp, unsigned warp, size_t offset, size_t bytes);
    // Nothing is in flight any more: the block has ended.
    void forget_reads();

  private:
    // The state of four bytes, or, where some access was narrower, of one byte.
    struct Cell {
        uint32_t write;  // stamp; kInFlight while an asynchronous copy may write
        uint32_t read;   // latest stamp of a read since that write; 0: none
        const char* write_pc;
        const char* read_pc;
        uint16_t writer;
        uint16_t reader;
        bool atomic;  // the write was atomic
        bool shared;  // several threads read: their stamps are in readers_
        bool generic;  // the write was not by the asynchronous proxy
    };
    static constexpr uint32_t kInFlight = ~0u;

    // Reads by the asynchronous proxy, in 16 bytes: how many are in flight, and the latest stamp of those that ended.
    struct Granule {
        uint32_t in_flight, latest;
        const char* pc;
    };

    void touch_cell(Thread& thread, Access access, Cell& cell, size_t offset, const char* pc);
    void check_write(Thread& thread, Access access, Cell& cell, size_t offset, const char* pc);
    void check_async_reads(Thread& thread, size_t offset, const char* pc);
    void check_read(Thread& thread, const Agent& agent, Cell& cell, size_t offset, const char* pc);
    void record_read(Thread& thread, Cell& cell, size_t offset, const char* pc);
    bool ordered(const Agent& agent, size_t other, uint32_t stamp) const {
        return clock_.ordered(agent, rank_, static_cast<uint32_t>(base_ + other), stamp);
    }
    void check_fenced(Thread& thread, const Agent& agent, const Cell& cell, size_t offset, const char* verb,
                      const char* pc);
    void split(size_t word);
    [[noreturn]] void report_race(Thread& thread, size_t offset, bool writes, size_t other, bool other_wrote,
                                  const char* other_pc, const char* pc);
    [[noreturn]] void report_in_flight(Thread& thread, const char* verb, const Cell& cell, size_t offset,
                                       const char* pc);
    template <class F> void each_cell(size_t offset, size_t bytes, F visit);
    uint32_t* readers(size_t offset) { return readers_ + offset * threads_; }

    const Block& owner_;
    const Clock& clock_;
    unsigned rank_ = 0;
    size_t base_ = 0;  // of this block's agents in the cluster
    size_t warps_ = 0;
    std::vector<Granule> granules_;      // [bytes / 16], once there was such a read
    std::vector<uint32_t> warp_stamps_;  // [bytes / 16][warp]
    size_t bytes_ = 0, capacity_ = 0, threads_ = 0, reader_bytes_ = 0;
    std::vector<uint8_t> legal_;
    std::vector<uint8_t> split_;    // by word: look at the bytes
    Cell* words_ = nullptr;         // [bytes / 4]
    Cell* byte_cells_ = nullptr;    // [bytes]
    uint32_t* readers_ = nullptr;   // [offset][thread]: stamp of the last read
};

}  // namespace fusewright_simulator
