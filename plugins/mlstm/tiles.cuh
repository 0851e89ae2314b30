// Tiles of 16-bit values in shared memory, and products of them on tensor cores.
//
// A value is a sum of pieces, largest first, in as many planes of shared memory as its precision needs. As
// bfloat16 pieces, bfloat16 itself is one, FP16 two, FP32 three; they have the exponents of FP32, so nothing
// overflows or vanishes whatever the scale of the operands. FP16 pieces hold more digits, but their operands have
// to be scaled. A product of sums is as exact as the products of pieces taken into it (README.md, "Precision").
#pragma once

#include "common/half.h"
#include "common/launch.h"
#include "common/mma.cuh"

namespace xlstm::mlstm {

using bits16 = uint16_t;  // one piece

// Row pitch of a tile of 16-bit values: an odd number of 16-byte units, so that the eight rows of a matrix lie
// in different banks.
__host__ __device__ constexpr int pitch(int columns) { return columns + 8; }
__host__ __device__ constexpr int tile_size(int rows, int columns) { return rows * pitch(columns); }

// Two neighbours of a row of numbers.
__device__ __forceinline__ float2 pair(const float *at) { return *reinterpret_cast<const float2 *>(at); }

__device__ __forceinline__ float2 unpack(bf16, uint32_t bits) {
    return make_float2(float_of_bits(bits << 16), float_of_bits(bits & 0xffff0000u));
}

__device__ __forceinline__ float2 unpack(f16, uint32_t bits) {
    return make_float2(to_float(f16{static_cast<uint16_t>(bits)}),
                       to_float(f16{static_cast<uint16_t>(bits >> 16)}));
}

template <class T>
__device__ __forceinline__ float2 pair(const T *at) {
    return unpack(T{}, *reinterpret_cast<const uint32_t *>(at));
}

__device__ __forceinline__ uint32_t pack(bf16, float x, float y) { return pack_bf16(x, y); }
__device__ __forceinline__ uint32_t pack(f16, float x, float y) { return pack_f16(x, y); }

// Two values as pieces of type T, packed in pairs.
template <class T, int pieces>
__device__ __forceinline__ void split(float x, float y, uint32_t (&bits)[pieces]) {
#pragma unroll
    for (int p = 0; p < pieces; ++p) {
        bits[p] = pack(T{}, x, y);
        const float2 taken = unpack(T{}, bits[p]);
        x -= taken.x;
        y -= taken.y;
    }
}

// Stores two neighbours of a row in all planes.
template <class T, int pieces>
__device__ __forceinline__ void store_pieces(bits16 *at, int plane, float x, float y) {
    uint32_t bits[pieces];
    split<T>(x, y, bits);
#pragma unroll
    for (int p = 0; p < pieces; ++p) *reinterpret_cast<uint32_t *>(at + p * plane) = bits[p];
}

// A matrix in shared memory as an operand: element (row, column) of piece p is at[p * plane + row * pitch + column].
struct Operand {
    const bits16 *at;
    int pitch, plane;
};

enum class Layout { plain, transposed };  // rows of the tile are rows of the operand, or its columns

__device__ __forceinline__ void mma(bf16, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    mma_bf16(d, a, b);
}
__device__ __forceinline__ void mma(f16, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    mma_f16(d, a, b);
}

// acc (16 M x 8 N) += A (16 M x depth) B (depth x 8 N) by one warp, over all pairs of pieces (a, b), of type T,
// with a + b < order. A plain A has its rows in the tile's rows; so has a plain B (depth x columns).
template <class T, int pieces_a, int pieces_b, int order, Layout layout_a, Layout layout_b, int depth, int M,
          int N>
__device__ __forceinline__ void multiply(float (&acc)[M][N][4], Operand A, Operand B) {
    static_assert(N % 2 == 0 && depth % 16 == 0, "matrices are loaded in pairs");
    const int lane = threadIdx.x % 32;
    const int inner = lane % 8, second = lane / 8 % 2, third = lane / 16;
#pragma unroll
    for (int k = 0; k < depth; k += 16) {
        uint32_t a[pieces_a][M][4];
#pragma unroll
        for (int p = 0; p < pieces_a; ++p) {
#pragma unroll
            for (int i = 0; i < M; ++i) {
                const bits16 *tile = A.at + p * A.plane;
                if (layout_a == Layout::plain) {
                    load_matrices(a[p][i], tile + (16 * i + 8 * second + inner) * A.pitch + k + 8 * third);
                } else {
                    load_matrices_transposed(a[p][i],
                                             tile + (k + 8 * third + inner) * A.pitch + 16 * i + 8 * second);
                }
            }
        }
#pragma unroll
        for (int j = 0; j < N; j += 2) {
            uint32_t b[pieces_b][4];  // two neighbouring 16 x 8 fragments
#pragma unroll
            for (int p = 0; p < pieces_b; ++p) {
                const bits16 *tile = B.at + p * B.plane;
                if (layout_b == Layout::plain) {
                    load_matrices_transposed(b[p],
                                             tile + (k + 8 * second + inner) * B.pitch + 8 * j + 8 * third);
                } else {
                    load_matrices(b[p], tile + (8 * j + 8 * third + inner) * B.pitch + k + 8 * second);
                }
            }
#pragma unroll
            for (int pa = pieces_a - 1; pa >= 0; --pa) {
#pragma unroll
                for (int pb = pieces_b - 1; pb >= 0; --pb) {
                    if (pa + pb >= order) continue;
                    const uint32_t left[2] = {b[pb][0], b[pb][1]}, right[2] = {b[pb][2], b[pb][3]};
#pragma unroll
                    for (int i = 0; i < M; ++i) {
                        mma(T{}, acc[i][j], a[pa][i], left);
                        mma(T{}, acc[i][j + 1], a[pa][i], right);
                    }
                }
            }
        }
    }
}

template <int M, int N>
__device__ __forceinline__ void clear(float (&acc)[M][N][4]) {
#pragma unroll
    for (int i = 0; i < M; ++i)
#pragma unroll
        for (int j = 0; j < N; ++j)
#pragma unroll
            for (int e = 0; e < 4; ++e) acc[i][j][e] = 0.0f;
}

// Bytes of a row of a raw tile, as it comes from global memory; the same padding as `pitch`.
template <class T>
__host__ __device__ constexpr int raw_pitch(int columns) {
    return columns * int(sizeof(T)) + 16;
}

// Starts the copy of a tile (rows x columns) of a matrix with `stride` elements to a row; what lies outside of
// the first `valid_rows` and `valid_columns` becomes zero. With `vector`, rows of the source are aligned to 16
// bytes; otherwise the copy is made element by element, at once.
template <class T, int rows, int columns, int threads>
__device__ __forceinline__ void load_tile(void *tile, const T *source, size_t stride, int valid_rows,
                                          int valid_columns, bool vector) {
    unsigned char *target = static_cast<unsigned char *>(tile);
    constexpr int width = 16 / sizeof(T), units = columns / width;
    if (vector) {
        for (int x = threadIdx.x; x < rows * units; x += threads) {
            const int row = x / units, column = x % units * width;
            const int left = row < valid_rows ? valid_columns - column : 0;
            const int bytes = max(0, min(left, width)) * int(sizeof(T));
            const T *from = bytes > 0 ? source + row * stride + column : source;
            copy_async(target + row * raw_pitch<T>(columns) + column * sizeof(T), from, bytes);
        }
    } else {
        for (int x = threadIdx.x; x < rows * columns; x += threads) {
            const int row = x / columns, column = x % columns;
            const bool valid = row < valid_rows && column < valid_columns;
            T *at = reinterpret_cast<T *>(target + row * raw_pitch<T>(columns)) + column;
            *at = valid ? source[row * stride + column] : T{};
        }
    }
}

// The bfloat16 planes of a raw tile, every row multiplied by its factor (none: null).
template <class T, int rows, int columns, int threads, int pieces>
__device__ __forceinline__ void expand(bits16 *planes, const void *raw, const float *factors) {
    const unsigned char *source = static_cast<const unsigned char *>(raw);
    for (int x = threadIdx.x; x < rows * columns / 2; x += threads) {
        const int row = x / (columns / 2), column = x % (columns / 2) * 2;
        const float2 values =
            pair(reinterpret_cast<const T *>(source + row * raw_pitch<T>(columns)) + column);
        const float factor = factors ? factors[row] : 1.0f;
        store_pieces<bf16, pieces>(planes + row * pitch(columns) + column, tile_size(rows, columns),
                                   factor * values.x, factor * values.y);
    }
}

// The power of two that brings `peak` into 2^14 .. 2^15, the upper end of FP16, and its inverse.
struct Scale {
    float factor, inverse;
};

__device__ __forceinline__ Scale scale_to_half(float peak) {
    const int exponent = max(int(bits_of_float(peak) >> 23) - 127, -100);
    return {float_of_bits(uint32_t(127 + 14 - exponent) << 23),
            float_of_bits(uint32_t(127 - 14 + exponent) << 23)};
}

// The two FP16 planes of a raw tile (64 x 64), every row multiplied by its factor and every two neighbouring
// columns by a power of two, of which `inverses` gets the inverse for each column. By 128 threads.
__device__ __forceinline__ void expand_scaled(bits16 *planes, const void *raw, const float *factors,
                                              float *inverses) {
    constexpr int rows = 64, columns = 64, quarter = rows / 4;
    const unsigned char *source = static_cast<const unsigned char *>(raw);
    const int lane = threadIdx.x % 32, column = (threadIdx.x / 32 * 8 + lane / 4) * 2;
    float2 values[quarter];
    float peak = 0.0f;
#pragma unroll
    for (int x = 0; x < quarter; ++x) {
        const int row = 4 * x + lane % 4;
        values[x] = pair(reinterpret_cast<const f16 *>(source + row * raw_pitch<f16>(columns)) + column);
        values[x].x *= factors[row];
        values[x].y *= factors[row];
        peak = fmaxf(peak, fmaxf(fabsf(values[x].x), fabsf(values[x].y)));
    }
    peak = fmaxf(peak, __shfl_xor_sync(0xffffffffu, peak, 1));
    peak = fmaxf(peak, __shfl_xor_sync(0xffffffffu, peak, 2));
    const Scale scale = scale_to_half(peak);
    if (lane % 4 == 0) inverses[column] = inverses[column + 1] = scale.inverse;
#pragma unroll
    for (int x = 0; x < quarter; ++x) {
        store_pieces<f16, 2>(planes + (4 * x + lane % 4) * pitch(columns) + column, tile_size(rows, columns),
                             scale.factor * values[x].x, scale.factor * values[x].y);
    }
}

}  // namespace xlstm::mlstm
