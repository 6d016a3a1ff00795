// What four warps do together: products of matrices and the exchange of registers.
// PTX ISA, "Asynchronous Warpgroup Level Matrix Instructions" and "Miscellaneous Instructions: setmaxnreg".
#include <algorithm>
#include <cstring>

#include "cluster.hpp"
#include "tensor_core.hpp"

namespace fusewright_simulator {

// ---- Registers that products use ----------------------------------------------------------------------------------

Registers::Range* Registers::find(const void* begin) {
    for (Range& range : ranges_)
        if (range.begin == reinterpret_cast<uintptr_t>(begin)) return &range;
    return nullptr;
}

Registers::Range* Registers::use(const void* begin, size_t bytes, const char* pc) {
    const auto address = reinterpret_cast<uintptr_t>(begin);
    Range* range = find(begin);
    if (!range) {
        if (!fenced_) return nullptr;
        low_ = std::min(low_, address);
        high_ = std::max(high_, address + bytes);
        ranges_.push_back({address, address + bytes, 0, 0, false, pc});
        range = &ranges_.back();
    }
    range->end = address + bytes;
    range->pc = pc;
    return range->touched ? nullptr : range;
}

const Registers::Range* Registers::touch(uintptr_t address, size_t bytes, bool writes) {
    for (Range& range : ranges_) {
        if (address >= range.end || address + bytes <= range.begin) continue;
        if (range.writing || (writes && range.reading)) return &range;
        range.touched = true;
    }
    return nullptr;
}

bool Registers::overlaps(const void* begin, size_t bytes) const {
    const auto address = reinterpret_cast<uintptr_t>(begin);
    return std::any_of(ranges_.begin(), ranges_.end(), [&](const Range& range) {
        const bool same = range.begin == address && range.end == address + bytes;
        return range.writing && !same && address < range.end && address + bytes > range.begin;
    });
}

void Block::check_registers(Thread& thread, Access access, uintptr_t address, size_t bytes, const char* pc) {
    const Registers::Range* range = thread.registers.touch(address, bytes, access != Access::kRead);
    if (range)
        fail(thread, Failure::kOperand, pc,
             std::string(access == Access::kRead ? "reads" : "writes") + " registers that the product at " +
                 source(range->pc) + ", not waited for, may still be " + (range->writing ? "writing" : "reading"));
}

// ---- Collective instructions ----------------------------------------------------------------------------------------

// All lanes of a warp come to the same instruction; the last runs `action` before they go on.
void Block::collective(Thread& thread, const char* operation, uint64_t value, void (Block::*action)(Thread&),
                       const char* pc) {
    const unsigned warp = thread.index / 32;
    if (live_lanes_[warp] != ~0u)
        fail(thread, Failure::kDivergence, pc,
             std::string("executes ") + operation + ", which takes whole warps, but some lanes have left the kernel");
    thread.action = action;
    exchange(thread, operation, ~0u, value, {"", 0}, pc);
}

// Instructions that are "aligned": each warp of the group executes the same ones in the same order.
void Block::record_aligned(Thread& thread, const char* operation, uint64_t a, uint64_t b, const char* pc) {
    Warp& warp = warps_[thread.index / 32];
    const size_t group = thread.index / 128;
    if (threads_.size() < (group + 1) * 128)
        fail(thread, Failure::kDivergence, pc,
             std::string("executes ") + operation + ", but its block ends within its warpgroup of 128 threads");
    auto& log = warpgroups_[group];
    if (warp.aligned == log.size()) log.push_back({operation, a, b, pc});
    const Aligned& expected = log[warp.aligned++];
    if (std::strcmp(expected.operation, operation) != 0 || expected.a != a || expected.b != b)
        fail(thread, Failure::kDivergence, pc,
             std::string("executes ") + operation + ", but another warp of its warpgroup " + expected.operation +
                 " (" + source(expected.pc) + ")" +
                 (std::strcmp(expected.operation, operation) ? "" : " with other operands"));
}

void Block::check_warpgroups(Thread& thread) {
    for (size_t i = 0; i < warps_.size(); ++i)
        if (warps_[i].aligned != warpgroups_[i / 4].size()) {
            const Aligned& missing = warpgroups_[i / 4][warps_[i].aligned];
            fail(thread, Failure::kDivergence, missing.pc,
                 "leaves the kernel, but warp " + std::to_string(i) + " has not executed " + missing.operation +
                     ", as others of its warpgroup have");
        }
}

// ---- Matrices in shared memory --------------------------------------------------------------------------------------

Descriptor::Descriptor(uint64_t bits, bool transposed_)
    : start((bits & 0x3fff) << 4),
      leading((bits >> 16 & 0x3fff) << 4),
      stride((bits >> 32 & 0x3fff) << 4),
      swizzle(bits >> 62 ? 4 - unsigned(bits >> 62) : 0),
      base_offset(bits >> 49 & 7),
      transposed(transposed_) {}

uint32_t Descriptor::chunk(unsigned i, unsigned part) const {
    const unsigned span = 1u << swizzle;  // chunks in a line
    uint32_t address = start + i % 8 * (span * 16);
    if (!transposed)
        address += i / 8 * stride + part * (swizzle ? 16 : leading);
    else if (swizzle)
        address += i / 8 * stride + part % span * 16 + part / span * leading;
    else
        address += i / 8 * leading + part * stride;
    return swizzled(address & 0x3ffff, swizzle);
}

// Calls visit(offset) for every 16 bytes that `warp` reads.
template <class F> void Block::each_operand(const IssuedProduct& product, unsigned warp, F visit) {
    const unsigned first = warp % 4 * 16;
    if (!product.from_registers)
        for (unsigned i = 0; i < 16; ++i)
            for (unsigned part = 0; part < 2; ++part)
                visit(product.a.transposed ? product.a.chunk(i, first / 8 + part) : product.a.chunk(first + i, part));
    const unsigned lines = product.b.transposed ? 16 : product.columns;
    const unsigned parts = product.b.transposed ? product.columns / 8 : 2;
    for (unsigned i = 0; i < lines; ++i)
        for (unsigned part = 0; part < parts; ++part) visit(product.b.chunk(i, part));
}

void Block::check_operand(Thread& thread, const Descriptor& operand, const char* which, const char* pc) {
    const std::string what = std::string("multiplies by a descriptor of ") + which;
    if (operand.base_offset)
        fail(thread, Failure::kUndefined, pc, what + " with a base offset, which the simulator does not model");
    // Swizzled lines repeat after 8: the first must lie where the pattern begins.
    const uint32_t pattern = 128u << operand.swizzle;
    if (operand.swizzle && (operand.start & (pattern - 1) & ~127u))
        fail(thread, Failure::kMisaligned, pc,
             what + " that begins at shared address " + std::to_string(operand.start) +
                 ", where no pattern of its swizzle begins: that is at multiples of " + std::to_string(pattern));
}

// ---- Products -------------------------------------------------------------------------------------------------------

// One lane gives its registers to a product.
void Block::lend_registers(Thread& thread, IssuedProduct& product, const char* pc) {
    const Product& own = thread.product;
    const size_t sums = own.columns / 2, first = thread.lane() * sums;
    product.d[thread.lane()] = own.d;
    product.a_registers[thread.lane()] = own.a_registers;
    if (thread.registers.overlaps(own.d, sums * 4))
        fail(thread, Failure::kOperand, pc, "gives accumulators to a product, part of which another in flight writes");
    const char* unfenced = "gives registers to a product with no wgmma.fence since it accessed them";
    Registers::Range* range = thread.registers.use(own.d, sums * 4, pc);
    if (!range) fail(thread, Failure::kFence, pc, unfenced);
    const bool chained = range->writing++ > 0;
    if (!chained || !own.accumulate) {  // else it starts from what the products before leave in d
        product.fresh = true;
        product.c.resize(32 * sums);
        if (own.accumulate) std::memcpy(&product.c[first], own.d, sums * 4);
    }
    if (!chained) std::memset(own.d, 0xff, sums * 4);
    if (!product.from_registers) return;
    range = thread.registers.use(own.a_registers, 16, pc);
    if (!range) fail(thread, Failure::kFence, pc, unfenced);
    ++range->reading;
}

void Block::issue_product(Thread& thread) {
    const unsigned index = thread.index / 32;
    Warp& warp = warps_[index];
    const Product& common = thread.product;
    IssuedProduct product{{}, {}, Descriptor(common.a, common.a_transposed), Descriptor(common.b, common.b_transposed),
                          common.columns, common.type, common.a_registers != nullptr, false, {}, thread.pc};
    record_aligned(thread, "wgmma.mma_async", common.a, common.b, thread.pc);
    if (!product.from_registers) check_operand(thread, product.a, "A", thread.pc);
    check_operand(thread, product.b, "B", thread.pc);
    std::vector<Agent*> lanes;
    for (unsigned lane = 0; lane < 32; ++lane) {
        Thread& other = threads_[index * 32 + lane];
        const Product& own = other.product;
        if (own.a != common.a || own.b != common.b || own.accumulate != common.accumulate)
            fail(thread, Failure::kDivergence, thread.pc,
                 "multiplies other matrices than " + name(other.index) + " of its warp");
        lanes.push_back(&other);
        lend_registers(other, product, thread.pc);
    }
    clock_.synchronise<Agent>(lanes, {&warp.agent}, Clock::Extent::kSome);
    each_operand(product, index, [&](uint32_t offset) {
        if (!shadow.legal(offset, 16) || shadow.legality(offset) == Shadow::kBarrier)
            fail(thread, Failure::kOutOfBounds, thread.pc, "multiplies 16 bytes at " + describe_shared(offset));
        shadow.begin_read(thread, warp.agent, offset, 16, thread.pc);
    });
    warp.products.push_back(std::move(product));
    ++warp.uncommitted;
}

// 16 bytes of a matrix as 8 numbers of 16 bits, or 4 of TF32's 19. Returns how many.
unsigned Block::read_chunk(uint32_t at, Factor type, uint32_t (&values)[8]) {
    uint16_t chunk[8];
    std::memcpy(chunk, memory(at), 16);
    if (type != Factor::Tf32) {
        std::copy_n(chunk, 8, values);
        return 8;
    }
    for (unsigned i = 0; i < 4; ++i) values[i] = (uint32_t(chunk[2 * i + 1]) << 16 | chunk[2 * i]) >> 13;
    return 4;
}

// The 16 rows of A that a warp multiplies, [row][k].
std::vector<uint32_t> Block::factors(const IssuedProduct& product, unsigned index) {
    const unsigned depth = product.depth();
    std::vector<uint32_t> values(16 * depth);
    if (product.from_registers) {
        for (unsigned lane = 0; lane < 32; ++lane)
            for (unsigned i = 0; i < 4; ++i) {
                const unsigned row = lane / 4 + i % 2 * 8, k = i / 2 * 8 + lane % 4 * 2;
                const uint32_t pair = product.a_registers[lane][i];
                values[row * 16 + k] = pair & 0xffff;
                values[row * 16 + k + 1] = pair >> 16;
            }
        return values;
    }
    const unsigned first = index % 4 * 16;
    const bool transposed = product.a.transposed;
    for (unsigned i = 0; i < 16; ++i)
        for (unsigned part = 0; part < 2; ++part) {
            uint32_t chunk[8];
            const uint32_t at = transposed ? product.a.chunk(i, first / 8 + part) : product.a.chunk(first + i, part);
            const unsigned count = read_chunk(at, product.type, chunk);
            for (unsigned j = 0; j < count; ++j)
                values[transposed ? (part * 8 + j) * depth + i : i * depth + part * count + j] = chunk[j];
        }
    return values;
}

// The whole of B, [k][column].
std::vector<uint32_t> Block::columns(const IssuedProduct& product) {
    const unsigned columns = product.columns;
    const bool transposed = product.b.transposed;
    std::vector<uint32_t> values(size_t(product.depth()) * columns);
    for (unsigned i = 0; i < (transposed ? 16 : columns); ++i)
        for (unsigned part = 0; part < (transposed ? columns / 8 : 2); ++part) {
            uint32_t chunk[8];
            const unsigned count = read_chunk(product.b.chunk(i, part), product.type, chunk);
            for (unsigned j = 0; j < count; ++j)
                values[transposed ? i * columns + part * 8 + j : (part * count + j) * columns + i] = chunk[j];
        }
    return values;
}

void Block::execute(IssuedProduct& product, unsigned index) {
    const unsigned sums = product.columns / 2;
    Decoded a, b;
    a.decode(factors(product, index).data(), 16, product.depth(), product.type);
    b.decode(columns(product).data(), product.depth(), product.columns, product.type);
    std::vector<float> row(product.columns);
    for (unsigned y = 0; y < 16; ++y) {
        // Row y lies in four lanes, two neighbouring columns in each of them.
        auto place = [&](unsigned x) -> std::pair<unsigned, unsigned> {
            return {y % 8 * 4 + x % 8 / 2, x / 8 * 4 + y / 8 * 2 + x % 2};
        };
        for (unsigned x = 0; x < product.columns; ++x) {
            const auto [lane, i] = place(x);
            row[x] = product.fresh ? product.c[lane * sums + i] : product.d[lane][i];
        }
        multiply_row(row.data(), a, y, b, product.columns);
        for (unsigned x = 0; x < product.columns; ++x) {
            const auto [lane, i] = place(x);
            product.d[lane][i] = row[x];
        }
    }
}

void Block::commit_products(Thread& thread) {
    Warp& warp = warps_[thread.index / 32];
    record_aligned(thread, "wgmma.commit_group", 0, 0, thread.pc);
    warp.groups.push_back(warp.uncommitted);
    warp.uncommitted = 0;
}

void Block::wait_for_products(Thread& thread) {
    const unsigned index = thread.index / 32;
    Warp& warp = warps_[index];
    record_aligned(thread, "wgmma.wait_group", thread.value, 0, thread.pc);
    if (warp.groups.size() <= thread.value) return;
    const uint32_t stamp = clock_.stamp(warp.agent);
    for (; warp.groups.size() > thread.value; warp.groups.pop_front())
        for (size_t i = 0; i < warp.groups.front(); ++i, warp.products.pop_front()) {
            IssuedProduct& product = warp.products.front();
            execute(product, index);
            each_operand(product, index, [&](uint32_t offset) { shadow.end_read(stamp, index, offset, 16); });
            for (unsigned lane = 0; lane < 32; ++lane) {
                Registers& registers = threads_[index * 32 + lane].registers;
                --registers.find(product.d[lane])->writing;
                if (product.from_registers) --registers.find(product.a_registers[lane])->reading;
            }
        }
    std::vector<Agent*> lanes;
    for (unsigned lane = 0; lane < 32; ++lane) lanes.push_back(&threads_[index * 32 + lane]);
    clock_.synchronise<Agent>({&warp.agent}, lanes, Clock::Extent::kSome);
}

void Block::fence_registers(Thread& thread) {
    record_aligned(thread, "wgmma.fence", 0, 0, thread.pc);
    for (unsigned lane = 0; lane < 32; ++lane) threads_[thread.index / 32 * 32 + lane].registers.fence();
}

// ---- setmaxnreg -----------------------------------------------------------------------------------------------------

void Block::set_registers(Thread& thread, unsigned count, bool acquires, const char* pc) {
    const std::string what = "sets its registers to " + std::to_string(count);
    if (count % 8 || count < 24 || count > 256)
        fail(thread, Failure::kUndefined, pc, what + ", which is no multiple of 8 from 24 to 256");
    if (launch_->registers == 0)
        fail(thread, Failure::kUndefined, pc,
             what + ", which does nothing in a kernel without __launch_bounds__(threads, blocks)");
    collective(thread, acquires ? "setmaxnreg.inc" : "setmaxnreg.dec", count, &Block::move_registers, pc);
    while (warps_[thread.index / 32].registers != count) {
        thread.state = Thread::kForRegisters;
        thread.pc = pc;
        wait(thread);
    }
}

void Block::move_registers(Thread& thread) {
    const unsigned index = thread.index / 32;
    Warp& warp = warps_[index];
    const auto count = static_cast<uint32_t>(thread.value);
    const bool acquires = std::strcmp(thread.operation, "setmaxnreg.inc") == 0;
    record_aligned(thread, thread.operation, count, 0, thread.pc);
    if (acquires ? count < warp.registers : count > warp.registers)
        fail(thread, Failure::kUndefined, thread.pc,
             std::string("executes ") + thread.operation + " to " + std::to_string(count) + " registers, but has " +
                 std::to_string(warp.registers));
    warp.wanted = count;
    if (acquires) {
        register_waiters_.push_back(index);
    } else {
        free_registers_ += 32 * (warp.registers - count);
        warp.registers = count;
    }
    ++cluster_.progress;
    grant_registers();
}

void Block::grant_registers() {
    while (!register_waiters_.empty()) {
        const unsigned index = register_waiters_.front();
        Warp& warp = warps_[index];
        const uint64_t more = 32 * (warp.wanted - warp.registers);
        if (more > free_registers_) return;
        free_registers_ -= more;
        warp.registers = warp.wanted;
        register_waiters_.pop_front();
        std::vector<Thread*> lanes;
        for (unsigned lane = 0; lane < 32; ++lane) {
            Thread& thread = threads_[index * 32 + lane];
            if (thread.state == Thread::kForRegisters) lanes.push_back(&thread);
        }
        make_ready(lanes);
    }
}

// ---- What kernels call ----------------------------------------------------------------------------------------------

#define CALLER static_cast<const char*>(__builtin_return_address(0))

uint32_t shared_address(const void* pointer) {
    Thread& thread = *current_thread();
    if (!thread.block->holds(reinterpret_cast<uintptr_t>(pointer)))
        thread.fail(Failure::kUndefined, CALLER, "takes the shared address of what is not in shared memory");
    return static_cast<uint32_t>(thread.block->offset_of(pointer));
}

unsigned cluster_rank() { return current_thread()->rank; }

void cluster_sync() {
    Thread& thread = *current_thread();
    thread.block->cluster_sync(thread, CALLER);
}

void set_registers(unsigned count, bool acquires) {
    Thread& thread = *current_thread();
    thread.block->set_registers(thread, count, acquires, CALLER);
}

void wgmma(const Product& product) {
    Thread& thread = *current_thread();
    thread.product = product;
    thread.block->collective(thread, "wgmma.mma_async", 0, &Block::issue_product, CALLER);
}

void wgmma_fence() {
    Thread& thread = *current_thread();
    thread.block->collective(thread, "wgmma.fence", 0, &Block::fence_registers, CALLER);
}

void wgmma_commit() {
    Thread& thread = *current_thread();
    thread.block->collective(thread, "wgmma.commit_group", 0, &Block::commit_products, CALLER);
}

void wgmma_wait(unsigned pending) {
    Thread& thread = *current_thread();
    thread.block->collective(thread, "wgmma.wait_group", pending, &Block::wait_for_products, CALLER);
}

}  // namespace fusewright_simulator
