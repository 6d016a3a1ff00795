// Arithmetic, conversions and loads that CUDA has and C++ has not, by CUDA's names.
// + - * / sqrt and fma are IEEE in both places; the transcendental functions are the host's.
#pragma once
#include "api.hpp"

// ---- Exactly rounded arithmetic (this unit is compiled with -ffp-contract=off) -----------------------------------
__forceinline__ float __fadd_rn(float a, float b) { return a + b; }
__forceinline__ float __fsub_rn(float a, float b) { return a - b; }
__forceinline__ float __fmul_rn(float a, float b) { return a * b; }
__forceinline__ float __fdiv_rn(float a, float b) { return a / b; }
__forceinline__ float __frcp_rn(float a) { return 1.0f / a; }
__forceinline__ float __fsqrt_rn(float a) { return __builtin_sqrtf(a); }
__forceinline__ float __fmaf_rn(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
__forceinline__ double __dadd_rn(double a, double b) { return a + b; }
__forceinline__ double __dsub_rn(double a, double b) { return a - b; }
__forceinline__ double __dmul_rn(double a, double b) { return a * b; }
__forceinline__ double __ddiv_rn(double a, double b) { return a / b; }
__forceinline__ double __drcp_rn(double a) { return 1.0 / a; }
__forceinline__ double __dsqrt_rn(double a) { return __builtin_sqrt(a); }
__forceinline__ double __fma_rn(double a, double b, double c) { return __builtin_fma(a, b, c); }
__forceinline__ float __saturatef(float a) { return a > 0.0f ? (a < 1.0f ? a : 1.0f) : 0.0f; }  // NaN gives 0

// ---- Approximations: the host's accurate functions ----------------------------------------------------------------
__forceinline__ float __fdividef(float a, float b) { return a / b; }
__forceinline__ float __expf(float a) { return expf(a); }
__forceinline__ float __exp10f(float a) { return exp10f(a); }
__forceinline__ float __logf(float a) { return logf(a); }
__forceinline__ float __log2f(float a) { return log2f(a); }
__forceinline__ float __log10f(float a) { return log10f(a); }
__forceinline__ float __sinf(float a) { return sinf(a); }
__forceinline__ float __cosf(float a) { return cosf(a); }
__forceinline__ float __tanf(float a) { return tanf(a); }
__forceinline__ float __powf(float a, float b) { return powf(a, b); }

// ---- Functions that the C library lacks, or has only of late (hence the macros) -----------------------------------
namespace fusewright_simulator {
inline double rsqrt(double a) { return 1.0 / __builtin_sqrt(a); }
inline float rsqrtf(float a) { return static_cast<float>(1.0 / __builtin_sqrt(static_cast<double>(a))); }
inline double rcbrt(double a) { return 1.0 / ::cbrt(a); }
inline float rcbrtf(float a) { return static_cast<float>(1.0 / ::cbrt(static_cast<double>(a))); }
inline double sinpi(double a) { return ::sin(::remainder(a, 2.0) * 3.14159265358979323846); }
inline double cospi(double a) { return ::cos(::remainder(a, 2.0) * 3.14159265358979323846); }
inline float sinpif(float a) { return static_cast<float>(sinpi(static_cast<double>(a))); }
inline float cospif(float a) { return static_cast<float>(cospi(static_cast<double>(a))); }
inline double normcdf(double a) { return 0.5 * ::erfc(-a * 0.70710678118654752440); }
inline float normcdff(float a) { return static_cast<float>(normcdf(static_cast<double>(a))); }
inline double erfcx(double a) {  // exp(a²) · erfc(a), and its asymptotic series where exp would overflow
    const long double x = a, z = 1 / (2 * x * x);
    if (!(x > 100)) return static_cast<double>(expl(x * x) * erfcl(x));
    return static_cast<double>((1 - z * (1 - 3 * z * (1 - 5 * z))) / (x * 1.77245385090551602730L));
}
// The positive root of erfc(y) = c, for 0 < c <= 1, by Halley's method on Winitzki's approximation. The residual is
// taken from erf where c is near 1, and so given as s = 1 - c.
inline long double inverse_erfc(long double c, long double s) {
    const long double w = logl(c * (1 + s)), t = 2 / (3.14159265358979323846L * 0.147L) + w / 2;
    long double y = sqrtl(sqrtl(t * t - w / 0.147L) - t);
    for (int i = 0; i < 4; ++i) {
        const long double residual = s < 0.5L ? erfl(y) - s : c - erfcl(y);
        const long double step = residual / (1.12837916709551257390L * expl(-y * y));
        y -= step / (1 + y * step);
    }
    return y;
}
inline double erfinv(double a) {
    const double size = ::fabs(a);
    if (!(size < 1)) return size == 1 ? a * HUGE_VAL : NAN;
    return size == 0 ? a : ::copysign(static_cast<double>(inverse_erfc(1 - static_cast<long double>(size), size)), a);
}
inline double normcdfinv(double a) {
    if (!(a > 0 && a < 1)) return a == 0 ? -HUGE_VAL : a == 1 ? HUGE_VAL : NAN;
    const long double c = a < 0.5 ? 2 * static_cast<long double>(a) : 2 * (1 - static_cast<long double>(a));
    if (c == 1) return 0;
    const double size = static_cast<double>(1.41421356237309504880L * inverse_erfc(c, 1 - c));
    return a < 0.5 ? -size : size;
}
// Of a NaN and a number the number, of -0 and 0 the smaller; the C library's give NaN for one that signals.
template <class T> T smaller(T a, T b) {
    if (a != a || b != b) return a != a ? b : a;
    return a < b || (a == b && __builtin_signbit(a)) ? a : b;
}
template <class T> T larger(T a, T b) {
    if (a != a || b != b) return a != a ? b : a;
    return a > b || (a == b && !__builtin_signbit(a)) ? a : b;
}
template <class A, class B> using Promoted = decltype(::fmin(A(), B()));
template <class A, class B> auto fmin(A a, B b) { return smaller<Promoted<A, B>>(a, b); }
template <class A, class B> auto fmax(A a, B b) { return larger<Promoted<A, B>>(a, b); }
inline float fminf(float a, float b) { return smaller(a, b); }
inline float fmaxf(float a, float b) { return larger(a, b); }
inline float erfcxf(float a) { return static_cast<float>(erfcx(static_cast<double>(a))); }
inline float erfinvf(float a) { return static_cast<float>(erfinv(static_cast<double>(a))); }
inline float normcdfinvf(float a) { return static_cast<float>(normcdfinv(static_cast<double>(a))); }
}  // namespace fusewright_simulator
#define fmin ::fusewright_simulator::fmin
#define fmax ::fusewright_simulator::fmax
#define fminf ::fusewright_simulator::fminf
#define fmaxf ::fusewright_simulator::fmaxf
#define erfcx ::fusewright_simulator::erfcx
#define erfcxf ::fusewright_simulator::erfcxf
#define erfinv ::fusewright_simulator::erfinv
#define erfinvf ::fusewright_simulator::erfinvf
#define normcdfinv ::fusewright_simulator::normcdfinv
#define normcdfinvf ::fusewright_simulator::normcdfinvf
#define rsqrt ::fusewright_simulator::rsqrt
#define rsqrtf ::fusewright_simulator::rsqrtf
#define rcbrt ::fusewright_simulator::rcbrt
#define rcbrtf ::fusewright_simulator::rcbrtf
#define sinpi ::fusewright_simulator::sinpi
#define sinpif ::fusewright_simulator::sinpif
#define cospi ::fusewright_simulator::cospi
#define cospif ::fusewright_simulator::cospif
#define normcdf ::fusewright_simulator::normcdf
#define normcdff ::fusewright_simulator::normcdff

// CUDA has min and max for every pair of arithmetic types; for floating point they are fmin and fmax.
template <class A, class B> __forceinline__ constexpr auto min(A a, B b) {
    using T = std::common_type_t<A, B>;
    if constexpr (std::is_floating_point_v<T>)
        return fusewright_simulator::smaller<T>(a, b);
    else
        return T(a) < T(b) ? T(a) : T(b);
}
template <class A, class B> __forceinline__ constexpr auto max(A a, B b) {
    using T = std::common_type_t<A, B>;
    if constexpr (std::is_floating_point_v<T>)
        return fusewright_simulator::larger<T>(a, b);
    else
        return T(a) > T(b) ? T(a) : T(b);
}

// ---- Bits ---------------------------------------------------------------------------------------------------------
__forceinline__ int __float_as_int(float a) { return fusewright_simulator::bit_copy<int>(a); }
__forceinline__ unsigned __float_as_uint(float a) { return fusewright_simulator::bit_copy<unsigned>(a); }
__forceinline__ float __int_as_float(int a) { return fusewright_simulator::bit_copy<float>(a); }
__forceinline__ float __uint_as_float(unsigned a) { return fusewright_simulator::bit_copy<float>(a); }
__forceinline__ long long __double_as_longlong(double a) { return fusewright_simulator::bit_copy<long long>(a); }
__forceinline__ double __longlong_as_double(long long a) { return fusewright_simulator::bit_copy<double>(a); }
__forceinline__ int __popc(unsigned a) { return __builtin_popcount(a); }
__forceinline__ int __popcll(unsigned long long a) { return __builtin_popcountll(a); }
__forceinline__ int __clz(int a) { return a ? __builtin_clz(static_cast<unsigned>(a)) : 32; }
__forceinline__ int __clzll(long long a) { return a ? __builtin_clzll(static_cast<unsigned long long>(a)) : 64; }
__forceinline__ int __ffs(int a) { return __builtin_ffs(a); }
__forceinline__ int __ffsll(long long a) { return __builtin_ffsll(a); }
__forceinline__ unsigned __brev(unsigned a) {
    unsigned reversed = 0;
    for (int i = 0; i < 32; ++i) reversed |= (a >> i & 1) << (31 - i);
    return reversed;
}
__forceinline__ unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
    const uint64_t bytes = uint64_t(b) << 32 | a;
    unsigned result = 0;
    for (int i = 0; i < 4; ++i) result |= static_cast<unsigned>(bytes >> (selector >> 4 * i & 7) * 8 & 255) << 8 * i;
    return result;
}
__forceinline__ unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>(uint64_t(a) * b >> 32); }
__forceinline__ int __mulhi(int a, int b) { return static_cast<int>(int64_t(a) * b >> 32); }
__forceinline__ unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
    return static_cast<unsigned long long>(static_cast<unsigned __int128>(a) * b >> 64);
}

