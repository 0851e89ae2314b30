// One unit of an sLSTM at one position, in FP32, and the elements of x and y.
#pragma once

#include "common/call.h"
#include "common/half.h"
#include "common/launch.h"

namespace xlstm::slstm {

struct Cell {
    float c, n, m;
};

// Takes the cell one position on; returns y. The operations are those of ops.slstm_step, in their order, but for one
// division: sigmoid(o) c / n is c / (n (1 + exp(-o))).
__device__ __forceinline__ float advance(Cell &cell, const float (&raw)[4], const Slstm &call) {
    const float i = raw[0], f = raw[1] > call.forget_max ? call.forget_max : raw[1];
    const float lf = call.forget_exp ? f : fminf(f, 0.0f) - log1pf(expf(-fabsf(f)));
    const bool fresh = cell.n == 0.0f;  // its m is no stabilizer yet
    const float m = fresh ? i : fmaxf(i, lf + cell.m);
    const float insert = expf(i - m);
    // Not (lf + m_0) - m: what was rounded off in m comes back in the decay and does not add up.
    const float forget = fresh ? 0.0f : expf(lf + (cell.m - m));
    const bool bounded = cell.n < call.normalizer_min;
    cell.c = fmaf(forget, cell.c, insert * tanhf(raw[2]));
    cell.n = fmaf(forget, cell.n, insert);
    cell.m = m;
    if (bounded) cell.n = fmaxf(cell.n, call.normalizer_min);
    if (cell.n < call.normalizer_min) {
        // Less only by the rounding of m that it compensates: the state in other units, out of its reach.
        cell.c *= 2.0f, cell.n *= 2.0f, cell.m -= 0.693147181f;
    }
    return cell.c / (cell.n * (1.0f + expf(-raw[3])));
}

// An element of x as it is stored, so that it can be on its way while something else is computed.
__device__ __forceinline__ uint32_t fetch(const void *x, size_t at, Dtype io) {
    if (io == Dtype::f32) return static_cast<const uint32_t *>(x)[at];
    return static_cast<const uint16_t *>(x)[at];
}

__device__ __forceinline__ float value(uint32_t bits, Dtype io) {
    if (io == Dtype::f32) return float_of_bits(bits);
    if (io == Dtype::f16) return to_float(f16{static_cast<uint16_t>(bits)});
    return to_float(bf16{static_cast<uint16_t>(bits)});
}

__device__ __forceinline__ void store(void *y, size_t at, float x, Dtype io) {
    if (io == Dtype::f32) static_cast<float *>(y)[at] = x;
    else if (io == Dtype::f16) static_cast<f16 *>(y)[at] = to_f16(x);
    else static_cast<bf16 *>(y)[at] = to_bf16(x);
}

}  // namespace xlstm::slstm
