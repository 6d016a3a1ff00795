// The arithmetic of the tensor cores.
#pragma once
#include <cstdint>
#include <vector>

#include "../include/api.hpp"

namespace fusewright_simulator {

// A matrix of factors, each as significand · 2^exponent, |significand| < 2.
struct Decoded {
    std::vector<float> significands;
    std::vector<int32_t> exponents;
    std::vector<uint8_t> special;  // by row: it holds an infinity or NaN

    // values: [rows][columns], each number in the lower bits: 16, or TF32's 19.
    template <class Word> void decode(const Word* values, unsigned rows, unsigned columns, Factor type);
};

// row[n] = row[n] + sum over k of a[k] · b[k][n], for the b.special.size() ≤ 16 rows of b. Each sum is made as by
// Hopper's tensor cores: terms are aligned to the largest exponent among them and cut off after 25 fractional bits, added
// exactly, and the sum is rounded toward zero to float32. a: row `at` of a matrix of as many columns.
void multiply_row(float* row, const Decoded& a, unsigned at, const Decoded& b, unsigned columns);

}  // namespace fusewright_simulator
