// Loads and stores of V consecutive elements by one thread, guarded at the end of a row, and bit masks.
//
// Everywhere, `count` is how many of the V elements exist; it may be negative, and nothing beyond it is touched.
#pragma once

#ifdef __CUDACC_RTC__  // NVRTC has no <cstdint>
typedef signed char int8_t;
typedef short int16_t;
typedef int int32_t;
typedef long int64_t;
typedef unsigned char uint8_t;
typedef unsigned short uint16_t;
typedef unsigned int uint32_t;
typedef unsigned long uint64_t;
#else
#include <cstdint>
#include <cstring>
#endif

namespace fusewright {

// The type that moves so many bytes in one access.
template <int Bytes> struct Word;
template <> struct Word<1> { using type = uint8_t; };
template <> struct Word<2> { using type = uint16_t; };
template <> struct Word<4> { using type = uint32_t; };
template <> struct Word<8> { using type = uint2; };
template <> struct Word<16> { using type = uint4; };

// Moves V elements in the widest accesses there are. The memory side must be aligned to them; the register side, read
// or written through memcpy, need not be.
template <int V, class T> struct Access {
    static constexpr int kBytes = V * sizeof(T), kWordBytes = kBytes < 16 ? kBytes : 16;
    using Type = typename Word<kWordBytes>::type;

    __device__ __forceinline__ static void load(T* dst, const T* p) {
#pragma unroll
        for (int i = 0; i < kBytes / kWordBytes; ++i) {
            const Type word = reinterpret_cast<const Type*>(p)[i];
            memcpy(reinterpret_cast<char*>(dst) + i * kWordBytes, &word, kWordBytes);
        }
    }

    __device__ __forceinline__ static void store(T* p, const T* src) {
#pragma unroll
        for (int i = 0; i < kBytes / kWordBytes; ++i) {
            Type word;
            memcpy(&word, reinterpret_cast<const char*>(src) + i * kWordBytes, kWordBytes);
            reinterpret_cast<Type*>(p)[i] = word;
        }
    }
};

// dst[i] = p[i * stride], or 0 past `count`.
template <int V, class T> __device__ __forceinline__ void load(T (&dst)[V], const T* p, int64_t stride, int count) {
#pragma unroll
    for (int i = 0; i < V; ++i) dst[i] = i < count ? p[i * stride] : T(0);
}

template <int V, class T>
__device__ __forceinline__ void store(T* p, int64_t stride, const T (&src)[V], int count) {
#pragma unroll
    for (int i = 0; i < V; ++i)
        if (i < count) p[i * stride] = src[i];
}

// The same with unit stride, where p is a multiple of min(16, V * sizeof(T)) bytes: in wide accesses but for the last.
template <int V, class T> __device__ __forceinline__ void load_vector(T (&dst)[V], const T* p, int count) {
    if (count >= V)
        Access<V, T>::load(dst, p);
    else
        load(dst, p, 1, count);
}

template <int V, class T> __device__ __forceinline__ void store_vector(T* p, const T (&src)[V], int count) {
    if (count >= V)
        Access<V, T>::store(p, src);
    else
        store(p, 1, src, count);
}

// A row of a bit mask has ceil(columns / 8) bytes; column n is bit n % 8 of byte n / 8. V is 1, 2, 4, 8 or 16, and n a
// multiple of it.
template <int V> __device__ __forceinline__ void load_bits(bool (&dst)[V], const uint8_t* row, int64_t n, int count) {
    uint32_t bits = 0;
#pragma unroll
    for (int byte = 0; byte * 8 < V; ++byte)
        if (byte * 8 < count) bits |= uint32_t(row[(n >> 3) + byte]) << byte * 8;
    if (V < 8) bits >>= n & 7;
#pragma unroll
    for (int i = 0; i < V; ++i) dst[i] = i < count && (bits >> i & 1);
}

// The same of a mask that is read in any order: column i of the thread is bit `bit + i * stride` of the whole mask.
template <int V>
__device__ __forceinline__ void load_bits(bool (&dst)[V], const uint8_t* mask, int64_t bit, int64_t stride, int count) {
#pragma unroll
    for (int i = 0; i < V; ++i) {
        const int64_t at = bit + i * stride;
        dst[i] = i < count && (mask[at / 8] >> at % 8 & 1);
    }
}

// All lanes of a warp call this together. Where V < 8, the columns of a byte belong to 8 / V neighbouring lanes of one
// row, in order; they combine their bits by shuffles, and the first of them writes. Bits past `count` are written as 0.
template <int V>
__device__ __forceinline__ void store_bits(uint8_t* row, int64_t n, const bool (&src)[V], int count) {
    uint32_t bits = 0;
#pragma unroll
    for (int i = 0; i < V; ++i) bits |= uint32_t(i < count && src[i]) << i;
    if (V < 8) bits <<= n & 7;
#pragma unroll
    for (int lanes = 1; lanes * V < 8; lanes *= 2) bits |= __shfl_xor_sync(0xffffffff, bits, lanes);
    if ((n & 7) == 0) {  // where V < 8, the first lane of its byte
#pragma unroll
        for (int byte = 0; byte * 8 < V; ++byte)
            if (byte * 8 < count) row[(n >> 3) + byte] = uint8_t(bits >> byte * 8);
    }
}

}  // namespace fusewright