// ---- Conversions: out of range saturates, NaN gives 0 (of the lowest value for 64 bits) ---------------------------
namespace fusewright_simulator {
template <class To, class From> inline To saturate(From rounded) {
    if (rounded != rounded) return sizeof(To) == 8 ? To(To(1) << 63) : To(0);
    // 2^(bits) is exact in From; the largest To is not.
    constexpr int kBits = static_cast<int>(8 * sizeof(To)) - std::is_signed_v<To>;
    const From limit = std::ldexp(From(1), kBits);
    if (rounded >= limit) return static_cast<To>(~(std::is_signed_v<To> ? To(To(1) << kBits) : To(0)));
    if (std::is_signed_v<To> ? rounded < -limit : rounded < 0)
        return std::is_signed_v<To> ? To(To(1) << kBits % (8 * sizeof(To))) : To(0);
    return static_cast<To>(rounded);
}
}  // namespace fusewright_simulator
#define FUSEWRIGHT_CONVERT(NAME, FROM, TO)                                                                        \
    __forceinline__ TO NAME##_rn(FROM a) { return fusewright_simulator::saturate<TO>(std::nearbyint(a)); }         \
    __forceinline__ TO NAME##_rz(FROM a) { return fusewright_simulator::saturate<TO>(std::trunc(a)); }             \
    __forceinline__ TO NAME##_ru(FROM a) { return fusewright_simulator::saturate<TO>(std::ceil(a)); }              \
    __forceinline__ TO NAME##_rd(FROM a) { return fusewright_simulator::saturate<TO>(std::floor(a)); }
