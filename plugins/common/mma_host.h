// The instructions of mma.cuh on a CPU, for the emulated build (host/README.md).
//
// As on a GPU, and so that tests find what a GPU would find: products are added in groups, each addend cut off
// below the largest one (`aligned_sum`); an asynchronous copy arrives only when its group is waited for, and until
// then its target holds NaNs.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <deque>
#include <vector>

#include "common/half.h"
#include "common/launch.h"

namespace xlstm {

namespace host {

// The float next to x in the direction of zero.
inline float truncated(double x) {
    const float near = static_cast<float>(x);
    const bool away = std::abs(static_cast<double>(near)) > std::abs(x) && std::isfinite(x);
    return away ? std::nextafter(near, 0.0f) : near;
}

// Exponent of a finite number, far below all others for zero.
inline int exponent(float x) { return x == 0.0f ? -10000 : std::ilogb(x); }

// sum + the products of `count` pairs as the tensor cores of sm_80 add them (Fasi, Higham, Mikaitis, Pranesh:
// Numerical behavior of NVIDIA tensor cores, 2021): all addends are aligned to the largest exponent and keep 24
// bits and one more, the sum is exact, and then it is truncated. Exponents of products are not normalized.
inline float aligned_sum(float sum, const float *left, const float *right, const int *of_left,
                         const int *of_right, int count) {
    bool finite = std::isfinite(sum);
    int largest = exponent(finite ? sum : 0.0f);
    for (int k = 0; k < count; ++k) {
        finite = finite && std::isfinite(left[k]) && std::isfinite(right[k]);
        largest = std::max(largest, of_left[k] + of_right[k]);
    }
    if (!finite) {
        double plain = sum;
        for (int k = 0; k < count; ++k) plain += static_cast<double>(left[k]) * right[k];
        return static_cast<float>(plain);
    }
    if (largest < -1000) return 0.0f;
    const double scale = std::ldexp(1.0, 24 - largest);
    int64_t whole = static_cast<int64_t>(sum * scale);
    for (int k = 0; k < count; ++k)
        whole += static_cast<int64_t>(static_cast<double>(left[k]) * right[k] * scale);
    return truncated(std::ldexp(static_cast<double>(whole), largest - 24));
}

inline float half_value(uint32_t bits) { return to_float(f16{static_cast<uint16_t>(bits)}); }
inline float bfloat_value(uint32_t bits) { return to_float(bf16{static_cast<uint16_t>(bits)}); }
inline float tf32_value(uint32_t bits) { return float_of_bits(bits & 0xffffe000u); }

struct Fragments {
    uint32_t a[4], b[2];
    float d[4];
};

// D += A B of 16 x 8 values with a depth of 8 * packed; a register holds `packed` values.
template <int packed, class Value>
void multiply_fragments(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Value value,
                        XLSTM_HOST_SITE) {
    constexpr int depth = 8 * packed;
    Fragments mine;
    std::memcpy(mine.a, a, sizeof a);
    std::memcpy(mine.b, b, sizeof b);
    std::memcpy(mine.d, d, sizeof d);
    const auto product = [value](const Lanes &lanes) {
        float A[16][depth], B[8][depth];
        int of_A[16][depth], of_B[8][depth];  // exponents
        for (int lane = 0; lane < 32; ++lane) {
            const Fragments &from = *static_cast<const Fragments *>(lanes.in[lane]);
            const int g = lane / 4, t = lane % 4 * packed;
            for (int half = 0; half < 2; ++half) {  // of the depth
                for (int p = 0; p < packed; ++p) {
                    const int k = t + p + half * depth / 2;
                    A[g][k] = value(from.a[2 * half] >> (16 * p));
                    A[g + 8][k] = value(from.a[2 * half + 1] >> (16 * p));
                    B[g][k] = value(from.b[half] >> (16 * p));
                }
            }
        }
        for (int k = 0; k < depth; ++k) {
            for (int row = 0; row < 16; ++row) of_A[row][k] = exponent(A[row][k]);
            for (int column = 0; column < 8; ++column) of_B[column][k] = exponent(B[column][k]);
        }
        constexpr int group = 4 * packed;  // products that are added at once
        for (int lane = 0; lane < 32; ++lane) {
            const Fragments &from = *static_cast<const Fragments *>(lanes.in[lane]);
            float *const d = static_cast<float *>(lanes.out[lane]);
            for (int e = 0; e < 4; ++e) {
                const int row = lane / 4 + e / 2 * 8, column = lane % 4 * 2 + e % 2;
                d[e] = from.d[e];
                for (int k = 0; k < depth; k += group) {
                    d[e] =
                        aligned_sum(d[e], A[row] + k, B[column] + k, of_A[row] + k, of_B[column] + k, group);
                }
            }
        }
    };
    warp_collective(~0u, "a product", &mine, d, product, file, line);
}

inline void load_four(uint32_t (&r)[4], const void *row, bool transposed, const char *file, int line) {
    const auto load = [transposed](const Lanes &lanes) {
        for (int matrix = 0; matrix < 4; ++matrix) {
            uint16_t values[8][8];
            for (int x = 0; x < 8; ++x) {
                const void *const from = *static_cast<const void *const *>(lanes.in[8 * matrix + x]);
                if (reinterpret_cast<uintptr_t>(from) % 16 != 0)
                    Block::active().fail("a row of a matrix is misaligned");
                std::memcpy(values[x], from, sizeof values[x]);
            }
            for (int lane = 0; lane < 32; ++lane) {
                const int g = lane / 4, t = lane % 4 * 2;
                const uint32_t low = transposed ? values[t][g] : values[g][t];
                const uint32_t high = transposed ? values[t + 1][g] : values[g][t + 1];
                static_cast<uint32_t *>(lanes.out[lane])[matrix] = low | high << 16;
            }
        }
    };
    warp_collective(~0u, "a load of matrices", &row, r, load, file, line);
}

struct Copy {
    void *shared;
    const void *global;
    int bytes;
};

// Copies of one thread: those not yet committed, and the groups under way, oldest first.
struct Copies {
    std::vector<Copy> open;
    std::deque<std::vector<Copy>> groups;
};

}  // namespace host

inline void mma_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], XLSTM_HOST_SITE) {
    host::multiply_fragments<2>(d, a, b, host::half_value, file, line);
}

