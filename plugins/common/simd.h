// Vectors of FP32 for the CPU kernels: the compiler's own vector types, so that one source serves AVX2, AVX-512,
// NEON and anything else. A file that includes this sets XLSTM_LANES and is compiled for one instruction set;
// everything here is local to it (anonymous namespace), because other files are compiled for others.
//
// Functions of a vector are within 2.5 units in the last place over the whole range of FP32, denormals included
// (tests/plugins/test_simd.py). Coefficients are minimax fits over the reduced range.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#ifndef XLSTM_LANES
#error "set XLSTM_LANES to the floats in a vector register"
#endif

namespace xlstm {
namespace {

constexpr int kLanes = XLSTM_LANES;
typedef float Vec __attribute__((vector_size(4 * XLSTM_LANES)));
typedef int32_t IntVec __attribute__((vector_size(4 * XLSTM_LANES)));

inline Vec load(const float *from) {
    Vec value;
    std::memcpy(&value, from, sizeof value);
    return value;
}

inline void store(float *to, Vec value) { std::memcpy(to, &value, sizeof value); }

inline Vec all(float value) { return value - Vec{}; }

// The first `count` lanes; the others are zero, and memory behind them is not touched.
inline Vec load_some(const float *from, size_t count) {
    Vec value{};
    std::memcpy(&value, from, count * sizeof(float));
    return value;
}

inline void store_some(float *to, Vec value, size_t count) { std::memcpy(to, &value, count * sizeof(float)); }

inline Vec max(Vec a, Vec b) { return a > b ? a : b; }
inline Vec min(Vec a, Vec b) { return a < b ? a : b; }

inline Vec absolute(Vec x) { return (Vec)((IntVec)x & 0x7fffffff); }

inline float sum(Vec x) {
    float total = 0;
    for (int lane = 0; lane < kLanes; ++lane) total += x[lane];
    return total;
}

inline float maximum(Vec x) {
    float largest = x[0];
    for (int lane = 1; lane < kLanes; ++lane) largest = x[lane] > largest ? x[lane] : largest;
    return largest;
}

// 2^exponent for -126 … 127
inline Vec power_of_two(IntVec exponent) { return (Vec)((exponent + 127) << 23); }

inline Vec exp(Vec x) {
    x = min(max(x, all(-110.f)), all(90.f));  // zero and infinity come out by themselves
    const Vec magic = all(12582912.f);        // 1.5 * 2^23: adding it rounds to an integer
    const Vec shifted = x * 1.44269504f + magic;
    const Vec n = shifted - magic;
    Vec r = x - n * 0.693359375f;  // ln 2 in two parts, the first exact in the product
    r = r - n * -2.12194440e-4f;
    Vec p = all(1.381453454e-03f);
    p = p * r + 8.368745680e-03f;
    p = p * r + 4.166839090e-02f;
    p = p * r + 1.666652039e-01f;
    p = p * r + 4.999999343e-01f;
    p = p * (r * r) + r + 1.f;
    // In two factors, because 2^n alone may be no normal number.
    const IntVec exponent = (IntVec)shifted - (IntVec)magic;
    const IntVec half = exponent >> 1;
    return p * power_of_two(half) * power_of_two(exponent - half);
}

// log(1 + u) for 0 <= u <= 1
inline Vec log1p_unit(Vec u) {
    const Vec s = u / (u + 2.f);
    const Vec t = s * s;
    Vec p = all(2.803129239e-01f);
    p = p * t + 2.799785904e-01f;
    p = p * t + 4.002177028e-01f;
    p = p * t + 6.666641204e-01f;
    return s * 2.f + s * (p * t);
}

// log(sigmoid(x)) = min(x, 0) - log(1 + exp(-|x|))
inline Vec log_sigmoid(Vec x) { return min(x, Vec{}) - log1p_unit(exp(-absolute(x))); }

inline Vec sigmoid(Vec x) { return 1.f / (1.f + exp(-x)); }

inline Vec tanh(Vec x) {
    const Vec size = absolute(x);
    const Vec t = x * x;
    Vec p = all(-5.717021537e-03f);
    p = p * t + 2.065056430e-02f;
    p = p * t + -5.374349024e-02f;
    p = p * t + 1.333149118e-01f;
    p = p * t + -3.333328392e-01f;
    const Vec near = x + x * (p * t);
    const Vec far = 1.f - 2.f / (exp(size + size) + 1.f);
    const Vec signed_far = (Vec)((IntVec)far | ((IntVec)x & (int32_t)0x80000000));
    return size < 0.625f ? near : signed_far;
}

}  // namespace
}  // namespace xlstm
