// The arithmetic of the tensor cores.
#pragma once
#include <cstdint>
#include <vector>

namespace fusewright_simulator {

// A matrix of 16-bit floating-point numbers, each as significand · 2^exponent, |significand| < 2.
struct Decoded {
    std::vector<float> significands;
    std::vector<int32_t> exponents;
    std::vector<uint8_t> special;  // by row: it holds an infinity or NaN

    // values: [rows][columns].
    void decode(const uint16_t* values, unsigned rows, unsigned columns, bool bfloat16);
};

// row[n] = row[n] + sum over k < 16 of a[k] · b[k][n]. Each sum of 17 terms is made as by Hopper's tensor cores: terms
// are aligned to the largest exponent among them and cut off after 25 fractional bits, added exactly, and the sum is
// rounded toward zero to float32. a: row `at` of a matrix of 16 columns.
void multiply_row(float* row, const Decoded& a, unsigned at, const Decoded& b, unsigned columns);

}  // namespace fusewright_simulator
