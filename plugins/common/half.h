// 16-bit floats as they are stored, and conversions that round to nearest, ties to even.
//
// On a GPU the conversions are its instructions; elsewhere arithmetic on bits, so that no CUDA header is needed.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define XLSTM_ANYWHERE __host__ __device__ __forceinline__
#else
#define XLSTM_ANYWHERE inline
#endif

namespace xlstm {

struct f16 {
    uint16_t bits;  // IEEE binary16: 1 sign, 5 exponent, 10 fraction
};

struct bf16 {
    uint16_t bits;  // the upper half of a binary32
};

XLSTM_ANYWHERE float float_of_bits(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

XLSTM_ANYWHERE uint32_t bits_of_float(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

XLSTM_ANYWHERE float to_float(float x) { return x; }
XLSTM_ANYWHERE float to_float(int8_t x) { return static_cast<float>(x); }
XLSTM_ANYWHERE float to_float(bf16 x) { return float_of_bits(uint32_t(x.bits) << 16); }

XLSTM_ANYWHERE float to_float(f16 x) {
#ifdef __CUDA_ARCH__
    return __half2float(__ushort_as_half(x.bits));
#else
    const uint32_t sign = uint32_t(x.bits & 0x8000u) << 16, rest = x.bits & 0x7fffu;
    if (rest >= 0x7c00u) return float_of_bits(sign | 0x7f800000u | (rest & 0x3ffu) << 13);  // infinity, NaN
    if (rest >= 0x0400u) return float_of_bits(sign | ((rest << 13) + (112u << 23)));
    const float size = float(rest) * 0x1p-24f;  // denormal: units of 2^-24
    return sign ? -size : size;
#endif
}

XLSTM_ANYWHERE f16 to_f16(float x) {
#ifdef __CUDA_ARCH__
    return {__half_as_ushort(__float2half_rn(x))};
#else
    const uint32_t bits = bits_of_float(x), sign = bits >> 16 & 0x8000u, rest = bits & 0x7fffffffu;
    uint32_t half;
    if (rest > 0x7f800000u) {
        half = 0x7e00u | (rest >> 13 & 0x3ffu);  // NaN, made quiet
    } else if (rest >= 0x477ff000u) {
        half = 0x7c00u;  // 65520, halfway to 2^16, and above
    } else if (rest >= 0x38800000u) {
        half = (rest - (112u << 23) + 0xfffu + (rest >> 13 & 1u)) >> 13;
    } else {
        // Adding 0.5, whose last bit is 2^-24, makes the addition round to the denormal's unit.
        half = bits_of_float(float_of_bits(rest) + 0.5f) - 0x3f000000u;
    }
    return {static_cast<uint16_t>(sign | half)};
#endif
}

XLSTM_ANYWHERE bf16 to_bf16(float x) {
#ifdef __CUDA_ARCH__
    return {__bfloat16_as_ushort(__float2bfloat16_rn(x))};
#else
    const uint32_t bits = bits_of_float(x);
    if ((bits & 0x7fffffffu) > 0x7f800000u)
        return {static_cast<uint16_t>(bits >> 16 | 0x40u)};  // NaN, made quiet
    return {static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
#endif
}

template <class T>
XLSTM_ANYWHERE T from_float(float x);
template <>
XLSTM_ANYWHERE float from_float<float>(float x) {
    return x;
}
template <>
XLSTM_ANYWHERE f16 from_float<f16>(float x) {
    return to_f16(x);
}
template <>
XLSTM_ANYWHERE bf16 from_float<bf16>(float x) {
    return to_bf16(x);
}

}  // namespace xlstm
