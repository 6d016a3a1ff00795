#include "tensor_core.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

namespace fusewright_simulator {

namespace {

constexpr int kFraction = 25;          // bits kept below the largest exponent
constexpr int32_t kZero = -2048;       // exponent of zero: below all others, also when two are added
constexpr unsigned kMostColumns = 256;

float power_of_two(int32_t exponent) {
    const uint32_t bits = static_cast<uint32_t>(exponent + 127) << 23;
    float power;
    std::memcpy(&power, &bits, 4);
    return power;
}

double large_power_of_two(int32_t exponent) {
    const uint64_t bits = static_cast<uint64_t>(exponent + 1023) << 52;
    double power;
    std::memcpy(&power, &bits, 8);
    return power;
}

void decode_float(float x, float& significand, int32_t& exponent) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    const auto field = static_cast<int32_t>(bits >> 23 & 255);
    if (field == 0) {
        significand = x * 0x1p126f;
        exponent = x == 0 ? kZero : -126;
        return;
    }
    bits = (bits & 0x807fffff) | 127u << 23;
    std::memcpy(&significand, &bits, 4);
    exponent = field - 127;
}

// Cut off to float32; from 2^128 on infinite, and zero is positive.
float toward_zero(double x) {
    if (std::fabs(x) >= 0x1p128) return x < 0 ? -INFINITY : INFINITY;
    const auto rounded = static_cast<float>(x);
    return (std::fabs(double(rounded)) > std::fabs(x) ? std::nextafterf(rounded, 0.0f) : rounded) + 0.0f;
}

// Infinities and NaNs follow IEEE's rules; tensor cores know one NaN.
float special_sum(float c, const float* a, const int32_t* exponents, const Decoded& b, unsigned n, unsigned columns) {
    float sum = c;
    for (unsigned k = 0; k < b.special.size(); ++k) {
        const size_t at = size_t(k) * columns + n;
        // Finite ones only by their signs: large ones must not overflow here.
        const float x = std::isfinite(a[k]) ? (exponents[k] == kZero ? 0.0f : std::copysign(1.0f, a[k])) : a[k];
        const float y = b.significands[at];
        const float product = x * (std::isfinite(y) ? (b.exponents[at] == kZero ? 0.0f : std::copysign(1.0f, y)) : y);
        if (!std::isfinite(product)) sum = std::isfinite(sum) ? product : sum + product;
    }
    const uint32_t nan = 0x7fffffff;
    if (sum != sum) std::memcpy(&sum, &nan, 4);
    return sum;
}

}  // namespace

template <class Word> void Decoded::decode(const Word* values, unsigned rows, unsigned columns, Factor type) {
    const int mantissa = type == Factor::Bfloat16 ? 7 : 10, field_bits = type == Factor::Half ? 5 : 8;
    const int bias = (1 << (field_bits - 1)) - 1, sign_bit = mantissa + field_bits;
    const uint32_t fields = (1u << field_bits) - 1, ones = (1u << mantissa) - 1;
    significands.resize(size_t(rows) * columns);
    exponents.resize(significands.size());
    special.assign(rows, 0);
    const float unit = power_of_two(-mantissa);
    for (size_t i = 0; i < significands.size(); ++i) {
        const uint32_t bits = values[i], field = bits >> mantissa & fields, fraction = bits & ones;
        const float sign = bits >> sign_bit ? -1.0f : 1.0f;
        significands[i] = sign * (field ? 1.0f + float(fraction) * unit : float(fraction) * unit);
        exponents[i] = (field | fraction) == 0 ? kZero : static_cast<int32_t>(field ? field : 1) - bias;
        if (field == fields) {
            special[i / columns] = 1;
            significands[i] = fraction ? std::numeric_limits<float>::quiet_NaN() : sign * INFINITY;
        }
    }
}

template void Decoded::decode(const uint32_t*, unsigned, unsigned, Factor);

void multiply_row(float* row, const Decoded& a, unsigned at, const Decoded& b, unsigned columns) {
    const auto depth = static_cast<unsigned>(b.special.size());
    const float* factors = &a.significands[size_t(at) * depth];
    const int32_t* powers = &a.exponents[size_t(at) * depth];
    float significand[kMostColumns];
    int32_t exponent[kMostColumns], largest[kMostColumns], sums[2][kMostColumns];
    for (auto& sum : sums) std::fill_n(sum, columns, 0);
    bool special = a.special[at] || std::any_of(b.special.begin(), b.special.end(), [](uint8_t s) { return s; });
    for (unsigned n = 0; n < columns; ++n) {
        special |= !std::isfinite(row[n]);
        decode_float(row[n], significand[n], exponent[n]);
        largest[n] = std::max(exponent[n], kZero);
    }
    for (unsigned k = 0; k < depth; ++k)
        for (unsigned n = 0; n < columns; ++n)
            largest[n] = std::max(largest[n], powers[k] + b.exponents[size_t(k) * columns + n]);
    for (unsigned k = 0; k < depth; ++k) {
        int32_t* sum = sums[k / 8];
        const float* others = &b.significands[size_t(k) * columns];
        const int32_t* other_powers = &b.exponents[size_t(k) * columns];
        for (unsigned n = 0; n < columns; ++n) {
            // Exact but for the conversion, which cuts off.
            const int32_t shift = std::max(kFraction + powers[k] + other_powers[n] - largest[n], -30);
            sum[n] += static_cast<int32_t>(factors[k] * others[n] * power_of_two(shift));
        }
    }
    for (unsigned n = 0; n < columns; ++n) {
        const int32_t shift = std::max(kFraction + exponent[n] - largest[n], -30);
        const auto own = static_cast<int32_t>(significand[n] * power_of_two(shift));
        const int64_t sum = int64_t(sums[0][n]) + sums[1][n] + own;
        const float finite = toward_zero(double(sum) * large_power_of_two(std::max(largest[n] - kFraction, -1000)));
        const float infinite = special ? special_sum(row[n], factors, powers, b, n, columns) : 0;
        row[n] = std::isfinite(infinite) ? finite : infinite;
    }
}

void mma(float (&d)[4], const uint32_t (&rows)[2][8], const uint32_t (&columns)[2][8], Factor type) {
    const unsigned parts = type == Factor::Tf32 ? 1 : 2, depth = 8 * parts;
    const auto part = [&](uint32_t word, unsigned i) {
        return type == Factor::Tf32 ? word >> 13 : word >> 16 * i & 0xffff;
    };
    uint32_t left[2 * 16], right[16 * 2];
    for (unsigned i = 0; i < 2; ++i)
        for (unsigned k = 0; k < depth; ++k) {
            left[i * depth + k] = part(rows[i][k / parts], k % parts);
            right[k * 2 + i] = part(columns[i][k / parts], k % parts);
        }
    static thread_local Decoded a, b;  // keep their memory
    a.decode(left, 2, depth, type);
    b.decode(right, depth, 2, type);
    for (unsigned i = 0; i < 2; ++i) multiply_row(&d[2 * i], a, i, b, 2);
}

}  // namespace fusewright_simulator
