// The simulator's version of cuda/mma.cuh.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include "vector.cuh"

namespace fusewright {

namespace simulator = ::fusewright_simulator;

// Element i of a 4-byte word.
template <class Element> inline double part_of_word(uint32_t word, int i) {
    if constexpr (sizeof(Element) == 4) {
        word &= 0xffffe000;  // TF32
        float value;
        memcpy(&value, &word, 4);
        return value;
    } else {
        const uint16_t bits = static_cast<uint16_t>(word >> 16 * i);
        Element value;
        memcpy(static_cast<void*>(&value), &bits, 2);
        return static_cast<float>(value);
    }
}

// Rounds toward zero, as the tensor cores do; they also cut terms off against the largest, which this does not model.
inline float toward_zero(double x) {
    const auto rounded = static_cast<float>(x);
    const bool away = rounded - rounded == 0 && (rounded < 0 ? -double(rounded) : rounded) > (x < 0 ? -x : x);
    return away ? nextafterf(rounded, 0.0f) : rounded;
}

// The words of four neighbouring lanes from `first` on.
struct Words {
    uint64_t of[4];
};
FUSEWRIGHT_UNCHECKED inline Words words_of(const simulator::Exchange& all, unsigned first) {
    Words words;
    for (unsigned t = 0; t < 4; ++t) words.of[t] = all.values[first + t];
    return words;
}

// d + the product of a row, with words 0 … 3 and 4 … 7 in the halves `half` of `a`, and a column.
template <class Element>
FUSEWRIGHT_UNCHECKED inline float multiply_words(float d, const Words (&a)[2], unsigned half, const Words& b) {
    double sum = d;
    for (unsigned word = 0; word < 8; ++word)
        for (int part = 0; part < int(4 / sizeof(Element)); ++part)
            sum += part_of_word<Element>(uint32_t(a[word / 4].of[word % 4] >> 32 * half), part) *
                   part_of_word<Element>(uint32_t(b.of[word % 4] >> word / 4 * 32), part);
    return toward_zero(sum);
}

template <class Element>
__device__ __forceinline__ void multiply_tile(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                              FUSEWRIGHT_SITE) {
    const unsigned lane = simulator::lane_index(), g = lane / 4, t = lane % 4;
    const auto exchange = [&](uint32_t low, uint32_t high) -> const simulator::Exchange& {
        const auto& all = simulator::exchange("mma", ~0u, uint64_t(high) << 32 | low, FUSEWRIGHT_HERE);
        if (simulator::present(all) != ~0u)
            simulator::fail_undefined("executes mma in a warp that some lanes have left");
        return all;
    };
    Words rows[2], columns[2];
    rows[0] = words_of(exchange(a[0], a[1]), 4 * g);
    rows[1] = words_of(exchange(a[2], a[3]), 4 * g);
    const auto& all = exchange(b[0], b[1]);
    for (unsigned i = 0; i < 2; ++i) columns[i] = words_of(all, 4 * (2 * t + i));
    for (unsigned i = 0; i < 4; ++i) d[i] = multiply_words<Element>(d[i], rows, i / 2, columns[i % 2]);
}

}  // namespace fusewright
