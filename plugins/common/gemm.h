// A small matrix product for the CPU kernels: result = keep · result + left · right in FP32, with any strides on
// the left.
#pragma once

#include "common/simd.h"

namespace xlstm {
namespace {

// Rows and vectors of a tile held in registers: with 16 registers 6 x 2, with 32 (AVX-512, NEON) more.
#if XLSTM_LANES == 16
constexpr int kTileRows = 12, kTileVectors = 2;
#elif defined(__aarch64__)
constexpr int kTileRows = 6, kTileVectors = 4;
#else
constexpr int kTileRows = 6, kTileVectors = 2;
#endif
constexpr int kTileColumns = kTileVectors * kLanes;

struct Matrix {
    const float *data;
    size_t row, column;  // strides in floats
};

// Floats of the panel that `gemm` packs the right side into.
inline size_t panel_floats(size_t depth) { return depth * kTileColumns; }

template <int rows>
inline void tile(Matrix left, const float *panel, size_t depth, float *result, size_t stride, size_t columns,
                 float keep) {
    Vec sums[rows][kTileVectors] = {};
    const float *from = left.data;
    for (size_t k = 0; k < depth; ++k, panel += kTileColumns, from += left.column) {
        Vec right[kTileVectors];
        for (int j = 0; j < kTileVectors; ++j) right[j] = load(panel + j * kLanes);
        for (int r = 0; r < rows; ++r) {
            const float a = from[r * left.row];
            for (int j = 0; j < kTileVectors; ++j) sums[r][j] += a * right[j];
        }
    }
    for (int r = 0; r < rows; ++r) {
        float *to = result + r * stride;
        for (int j = 0; j < kTileVectors; ++j) {
            const size_t start = (size_t)j * kLanes;
            if (start + kLanes <= columns) {
                store(to + start, keep != 0 ? keep * load(to + start) + sums[r][j] : sums[r][j]);
            } else if (start < columns) {
                const size_t some = columns - start;
                const Vec old = keep != 0 ? keep * load_some(to + start, some) : Vec{};
                store_some(to + start, old + sums[r][j], some);
            }
        }
    }
}

// Calls `tile` for 1 … kTileRows rows.
template <int rows = kTileRows>
inline void tile_of(size_t wanted, Matrix left, const float *panel, size_t depth, float *result,
                    size_t stride, size_t columns, float keep) {
    if constexpr (rows > 0) {
        if (wanted == rows) return tile<rows>(left, panel, depth, result, stride, columns, keep);
        tile_of<rows - 1>(wanted, left, panel, depth, result, stride, columns, keep);
    }
}

// result (m, n) = keep · result + left (m, depth) · right (depth, n). `right` and `result` have contiguous rows.
// With keep 0 what was in `result` does not matter. `panel`: panel_floats(depth) floats.
inline void gemm(size_t m, size_t n, size_t depth, Matrix left, const float *right, size_t right_stride,
                 float *result, size_t stride, float keep, float *panel) {
    for (size_t column = 0; column < n; column += kTileColumns) {
        const size_t columns = n - column < kTileColumns ? n - column : kTileColumns;
        for (size_t k = 0; k < depth; ++k) {
            const float *from = right + k * right_stride + column;
            float *to = panel + k * kTileColumns;
            for (int j = 0; j < kTileVectors; ++j) {
                const size_t start = (size_t)j * kLanes;
                if (start + kLanes <= columns) {
                    store(to + start, load(from + start));
                } else {
                    store(to + start, start < columns ? load_some(from + start, columns - start) : Vec{});
                }
            }
        }
        for (size_t row = 0; row < m; row += kTileRows) {
            const size_t rows = m - row < kTileRows ? m - row : kTileRows;
            const Matrix part{left.data + row * left.row, left.row, left.column};
            tile_of(rows, part, panel, depth, result + row * stride + column, stride, columns, keep);
        }
    }
}

}  // namespace
}  // namespace xlstm
