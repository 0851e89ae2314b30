// The sLSTM in FP32 vectors. Included by one file per instruction set, which sets XLSTM_LANES.
//
// Heads are independent, so one thread runs all positions of one head: R of that head stays in its cache, and
// nothing waits for anybody. What bounds a position is reading R (4 D² floats) from that cache. For more than a
// few positions R is packed once so that this is one contiguous stream; up to four batch rows share each read.
#pragma once

#include "common/scratch.h"
#include "common/simd.h"
#include "slstm/cpu.h"

namespace xlstm {
namespace {

constexpr int kRows = 4;             // batch rows that share a read of R
constexpr size_t kWorthPacking = 8;  // positions

// Vectors of gate columns that one pass over the units sums up in registers, for each of `rows` rows.
template <int rows>
constexpr int panel_vectors() {
#if XLSTM_LANES == 16 || defined(__aarch64__)
    return rows == 1 ? 16 : rows == 2 ? 8 : 4;
#else
    return rows == 1 ? 12 : rows == 2 ? 4 : 2;
#endif
}

// R of one head as the product wants it: (units, columns) with columns = 4 · D, or packed in panels.
struct Weights {
    const float *data;
    size_t units, columns;
    bool packed;
};

// Columns of the padded packing: whole panels.
template <int rows>
size_t padded_columns(size_t columns) {
    constexpr size_t panel = (size_t)panel_vectors<rows>() * kLanes;
    return (columns + panel - 1) / panel * panel;
}

template <int rows>
void pack(const float *R, size_t units, size_t columns, float *to) {
    constexpr size_t panel = (size_t)panel_vectors<rows>() * kLanes;
    for (size_t first = 0; first < columns; first += panel) {
        for (size_t unit = 0; unit < units; ++unit) {
            for (size_t j = 0; j < panel; ++j)
                *to++ = first + j < columns ? R[unit * columns + first + j] : 0;
        }
    }
}

// Adds y · R to the gates of each row. y: (rows, stride), gates: (rows, gate_stride) with room for whole panels.
template <int rows>
void mix(const Weights &R, const float *y, size_t stride, float *gates, size_t gate_stride) {
    constexpr int vectors = panel_vectors<rows>();
    constexpr size_t panel = (size_t)vectors * kLanes;
    for (size_t first = 0; first < R.columns; first += panel) {
        // From zero and not from the gates, which are larger: every addition would round at their size.
        Vec sums[rows][vectors] = {};
        const size_t step = R.packed ? panel : R.columns;
        const float *from = R.packed ? R.data + first * R.units : R.data + first;
        const size_t whole = R.packed ? panel : (R.columns - first < panel ? R.columns - first : panel);
        if (whole == panel) {
            for (size_t unit = 0; unit < R.units; ++unit, from += step) {
                Vec values[rows];
                for (int row = 0; row < rows; ++row) values[row] = all(y[row * stride + unit]);
                for (int j = 0; j < vectors; ++j) {
                    const Vec weight = load(from + j * kLanes);
                    for (int row = 0; row < rows; ++row) sums[row][j] += values[row] * weight;
                }
            }
        } else {
            for (size_t unit = 0; unit < R.units; ++unit, from += step) {
                for (size_t j = 0; j * kLanes < whole; ++j) {
                    const size_t some = whole - j * kLanes;
                    const Vec weight =
                        some >= kLanes ? load(from + j * kLanes) : load_some(from + j * kLanes, some);
                    for (int row = 0; row < rows; ++row) sums[row][j] += y[row * stride + unit] * weight;
                }
            }
        }
        for (int row = 0; row < rows; ++row) {
            for (int j = 0; j < vectors; ++j) {
                float *gate = gates + row * gate_stride + first + j * kLanes;
                store(gate, load(gate) + sums[row][j]);
            }
        }
    }
}

// The state of one row of one head in scratch memory, padded to whole vectors, and its gates i, f, z, o.
struct Row {
    float *y, *c, *n, *m, *gates;
};

// n at least `normalizer_min` where it was not before; else it can only be less by the rounding of m that it
// compensates, and the state is given in other units, out of its reach (ops._raised).
inline void keep_minimum(float normalizer_min, Vec n, Vec &c_new, Vec &n_new, Vec &m_new) {
    const Vec least = all(normalizer_min);
    n_new = n < least ? max(n_new, least) : n_new;
    const IntVec fallen = n_new < least;
    c_new = fallen ? c_new + c_new : c_new;
    n_new = fallen ? n_new + n_new : n_new;
    m_new = fallen ? m_new - all(0.693147181f) : m_new;
}

// The pointwise part: gates to the new state. Padding lanes compute on zeros and stay finite. `plain`: the
// attributes select no other function.
template <bool plain>
inline void point(const Slstm &call, const Row &row) {
    const size_t dim = call.dim;
    const float forget_max = call.forget_max;
    const float *i_gate = row.gates, *f_gate = i_gate + dim, *z_gate = f_gate + dim, *o_gate = z_gate + dim;
    for (size_t d = 0; d < dim; d += kLanes) {
        const size_t some = dim - d;
        const auto read = [&](const float *p) {
            return some >= kLanes ? load(p + d) : load_some(p + d, some);
        };
        const Vec i = read(i_gate), f = min(read(f_gate), all(forget_max)), z = read(z_gate),
                  o = read(o_gate);
        const Vec c = load(row.c + d), n = load(row.n + d), m = load(row.m + d);
        const Vec lf = !plain && call.forget_exp ? f : log_sigmoid(f);
        const IntVec fresh = n == 0.f;
        // A fresh unit has nothing to keep, and its m is no stabilizer yet.
        Vec m_new = fresh ? i : max(i, lf + m);
        const Vec input = exp(i - m_new);
        const Vec forget = fresh ? Vec{} : exp(lf + (m - m_new));  // in this order: see ops.slstm_step
        Vec c_new = forget * c + input * tanh(z);
        Vec n_new = forget * n + input;
        if (!plain && call.normalizer_min > 0) keep_minimum(call.normalizer_min, n, c_new, n_new, m_new);
        store(row.c + d, c_new);
        store(row.n + d, n_new);
        store(row.m + d, m_new);
        store(row.y + d, sigmoid(o) * c_new / n_new);
    }
}

template <int rows>
bool scan_head(const Slstm &call, size_t head, size_t first_row) {
    const size_t D = call.dim, H = call.heads, S = call.length, columns = 4 * D;
    const size_t line = Scratch::rounded(D), padded = padded_columns<rows>(columns);
    const float *R = static_cast<const float *>(call.R) + head * D * columns;
    Weights weights{R, D, columns, S >= kWorthPacking};
    Scratch scratch(rows * (4 * line + Scratch::rounded(padded)) + (weights.packed ? padded * D : 0));
    if (!scratch.ok()) return false;
    // Rows of y and of gates lie at equal distances for `mix`.
    Row states[rows];
    for (Row &row : states) row.y = scratch.take(D);
    for (Row &row : states) row.gates = scratch.take(padded);
    for (Row &row : states) row.c = scratch.take(D), row.n = scratch.take(D), row.m = scratch.take(D);
    if (weights.packed) {
        float *to = scratch.take(padded * D);
        pack<rows>(R, D, columns, to);
        weights.data = to;
    }
    const auto place = [&](int row) { return ((first_row + row) * H + head) * D; };
    for (int r = 0; r < rows; ++r) {
        const Row &row = states[r];
        const float *from[] = {call.y0, call.c0, call.n0, call.m0};
        float *const to[] = {row.y, row.c, row.n, row.m};
        for (int part = 0; part < 4; ++part) {
            for (size_t d = 0; d < line; ++d) to[part][d] = d < D ? from[part][place(r) + d] : 0;
        }
        for (size_t j = columns; j < Scratch::rounded(padded); ++j) row.gates[j] = 0;
    }
    const bool plain = is_plain(call);
    for (size_t t = 0; t < S; ++t) {
        for (int r = 0; r < rows; ++r) {
            const float *x = static_cast<const float *>(call.x) + ((first_row + r) * S + t) * columns * H;
            for (size_t gate = 0; gate < 4; ++gate) {
                const float *input = x + (gate * H + head) * D, *bias = call.bias + (gate * H + head) * D;
                float *to = states[r].gates + gate * D;
                for (size_t d = 0; d < D; ++d) to[d] = input[d] + bias[d];
            }
        }
        mix<rows>(weights, states[0].y, line, states[0].gates, Scratch::rounded(padded));
        for (int r = 0; r < rows; ++r) {
            plain ? point<true>(call, states[r]) : point<false>(call, states[r]);
            float *y = static_cast<float *>(call.y) + (((first_row + r) * S + t) * H + head) * D;
            std::memcpy(y, states[r].y, D * sizeof(float));
        }
    }
    for (int r = 0; r < rows; ++r) {
        const Row &row = states[r];
        std::memcpy(call.y_n + place(r), row.y, D * sizeof(float));
        std::memcpy(call.c_n + place(r), row.c, D * sizeof(float));
        std::memcpy(call.n_n + place(r), row.n, D * sizeof(float));
        std::memcpy(call.m_n + place(r), row.m, D * sizeof(float));
    }
    return true;
}

bool slstm_scan(const Slstm &call, const Parallel *parallel) {
    const size_t groups = ((size_t)call.batch + kRows - 1) / kRows;
    bool ok = true;
    parallel_for(parallel, groups * call.heads, [&](size_t task) {
        const size_t head = task % call.heads, first = task / call.heads * kRows;
        const size_t left = (size_t)call.batch - first;
        const bool done = left >= 4   ? scan_head<4>(call, head, first)
                          : left == 3 ? scan_head<3>(call, head, first)
                          : left == 2 ? scan_head<2>(call, head, first)
                                      : scan_head<1>(call, head, first);
        if (!done) ok = false;
    });
    return ok;
}

}  // namespace
}  // namespace xlstm
