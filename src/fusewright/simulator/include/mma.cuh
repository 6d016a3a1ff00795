// The simulator's version of cuda/mma.cuh.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include "vector.cuh"

namespace fusewright {

namespace simulator = ::fusewright_simulator;

template <class Element> constexpr const simulator::Factor kFactor = simulator::Factor::Half;
template <> constexpr const simulator::Factor kFactor<__nv_bfloat16> = simulator::Factor::Bfloat16;
template <> constexpr const simulator::Factor kFactor<float> = simulator::Factor::Tf32;

// The lower and the upper words that four neighbouring lanes from `first` on brought.
FUSEWRIGHT_UNCHECKED inline void take_words(const simulator::Exchange& all, unsigned first, uint32_t* lower,
                                            uint32_t* upper) {
    for (unsigned t = 0; t < 4; ++t) {
        lower[t] = static_cast<uint32_t>(all.values[first + t]);
        upper[t] = static_cast<uint32_t>(all.values[first + t] >> 32);
    }
}

template <class Element>
__device__ __forceinline__ void multiply_tile(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                              FUSEWRIGHT_SITE) {
    const unsigned lane = simulator::lane_index(), g = lane / 4, t = lane % 4;
    const auto exchange = [&](uint32_t lower, uint32_t upper) -> const simulator::Exchange& {
        const auto& all = simulator::exchange("mma", ~0u, uint64_t(upper) << 32 | lower, FUSEWRIGHT_HERE);
        if (simulator::present(all) != ~0u)
            simulator::fail_undefined("executes mma in a warp that some lanes have left");
        return all;
    };
    uint32_t rows[2][8], columns[2][8];
    take_words(exchange(a[0], a[1]), 4 * g, &rows[0][0], &rows[1][0]);
    take_words(exchange(a[2], a[3]), 4 * g, &rows[0][4], &rows[1][4]);
    const auto& all = exchange(b[0], b[1]);
    for (unsigned i = 0; i < 2; ++i) take_words(all, 4 * (2 * t + i), &columns[i][0], &columns[i][4]);
    simulator::mma(d, rows, columns, kFactor<Element>);
}

}  // namespace fusewright