inline void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], XLSTM_HOST_SITE) {
    host::multiply_fragments<2>(d, a, b, host::bfloat_value, file, line);
}

inline void mma_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], XLSTM_HOST_SITE) {
    host::multiply_fragments<1>(d, a, b, host::tf32_value, file, line);
}

// To nearest, halves away from zero.
inline uint32_t round_tf32(float x) { return (bits_of_float(x) + 0x1000u) & 0xffffe000u; }

inline void load_matrices(uint32_t (&r)[4], const void *row, XLSTM_HOST_SITE) {
    host::load_four(r, row, false, file, line);
}

inline void load_matrices_transposed(uint32_t (&r)[4], const void *row, XLSTM_HOST_SITE) {
    host::load_four(r, row, true, file, line);
}

inline void copy_async(void *shared, const void *global, int bytes) {
    if ((reinterpret_cast<uintptr_t>(shared) | reinterpret_cast<uintptr_t>(global)) % 16 != 0)
        host::Block::active().fail("an asynchronous copy is misaligned");
    std::memset(shared, 0xff, 16);
    host::per_thread<host::Copies>().open.push_back({shared, global, bytes});
}

inline void copy_commit() {
    host::Copies &copies = host::per_thread<host::Copies>();
    copies.groups.push_back(std::move(copies.open));
    copies.open.clear();
}

template <int pending>
void copy_wait() {
    auto &groups = host::per_thread<host::Copies>().groups;
    for (; groups.size() > size_t(pending); groups.pop_front()) {
        for (const host::Copy &copy : groups.front()) {
            std::memset(copy.shared, 0, 16);
            std::memcpy(copy.shared, copy.global, size_t(copy.bytes));
        }
    }
}

inline uint32_t pack_bf16(float low, float high) {
    return to_bf16(low).bits | uint32_t(to_bf16(high).bits) << 16;
}
inline uint32_t pack_f16(float low, float high) {
    return to_f16(low).bits | uint32_t(to_f16(high).bits) << 16;
}

}  // namespace xlstm