FUSEWRIGHT_CONVERT(__float2int, float, int)
FUSEWRIGHT_CONVERT(__float2uint, float, unsigned)
FUSEWRIGHT_CONVERT(__float2ll, float, long long)
FUSEWRIGHT_CONVERT(__float2ull, float, unsigned long long)
FUSEWRIGHT_CONVERT(__double2int, double, int)
FUSEWRIGHT_CONVERT(__double2uint, double, unsigned)
FUSEWRIGHT_CONVERT(__double2ll, double, long long)
FUSEWRIGHT_CONVERT(__double2ull, double, unsigned long long)
#undef FUSEWRIGHT_CONVERT
__forceinline__ float __double2float_rn(double a) { return static_cast<float>(a); }
__forceinline__ float __int2float_rn(int a) { return static_cast<float>(a); }
__forceinline__ float __uint2float_rn(unsigned a) { return static_cast<float>(a); }
__forceinline__ float __ll2float_rn(long long a) { return static_cast<float>(a); }
__forceinline__ double __int2double_rn(int a) { return a; }

// ---- Loads and stores with a cache hint ---------------------------------------------------------------------------
#define FUSEWRIGHT_LOAD(NAME) \
    template <class T> __forceinline__ T NAME(const T* pointer) { return *pointer; }
