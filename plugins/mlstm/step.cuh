// One position: C is read once and written once, and h comes out of the same pass (README.md, "Step").
#pragma once

#include "mlstm/gates.cuh"

namespace xlstm::mlstm {

constexpr int STEP_THREADS = 256;
constexpr int STEP_ROWS = 8;  // rows of C that a thread has under way at a time

template <class T, int width>
struct alignas(sizeof(T) * width) Vector {
    T x[width];
};

// What a head's gates say at one position.
struct StepGates {
    float forget, insert, m;
};

__device__ __forceinline__ StepGates step_gates(const Mlstm &call, int head) {
    const float lf = log_forget(call, call.f[head]), i = log_input(call, call.i[head]), m_0 = call.m0[head];
    const float m = fmaxf(lf + m_0, i);
    // Not (lf + m_0) - m: what was rounded off in m comes back in the decay and does not add up.
    return {expf(lf + (m_0 - m)), expf(i - m), m};
}

// One CTA per head and strip of columns, with all rows of the strip: columns of h do not depend on each other,
// so no CTA waits for another. Every CTA works out the normalizer by itself from n, which is small; the CTA of
// the first strip writes n and m if `writes_normalizer`, which excludes that they overwrite what others read.
template <class Io, class State, int lanes, int width>
__global__ void __launch_bounds__(STEP_THREADS) step(Mlstm call, bool writes_normalizer) {
    XLSTM_DYNAMIC_SHARED(shared);
    constexpr int COLUMNS = lanes * width, ROWS = STEP_THREADS / lanes, WARPS = STEP_THREADS / 32;
    float *const query = reinterpret_cast<float *>(shared), *const key = query + call.dk;
    float *const sums = key + call.dk;  // (warps, columns)
    __shared__ float qn_sums[WARPS];

    const int strips = (call.dv + COLUMNS - 1) / COLUMNS;
    const int head = blockIdx.x / strips, strip = blockIdx.x % strips;
    const int row = threadIdx.x / lanes, column = strip * COLUMNS + threadIdx.x % lanes * width;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const bool valid = column < call.dv;
    using Values = Vector<State, width>;
    const size_t offset = size_t(head) * call.dk * call.dv + column;
    const State *const C0 = static_cast<const State *>(call.C0) + offset;
    State *const C = static_cast<State *>(call.C) + offset;

    // The first rows are on their way while the gates and the normalizer are worked out.
    Values rows[STEP_ROWS];
    const auto load = [&](int first) {
#pragma unroll
        for (int x = 0; x < STEP_ROWS; ++x) {
            const int d = first + x * ROWS;
            if (valid && d < call.dk) rows[x] = *reinterpret_cast<const Values *>(C0 + size_t(d) * call.dv);
        }
    };
    load(row);

    const StepGates gates = step_gates(call, head);
    const Io *const q = static_cast<const Io *>(call.q) + size_t(head) * call.dk;
    const Io *const k = static_cast<const Io *>(call.k) + size_t(head) * call.dk;
    float qn = 0.0f;
    for (int d = threadIdx.x; d < call.dk; d += STEP_THREADS) {
        query[d] = call.scale * to_float(q[d]);
        key[d] = gates.insert * to_float(k[d]);
        const size_t at = size_t(head) * call.dk + d;
        const float n = fmaf(gates.forget, call.n0[at], key[d]);
        qn = fmaf(query[d], n, qn);
        if (writes_normalizer && strip == 0) call.n[at] = n;
    }
    for (int step = 16; step > 0; step /= 2) qn += __shfl_xor_sync(WARP, qn, step);
    if (lane == 0) qn_sums[warp] = qn;
    float value[width], sum[width] = {};
#pragma unroll
    for (int x = 0; x < width; ++x) {
        const int c = column + x;
        value[x] = c < call.dv ? to_float(static_cast<const Io *>(call.v)[size_t(head) * call.dv + c]) : 0.0f;
    }
    __syncthreads();
    if (writes_normalizer && strip == 0 && threadIdx.x == 0) call.m[head] = gates.m;

    for (int first = row; first < call.dk; first += STEP_ROWS * ROWS) {
        if (first != row) load(first);
#pragma unroll
        for (int x = 0; x < STEP_ROWS; ++x) {
            const int d = first + x * ROWS;
            if (!valid || d >= call.dk) continue;
            Values result;
#pragma unroll
            for (int e = 0; e < width; ++e) {
                const float c = fmaf(gates.forget, to_float(rows[x].x[e]), key[d] * value[e]);
                sum[e] = fmaf(query[d], c, sum[e]);
                result.x[e] = from_float<State>(c);
            }
            *reinterpret_cast<Values *>(C + size_t(d) * call.dv) = result;
        }
    }

    // Over the rows of a warp, then over the warps.
#pragma unroll
    for (int x = 0; x < width; ++x) {
        for (int step = lanes; step < 32; step *= 2) sum[x] += __shfl_xor_sync(WARP, sum[x], step);
        if (lane < lanes) sums[warp * COLUMNS + lane * width + x] = sum[x];
    }
    __syncthreads();
    for (int x = threadIdx.x; x < COLUMNS; x += STEP_THREADS) {
        const int c = strip * COLUMNS + x;
        if (c >= call.dv) continue;
        float total = 0.0f, numerator = 0.0f;
        for (int w = 0; w < WARPS; ++w) total += qn_sums[w], numerator += sums[w * COLUMNS + x];
        const float normalizer = normalizer_of(call, total, gates.m);
        static_cast<Io *>(call.h)[size_t(head) * call.dv + c] = from_float<Io>(numerator / normalizer);
    }
}

// n and m, where they are updated in place and other CTAs of `step` may still have to read them. One CTA per head.
template <class Io>
__global__ void __launch_bounds__(STEP_THREADS) step_normalizer(Mlstm call) {
    const int head = blockIdx.x;
    const StepGates gates = step_gates(call, head);
    for (int d = threadIdx.x; d < call.dk; d += STEP_THREADS) {
        const size_t at = size_t(head) * call.dk + d;
        const float key = gates.insert * to_float(static_cast<const Io *>(call.k)[at]);
        call.n[at] = fmaf(gates.forget, call.n0[at], key);
    }
    __syncthreads();
    if (threadIdx.x == 0) call.m[head] = gates.m;
}

}  // namespace xlstm::mlstm
