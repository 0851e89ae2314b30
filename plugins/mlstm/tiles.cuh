// Tiles of 16-bit values in shared memory, and products of them on tensor cores.
//
// A value is a sum of bfloat16 pieces, largest first, in as many planes of shared memory as its precision
// needs: bfloat16 itself is one piece, FP16 two, FP32 three. Pieces have the exponents of FP32, so nothing
// overflows or vanishes whatever the scale of the operands, and a product of sums of pieces is as exact as
// the number of pieces taken into it (README.md, "Precision").
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

// Two values as pieces, packed in pairs.
template <int pieces>
__device__ __forceinline__ void split(float x, float y, uint32_t (&bits)[pieces]) {
    for (int p = 0; p < pieces; ++p) {
        bits[p] = pack_bf16(x, y);
        x -= low_bf16(bits[p]);
        y -= high_bf16(bits[p]);
    }
}

// Stores two neighbours of a row in all planes.
template <int pieces>
__device__ __forceinline__ void store_pieces(bits16 *at, int plane, float x, float y) {
    uint32_t bits[pieces];
    split(x, y, bits);
    for (int p = 0; p < pieces; ++p) *reinterpret_cast<uint32_t *>(at + p * plane) = bits[p];
}

// A matrix in shared memory as an operand: element (row, column) of piece p is at[p * plane + row * pitch + column].
struct Operand {
    const bits16 *at;
    int pitch, plane;
};

enum class Layout { plain, transposed };  // rows of the tile are rows of the operand, or its columns

// acc (16 M x 8 N) += A (16 M x depth) B (depth x 8 N) by one warp, over all pairs of pieces (a, b) with
// a + b < order. A plain A has its rows in the tile's rows; so has a plain B (depth x columns).
template <int M, int N, int depth, int pieces_a, int pieces_b, int order, Layout layout_a, Layout layout_b>
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
                    load_matrices_transposed(a[p][i], tile + (k + 8 * third + inner) * A.pitch + 16 * i + 8 * second);
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
                    load_matrices_transposed(b[p], tile + (k + 8 * second + inner) * B.pitch + 8 * j + 8 * third);
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
                        mma_bf16(acc[i][j], a[pa][i], left);
                        mma_bf16(acc[i][j + 1], a[pa][i], right);
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
__device__ __forceinline__ void load_tile(void *tile, const T *source, size_t stride, int valid_rows, int valid_columns,
                                          bool vector) {
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

// The planes of a raw tile, every row multiplied by its factor (none: null).
template <class T, int rows, int columns, int threads, int pieces>
__device__ __forceinline__ void expand(bits16 *planes, const void *raw, const float *factors) {
    const unsigned char *source = static_cast<const unsigned char *>(raw);
    for (int x = threadIdx.x; x < rows * columns / 2; x += threads) {
        const int row = x / (columns / 2), column = x % (columns / 2) * 2;
        const T *pair = reinterpret_cast<const T *>(source + row * raw_pitch<T>(columns)) + column;
        const float factor = factors ? factors[row] : 1.0f;
        store_pieces<pieces>(planes + row * pitch(columns) + column, tile_size(rows, columns),
                             factor * to_float(pair[0]), factor * to_float(pair[1]));
    }
}

}  // namespace xlstm::mlstm
