// What the tests of the kernels share: random numbers, number formats, and sums in float64 with bounds for their errors.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <random>

#include "ops.h"

using namespace moebius;

namespace {

std::mt19937 generator(0);
const char* level = "";

int uniform(int low, int high) { return std::uniform_int_distribution<int>(low, high)(generator); }
double normal() { return std::normal_distribution<double>()(generator); }
template <class T> T one_of(std::initializer_list<T> values) { return values.begin()[uniform(0, int(values.size()) - 1)]; }

__attribute__((format(printf, 2, 3))) void check(bool right, const char* what, ...) {
    if (right) return;
    va_list arguments;
    va_start(arguments, what);
    std::fprintf(stderr, "%s: ", level);
    std::vfprintf(stderr, what, arguments);
    std::fputc('\n', stderr);
    std::exit(1);
}

struct f16 {
    uint16_t bits;
};

template <class T> struct Number;
template <> struct Number<float> {
    static constexpr Dtype dtype = F32;
    static constexpr Format format = F32_MATRIX;
    static constexpr double roundoff = 0x1p-24;
    static double value(float x) { return x; }
    static float make(double x) { return float(x); }
};
template <> struct Number<uint16_t> {
    static constexpr Dtype dtype = BF16;
    static constexpr Format format = BF16_MATRIX;
    static constexpr double roundoff = 0x1p-8;
    static double value(uint16_t x) {
        uint32_t bits = uint32_t(x) << 16;
        float f;
        std::memcpy(&f, &bits, 4);
        return f;
    }
    static uint16_t make(double x) {  // cut off: any representable value will do
        float f = float(x);
        uint32_t bits;
        std::memcpy(&bits, &f, 4);
        return uint16_t(bits >> 16);
    }
};
template <> struct Number<f16> {  // of weights alone
    static constexpr Format format = F16_MATRIX;
    static double value(f16 x) {
        const int exponent = x.bits >> 10 & 31, mantissa = x.bits & 1023;
        const double size = exponent == 31 ? (mantissa ? NAN : INFINITY) : std::ldexp(exponent ? 1024 + mantissa : mantissa, std::max(exponent, 1) - 25);
        return x.bits >> 15 ? -size : size;
    }
    // Cut off to ten bits behind the first, below 2^-14 to multiples of 2^-24; |x| < 65504.
    static f16 make(double x) {
        int exponent;
        std::frexp(x, &exponent);
        const double unit = std::ldexp(1, std::max(exponent - 11, -24));
        const int multiple = int(std::abs(x) / unit);
        const int bits = multiple < 1024 ? multiple : (exponent + 14) << 10 | (multiple & 1023);
        return {uint16_t(bits | (x < 0 ? 0x8000 : 0))};
    }
};
template <class T> double value(T x) { return Number<T>::value(x); }

template <class T> std::vector<T> draw(size_t n, double scale = 1) {
    std::vector<T> values(n);
    for (T& x : values) x = Number<T>::make(scale * normal());
    return values;
}

// |got - exact| <= bound, and a result that is not finite only where the exact one is not.
template <class T> void close(const char* what, T got, double exact, double bound) {
    check(std::abs(value(got) - exact) <= bound, "%s: %.9g instead of %.9g, bound %.3g", what, value(got), exact, bound);
}

// A float32 sum of n terms, `terms` in absolute values, rounded to T.
template <class T> double sum_bound(double exact, double terms, int n) {
    double summed = (n / 16.0 + 8) * 0x1p-24 * terms;
    return Number<T>::roundoff * (std::abs(exact) + summed) + summed;
}

struct Sum {
    double exact = 0, terms = 0;
    void add(double x) { exact += x, terms += std::abs(x); }
};

template <class T, class W> Sum dot(const T* a, const W* b, int n) {
    Sum s;
    for (int i = 0; i < n; i++) s.add(value(a[i]) * value(b[i]));
    return s;
}

template <class T> double inverse_rms(const T* x, int n, double eps) { return 1 / std::sqrt(dot(x, x, n).exact / n + eps); }

}  // namespace
