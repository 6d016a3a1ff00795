// Special functions that CUDA's mathematical library lacks, as ATen computes them, for float and double.
//
// The algorithms and coefficients are those of S. L. Moshier's Cephes Mathematical Library, which ATen uses too.
#pragma once
#include "scalar.cuh"

namespace fusewright::special {

template <class T> __device__ __forceinline__ T not_a_number() { return infinity<T>() - infinity<T>(); }

// The value at x of the polynomial whose coefficients are given, the highest power's first.
template <class T, int N> __device__ __forceinline__ T polynomial(T x, const T (&coefficients)[N]) {
    T sum = coefficients[0];
#pragma unroll
    for (int i = 1; i < N; ++i) sum = fma(sum, x, coefficients[i]);
    return sum;
}

// The value at x / 2 of a sum of Chebyshev polynomials, the highest one's coefficient first; half of the last counts.
// A result in float takes the last `Single` terms: the others are less than its precision. In double for it, too: the
// terms of the recurrence cancel.
template <class T, int Single, int N>
__device__ __forceinline__ T chebyshev(double x, const double (&coefficients)[N]) {
    constexpr int kFirst = sizeof(T) == sizeof(float) ? N - Single : 0;
    double b0 = coefficients[kFirst], b1 = 0.0, b2 = 0.0;
#pragma unroll
    for (int i = kFirst + 1; i < N; ++i) b2 = b1, b1 = b0, b0 = fma(x, b1, -b2) + coefficients[i];
    return T(0.5 * (b0 - b2));
}

// The logarithmic derivative of the gamma function. ±Inf at ∓0, NaN at negative integers.
template <class T> __device__ T digamma(T x) {
    if (x == T(0)) return copysign(infinity<T>(), -x);
    T result = T(0);
    if (x < T(0)) {
        if (x == trunc(x)) return not_a_number<T>();
        // Reflection. The tangent has period π, and the fraction of x is exact where π · x is not.
        const double pi = 3.14159265358979323846, fraction = double(x) - trunc(double(x));
        result = T(-pi / tan(pi * fraction));
        x = T(1) - x;
    }
    for (; x < T(10); x += T(1)) result -= T(1) / x;
    if (x == T(10)) return result + T(2.25175258906672110764);
    T series = T(0);
    if (x < T(1e17)) {
        constexpr T coefficients[] = {
            T(8.33333333333333333333E-2), T(-2.10927960927960927961E-2), T(7.57575757575757575758E-3),
            T(-4.16666666666666666667E-3), T(3.96825396825396825397E-3), T(-8.33333333333333333333E-3),
            T(8.33333333333333333333E-2)};
        const T z = T(1) / (x * x);
        series = z * polynomial(z, coefficients);
    }
    return log(x) - T(0.5) / x - series + result;
}

// The derivative of digamma.
template <class T> __device__ T trigamma(T x) {
    const T pi = T(3.14159265358979323846);
    T sign = T(1), result = T(0);
    if (x < T(0.5)) {
        sign = T(-1);
        const T sine = sin(pi * x);
        result -= (pi * pi) / (sine * sine);
        x = T(1) - x;
    }
#pragma unroll
    for (int i = 0; i < 6; ++i, x += T(1)) result += T(1) / (x * x);
    const T z = T(1) / (x * x);
    result += (T(1) + T(1) / (T(2) * x) + z * (T(1) / T(6) - z * (T(1) / T(30) - z * (T(1) / T(42))))) / x;
    return sign * result;
}

// Hurwitz's zeta function, the sum of (q + k)^-x over k = 0, 1, …, by the Euler-Maclaurin formula. In double
// also for float: where q is negative, terms of both signs cancel.
template <class T> __device__ T zeta(T order, T argument) {
    const double x = order, q = argument;
    if (x == 1.0) return infinity<T>();
    if (x < 1.0) return not_a_number<T>();
    if (q <= 0.0) {
        if (q == floor(q)) return infinity<T>();
        if (x != floor(x)) return not_a_number<T>();
    }
    const double precision = 1.11022302462515654042E-16;
    double sum = pow(q, -x), term = 0.0, at = q;
    for (int i = 0; i < 9 || at <= 9.0; ++i) {
        at += 1.0;
        term = pow(at, -x);
        sum += term;
        if (-precision * sum < term && term < precision * sum) return T(sum);
    }
    constexpr double numbers[] = {  // (2k)! / B2k, with Bernoulli's numbers
        12.0, -720.0, 30240.0, -1209600.0, 47900160.0, -1.8924375803183791606e9, 7.47242496e10,
        -2.950130727918164224e12, 1.1646782814350067249e14, -4.5979787224074726105e15,
        1.8152105401943546773e17, -7.1661652561756670113e18};
    sum += term * at / (x - 1.0);
    sum -= 0.5 * term;
    double factor = 1.0, k = 0.0;
    for (int i = 0; i < 12; ++i, k += 1.0) {
        factor *= x + k;
        term /= at;
        const double correction = factor * term / numbers[i];
        sum += correction;
        if (fabs(correction / sum) < precision) return T(sum);
        k += 1.0;
        factor *= x + k;
        term /= at;
    }
    return T(sum);
}

// The modified Bessel functions of the first kind, of orders 0 and 1, divided by exp |x|.
template <class T> __device__ T i0e(T x) {
    constexpr double near[] = {
        -4.41534164647933937950E-18, 3.33079451882223809783E-17, -2.43127984654795469359E-16,
        1.71539128555513303061E-15, -1.16853328779934516808E-14, 7.67618549860493561688E-14,
        -4.85644678311192946090E-13, 2.95505266312963983461E-12, -1.72682629144155570723E-11,
        9.67580903537323691224E-11, -5.18979560163526290666E-10, 2.65982372468238665035E-9,
        -1.30002500998624804212E-8, 6.04699502254191894932E-8, -2.67079385394061173391E-7,
        1.11738753912010371815E-6, -4.41673835845875056359E-6, 1.64484480707288970893E-5,
        -5.75419501008210370398E-5, 1.88502885095841655729E-4, -5.76375574538582365885E-4,
        1.63947561694133579842E-3, -4.32430999505057594430E-3, 1.05464603945949983183E-2,
        -2.37374148058994688156E-2, 4.93052842396707084878E-2, -9.49010970480476444210E-2,
        1.71620901522208775349E-1, -3.04682672343198398683E-1, 6.76795274409476084995E-1};
    constexpr double far[] = {
        -7.23318048787475395456E-18, -4.83050448594418207126E-18, 4.46562142029675999901E-17,
        3.46122286769746109310E-17, -2.82762398051658348494E-16, -3.42548561967721913462E-16,
        1.77256013305652638360E-15, 3.81168066935262242075E-15, -9.55484669882830764870E-15,
        -4.15056934728722208663E-14, 1.54008621752140982691E-14, 3.85277838274214270114E-13,
        7.18012445138366623367E-13, -1.79417853150680611778E-12, -1.32158118404477131188E-11,
        -3.14991652796324136454E-11, 1.18891471078464383424E-11, 4.94060238822496958910E-10,
        3.39623202570838634515E-9, 2.26666899049817806459E-8, 2.04891858946906374183E-7,
        2.89137052083475648297E-6, 6.88975834691682398426E-5, 3.36911647825569408990E-3,
        8.04490411014108831608E-1};
    x = absolute(x);
    return x <= T(8) ? chebyshev<T, 18>(x / 2.0 - 2.0, near) : chebyshev<T, 7>(T(32) / x - 2.0, far) / sqrt(x);
}
template <class T> __device__ T i1e(T argument) {
    constexpr double near[] = {
        2.77791411276104639959E-18, -2.11142121435816608115E-17, 1.55363195773620046921E-16,
        -1.10559694773538630805E-15, 7.60068429473540693410E-15, -5.04218550472791168711E-14,
        3.22379336594557470981E-13, -1.98397439776494371520E-12, 1.17361862988909016308E-11,
        -6.66348972350202774223E-11, 3.62559028155211703701E-10, -1.88724975172282928790E-9,
        9.38153738649577178388E-9, -4.44505912879632808065E-8, 2.00329475355213526229E-7,
        -8.56872026469545474066E-7, 3.47025130813767847674E-6, -1.32731636560394358279E-5,
        4.78156510755005422638E-5, -1.61760815825896745588E-4, 5.12285956168575772895E-4,
        -1.51357245063125314899E-3, 4.15642294431288815669E-3, -1.05640848946261981558E-2,
        2.47264490306265168283E-2, -5.29459812080949914269E-2, 1.02643658689847095384E-1,
        -1.76416518357834055153E-1, 2.52587186443633654823E-1};
    constexpr double far[] = {
        7.51729631084210481353E-18, 4.41434832307170791151E-18, -4.65030536848935832153E-17,
        -3.20952592199342395980E-17, 2.96262899764595013876E-16, 3.30820231092092828324E-16,
        -1.88035477551078244854E-15, -3.81440307243700780478E-15, 1.04202769841288027642E-14,
        4.27244001671195135429E-14, -2.10154184277266431302E-14, -4.08355111109219731823E-13,
        -7.19855177624590851209E-13, 2.03562854414708950722E-12, 1.41258074366137813316E-11,
        3.25260358301548823856E-11, -1.89749581235054123450E-11, -5.58974346219658380687E-10,
        -3.83538038596423702205E-9, -2.63146884688951950684E-8, -2.51223623787020892529E-7,
        -3.88256480887769039346E-6, -1.10588938762623716291E-4, -9.76109749136146840777E-3,
        7.78576235018280120474E-1};
    const T x = absolute(argument);
    const T value =
        x <= T(8) ? chebyshev<T, 17>(x / 2.0 - 2.0, near) * x : chebyshev<T, 7>(T(32) / x - 2.0, far) / sqrt(x);
    return argument < T(0) ? -value : value;
}
template <class T> __device__ T i0(T x) { return exp(absolute(x)) * i0e(x); }
template <class T> __device__ T i1(T x) { return exp(absolute(x)) * i1e(x); }

// The polynomial of degree n of a family that begins with 1 and `first`; step(k, p, q) is the one after p and q, whose
// degree is k. Where it is not a number, it stays none.
template <class T, class Step> __device__ __forceinline__ T orthogonal(int64_t n, T first, const Step& step) {
    if (n < 1) return n < 0 ? T(0) : T(1);
    T p = T(1), q = first;
    for (int64_t k = 1; k < n && q == q; ++k) {
        const T next = step(T(k), p, q);
        p = q;
        q = next;
    }
    return q;
}

// Chebyshev's polynomials of four kinds, by their trigonometric forms where the degree is high.
template <char Kind, class T> __device__ T chebyshev_polynomial(T x, T degree) {
    const int64_t n = int64_t(degree);
    const T sign = n % 2 ? T(-1) : T(1), next = T(n) + T(1), odd = T(n) + next;
    if (n >= 0 && absolute(x) == T(1)) {
        if (x > T(0)) return Kind == 'u' ? next : Kind == 'w' ? odd : T(1);
        return sign * (Kind == 'u' ? next : Kind == 'v' ? odd : T(1));
    }
    if (n > (Kind == 't' ? 6 : 8) && absolute(x) < T(1)) {
        const T angle = acos(x), half = angle / T(2), between = (T(n) + T(0.5)) * angle;
        if (Kind == 't') return cos(T(n) * angle);
        if (Kind == 'u') return sin(angle) != T(0) ? sin(next * angle) / sin(angle) : next * cos(next * angle) / x;
        if (Kind == 'v') return sin(half) != T(1) ? cos(between) / cos(half) : sign * odd;
        return cos(half) != T(1) ? sin(between) / sin(half) : x > T(0) ? odd : sign;
    }
    const T first = Kind == 't' ? x : x + x + (Kind == 'v' ? T(-1) : Kind == 'w' ? T(1) : T(0));
    return orthogonal(n, first, [x](T, T p, T q) { return fma(x + x, q, -p); });
}

// Hermite's polynomials, the physicists' and the probabilists'; NaN beyond the degrees that T has.
template <class T> constexpr int64_t kHighestHermite = sizeof(T) == sizeof(float) ? 128 : 512;
template <class T> __device__ T hermite_h(T x, T degree) {
    if (int64_t(degree) > kHighestHermite<T>) return not_a_number<T>();
    return orthogonal(int64_t(degree), x + x, [x](T k, T p, T q) { return fma(x + x, q, -(k + k) * p); });
}
template <class T> __device__ T hermite_he(T x, T degree) {
    if (int64_t(degree) > kHighestHermite<T>) return not_a_number<T>();
    return orthogonal(int64_t(degree), x, [x](T k, T p, T q) { return fma(x, q, -k * p); });
}
template <class T> __device__ T laguerre(T x, T degree) {
    if (x == T(0) && degree > T(-1)) return T(1);
    return orthogonal(int64_t(degree), T(1) - x,
                      [x](T k, T p, T q) { return fma(k + k + (T(1) - x), q, -k * p) / (k + T(1)); });
}
template <class T> __device__ T legendre(T x, T degree) {
    const int64_t n = int64_t(degree);
    if (n >= 0 && absolute(x) == T(1)) return x > T(0) || n % 2 == 0 ? T(1) : T(-1);
    return orthogonal(n, x, [x](T k, T p, T q) { return fma((k + k + T(1)) * x, q, -k * p) / (k + T(1)); });
}

}  // namespace fusewright::special
