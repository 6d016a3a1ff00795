// What a tensor map says in the simulator (mirrored by fusewright/simulator/tensor_map.py).
#pragma once
#include <algorithm>
#include <cstdint>

namespace fusewright_simulator {

constexpr unsigned kMostDimensions = 5;

struct TensorMap {
    static constexpr uint64_t kMagic = 0x70616d5f72736e74;

    uint64_t magic;
    uint64_t base;
    uint64_t extents[kMostDimensions];      // elements, innermost first
    uint64_t strides[kMostDimensions - 1];  // bytes, of the others
    uint32_t box[kMostDimensions];
    uint16_t dimensions;
    uint8_t element_bytes;
    uint8_t swizzle;  // 0: none; 1, 2, 3: 32, 64, 128 bytes
    uint8_t tf32;     // floats arrive rounded to TF32

    unsigned line_bytes() const { return box[0] * element_bytes; }
    unsigned lines() const {
        unsigned lines = 1;
        for (unsigned d = 1; d < dimensions; ++d) lines *= box[d];
        return lines;
    }
    unsigned bytes() const { return line_bytes() * lines(); }

    // Calls visit(line, address, first, bytes) for each line of the box at `at`: `bytes` bytes from byte `first` of the
    // line on lie within the tensor, the first of them at `address`.
    template <class F> void each_line(const int* at, F visit) const {
        const int64_t begin = std::max<int64_t>(0, -int64_t(at[0]));
        const int64_t end = std::min<int64_t>(box[0], int64_t(extents[0]) - at[0]);
        for (unsigned line = 0; line < lines(); ++line) {
            bool inside = begin < end;
            uint64_t address = base + uint64_t(at[0] + begin) * element_bytes;
            unsigned rest = line;
            for (unsigned d = 1; d < dimensions; ++d) {
                const int64_t i = at[d] + int64_t(rest % box[d]);
                rest /= box[d];
                inside = inside && i >= 0 && i < int64_t(extents[d]);
                address += uint64_t(i) * strides[d - 1];
            }
            visit(line, address, inside ? unsigned(begin) * element_bytes : 0,
                  inside ? unsigned(end - begin) * element_bytes : 0);
        }
    }
};
static_assert(sizeof(TensorMap) <= 128, "as large as a CUtensorMap");

// Where the 16 bytes at shared address `address` lie in a swizzle of 16 << mode bytes: PTX ISA, "Swizzling Modes".
inline uint32_t swizzled(uint32_t address, unsigned mode) {
    return address ^ ((address >> 7 & ((1u << mode) - 1)) << 4);
}

}  // namespace fusewright_simulator
