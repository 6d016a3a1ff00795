// State of Hopper's asynchronous operations: mbarriers, bulk copies, products of warpgroups.
#pragma once
#include <array>
#include <cstdint>
#include <deque>
#include <vector>

#include "../include/api.hpp"
#include "clock.hpp"
#include "tensor_map.hpp"

namespace fusewright_simulator {

class Block;
struct Thread;

constexpr size_t kMostMbarriers = 256;  // in a block

// PTX ISA, "Parallel Synchronization and Communication Instructions: mbarrier".
struct Mbarrier {
    static constexpr uint32_t kMostArrivals = (1 << 20) - 1;
    static constexpr int64_t kMostBytes = (1 << 20) - 1;

    size_t offset;
    uint32_t expected, pending;  // arrivals
    int64_t bytes;               // expected less arrived, of bulk copies
    uint64_t phase;
    Agent initialiser;  // as it was then
    const char* initialised;
    bool published;  // to the asynchronous proxy
    Agent copies;    // those that count here
    uint16_t slot;   // its number among the block's agents
    Knowledge arriving, completed;  // of this phase; of all before
    std::vector<Thread*> waiting;
};

// What arrives in shared memory by itself and is counted at an mbarrier: a box of a tensor, or what a thread stored.
struct BulkLoad {
    Block* target;
    Mbarrier* barrier;  // of that block
    size_t destination, bytes;
    TensorMap map;
    std::array<int, kMostDimensions> at;
    std::vector<char> stored;  // or else a box
    const char* pc;
};

struct BulkStore {
    TensorMap map;
    std::array<int, kMostDimensions> at;
    size_t source;
    uint64_t group;
    bool committed, read;
    std::vector<char> box;  // once it has been read
    const char* pc;
};

// A matrix in shared memory that products read in chunks of 16 bytes: PTX ISA, "Matrix Descriptor", and "Strides".
struct Descriptor {
    uint32_t start, leading, stride;  // bytes
    unsigned swizzle;                 // as TensorMap's
    unsigned base_offset;
    bool transposed;

    Descriptor(uint64_t bits, bool transposed);
    // Of K-major operands: elements k = 8 * part and on of row `i`. Of MN-major ones: k = `i`, rows 8 * part and on.
    uint32_t chunk(unsigned i, unsigned part) const;
};

// A wgmma of one warp that has not been waited for.
struct IssuedProduct {
    std::array<float*, 32> d;
    std::array<const uint32_t*, 32> a_registers;
    Descriptor a, b;
    uint32_t columns;
    Factor type;
    bool from_registers;
    bool fresh;                      // c is the sum to start from; else d, left there by the product before
    std::vector<float> c;            // by lane
    const char* pc;

    unsigned depth() const { return type == Factor::Tf32 ? 8 : 16; }  // k: 32 bytes of it
};

struct Warp {
    Agent agent;  // its asynchronous reads
    std::deque<IssuedProduct> products;  // oldest first
    std::deque<size_t> groups;           // how many products, oldest first
    size_t uncommitted;
    size_t aligned;  // instructions that a warpgroup executes together
    uint32_t registers, wanted;
};

// An instruction that all warps of a warpgroup must execute alike.
struct Aligned {
    const char* operation;
    uint64_t a, b;
    const char* pc;
};

// What a thread knows of its registers (on the host: of arrays on its stack) that products have used.
class Registers {
  public:
    struct Range {
        uintptr_t begin, end;
        unsigned writing, reading;  // products in flight
        bool touched;               // by the thread, since its last wgmma.fence
        const char* pc;             // of the latest product
    };
    void clear() {
        ranges_.clear();
        low_ = ~uintptr_t(0);
        high_ = 0;
        fenced_ = false;
    }
    void fence() {
        fenced_ = true;
        for (Range& range : ranges_) range.touched = false;
    }
    bool watched(uintptr_t address, size_t bytes) const { return address + bytes > low_ && address < high_; }
    // The range from `begin` on, if a fence lies between what the thread did there and now; else null.
    Range* use(const void* begin, size_t bytes, const char* pc);
    Range* find(const void* begin);
    // Notes that the thread accesses these bytes. Returns a range whose product forbids it, or null.
    const Range* touch(uintptr_t address, size_t bytes, bool writes);
    // Whether a product in flight writes part of these bytes, but not just these.
    bool overlaps(const void* begin, size_t bytes) const;

  private:
    std::vector<Range> ranges_;
    uintptr_t low_ = ~uintptr_t(0), high_ = 0;
    bool fenced_ = false;
};

}  // namespace fusewright_simulator