FUSEWRIGHT_LOAD(__ldg)
FUSEWRIGHT_LOAD(__ldca)
FUSEWRIGHT_LOAD(__ldcg)
FUSEWRIGHT_LOAD(__ldcs)
FUSEWRIGHT_LOAD(__ldcv)
FUSEWRIGHT_LOAD(__ldlu)
#undef FUSEWRIGHT_LOAD
#define FUSEWRIGHT_STORE(NAME) \
    template <class T> __forceinline__ void NAME(T* pointer, T value) { *pointer = value; }
FUSEWRIGHT_STORE(__stcg)
FUSEWRIGHT_STORE(__stcs)
FUSEWRIGHT_STORE(__stwb)
FUSEWRIGHT_STORE(__stwt)
#undef FUSEWRIGHT_STORE

// ---- Half precision: what CUDA's headers declare for the device only ----------------------------------------------
// Exact in double and rounded once: a product has 22 significant bits, so its sum with a half only rounds twice where
// the parts lie more than 2^30 apart, and there the odd-rounded sum keeps the direction.
namespace fusewright_simulator {
inline double fma_odd(double a, double b, double c) {
    const double product = a * b, sum = product + c;  // the product of two halves or bfloat16s is exact
    const double part = sum - product, lost = (product - (sum - part)) + (c - part);
    int64_t bits = bit_copy<int64_t>(sum);
    if (lost != 0 && !(bits & 1) && std::isfinite(sum)) bits += ((lost > 0) == (sum > 0)) ? 1 : -1;
    return bit_copy<double>(bits);
}
}  // namespace fusewright_simulator
__forceinline__ __half __hfma(__half a, __half b, __half c) {
    return __double2half(fusewright_simulator::fma_odd(__half2float(a), __half2float(b), __half2float(c)));
}
__forceinline__ __nv_bfloat16 __hfma(__nv_bfloat16 a, __nv_bfloat16 b, __nv_bfloat16 c) {
    return __double2bfloat16(
        fusewright_simulator::fma_odd(__bfloat162float(a), __bfloat162float(b), __bfloat162float(c)));
}
__forceinline__ __half2 __hfma2(__half2 a, __half2 b, __half2 c) {
    return {__hfma(a.x, b.x, c.x), __hfma(a.y, b.y, c.y)};
}
__forceinline__ __nv_bfloat162 __hfma2(__nv_bfloat162 a, __nv_bfloat162 b, __nv_bfloat162 c) {
    return {__hfma(a.x, b.x, c.x), __hfma(a.y, b.y, c.y)};
}
