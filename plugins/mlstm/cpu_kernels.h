// The mLSTM in FP32 vectors. Included by one file per instruction set, which sets XLSTM_LANES.
//
// Step: memory traffic is everything, so C is read and written once, in rows, and h gathers on the way. Chunkwise:
// the parallel form within 64 positions (ops._mlstm_chunk), as products of small matrices that stay in the caches.
#pragma once

#include <cfloat>
#include <cmath>
#include <initializer_list>

#include "common/gemm.h"
#include "common/scratch.h"
#include "mlstm/cpu.h"

namespace xlstm {
namespace {

constexpr size_t kChunk = 64;
constexpr float kLogZero = -1e30f;  // "no contribution" in log space, finite so that differences are numbers
constexpr size_t kTasks = 4;        // fewer heads than this are cut into strips of columns

inline float log_sigmoid_scalar(float x) { return (x < 0 ? x : 0) - std::log1p(std::exp(-std::fabs(x))); }

// Logarithms of the gates. `plain`: the attributes select no other function (is_plain); its code is then without
// their branches.
template <bool plain>
float log_forget(const Mlstm &call, float f) {
    return !plain && call.forget_exp ? f : log_sigmoid_scalar(f);
}
template <bool plain>
float log_input(const Mlstm &call, float i) {
    return !plain && call.input_sigmoid ? log_sigmoid_scalar(i) : i;
}

// What the numerator is divided by; C, n and qn are in units of exp(m).
template <bool plain>
float normalizer_of(const Mlstm &call, float qn, float m) {
    const float one = std::exp(-m), size = std::fabs(qn);
    if (plain || (call.normalize && !call.input_sigmoid)) return (size > one ? size : one) + call.eps;
    const float floor = one > FLT_MIN ? one : FLT_MIN;  // nothing may be divided by zero
    if (!call.normalize) return floor;
    return (size > floor ? size : floor) + call.eps * floor;
}

inline float dot(const float *a, const float *b, size_t count) {
    Vec sums[4] = {};
    size_t at = 0;
    for (; at + 4 * kLanes <= count; at += 4 * kLanes) {
        for (int j = 0; j < 4; ++j) sums[j] += load(a + at + j * kLanes) * load(b + at + j * kLanes);
    }
    for (; at + kLanes <= count; at += kLanes) sums[0] += load(a + at) * load(b + at);
    if (at < count) sums[1] += load_some(a + at, count - at) * load_some(b + at, count - at);
    return sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

// Columns of one task: all of Dv, or less where there are few heads.
inline size_t strip_width(const Mlstm &call) {
    const size_t heads = (size_t)call.batch * call.heads;
    if (heads >= kTasks) return call.dv;
    const size_t strips = (kTasks + heads - 1) / heads;
    const size_t width = (call.dv + strips - 1) / strips;
    return (width + 31) / 32 * 32;
}

// --- S = 1 ---------------------------------------------------------------------------------------------------

// The gates, n and m of one head; leaves scale · q and I · k for the pass over C.
struct StepHead {
    float forget, normalizer;
    float *q, *kI;
};

template <bool plain>
void step_head(const Mlstm &call, size_t head, StepHead &out) {
    const size_t dk = call.dk;
    const float *q = static_cast<const float *>(call.q) + head * dk;
    const float *k = static_cast<const float *>(call.k) + head * dk;
    const float *n0 = call.n0 + head * dk;
    float *n = call.n + head * dk;
    const float lf = log_forget<plain>(call, call.f[head]), i = log_input<plain>(call, call.i[head]),
                m0 = call.m0[head];
    const float m = lf + m0 > i ? lf + m0 : i;
    const float forget = std::exp(lf + (m0 - m));  // in this order: see ops.mlstm_step
    const float input = std::exp(i - m);
    Vec qn{};
    size_t at = 0;
    for (; at + kLanes <= dk; at += kLanes) {
        const Vec kI = input * load(k + at), scaled = call.scale * load(q + at);
        const Vec sum_n = forget * load(n0 + at) + kI;
        store(out.kI + at, kI);
        store(out.q + at, scaled);
        store(n + at, sum_n);
        qn += scaled * sum_n;
    }
    float total = sum(qn);
    for (; at < dk; ++at) {
        out.kI[at] = input * k[at];
        out.q[at] = call.scale * q[at];
        n[at] = forget * n0[at] + out.kI[at];
        total += out.q[at] * n[at];
    }
    call.m[head] = m;
    out.forget = forget;
    out.normalizer = normalizer_of<plain>(call, total, m);
}

constexpr size_t kAhead = 768;     // floats: 3 KB, what arrives from memory while that much is computed
constexpr size_t kCacheLine = 16;  // floats

// One row of C for `width` columns; `h` gathers q · C'. One row at a time and not several: memory is then read
// in order, which processors foresee, though not far enough: asking ahead takes a sixth of the time away. `h` and
// `v` stay in the nearest cache.
inline void step_row(const float *from, float *to, size_t width, float forget, float kI, float q,
                     const float *v, float *h) {
    size_t at = 0;
    for (; at + kLanes <= width; at += kLanes) {
        if (at % kCacheLine == 0) __builtin_prefetch(from + at + kAhead, 1);
        const Vec kept = forget * load(from + at) + kI * load(v + at);
        store(to + at, kept);
        store(h + at, load(h + at) + q * kept);
    }
    for (; at < width; ++at) {
        to[at] = forget * from[at] + kI * v[at];
        h[at] += q * to[at];
    }
}

bool mlstm_step(const Mlstm &call, const Parallel *parallel) {
    const size_t heads = (size_t)call.batch * call.heads, dk = call.dk, dv = call.dv;
    const size_t padded = Scratch::rounded(dk), width = strip_width(call), strips = (dv + width - 1) / width;
    Scratch scratch(heads * 2 * padded + heads * Scratch::rounded(sizeof(StepHead) / sizeof(float)));
    if (!scratch.ok()) return false;
    auto *ready = reinterpret_cast<StepHead *>(scratch.take(heads * sizeof(StepHead) / sizeof(float)));
    const bool plain = is_plain(call);
    for (size_t head = 0; head < heads; ++head) {
        ready[head].q = scratch.take(dk);
        ready[head].kI = scratch.take(dk);
        plain ? step_head<true>(call, head, ready[head]) : step_head<false>(call, head, ready[head]);
    }
    const auto strip = [&](size_t index) {
        const StepHead &head = ready[index / strips];
        const size_t first = index % strips * width, columns = dv - first < width ? dv - first : width;
        const size_t offset = index / strips * dk * dv + first;
        const float *from = static_cast<const float *>(call.C0) + offset;
        float *to = static_cast<float *>(call.C) + offset;
        const float *v = static_cast<const float *>(call.v) + index / strips * dv + first;
        float *h = static_cast<float *>(call.h) + index / strips * dv + first;
        for (size_t at = 0; at < columns; ++at) h[at] = 0;
        for (size_t row = 0; row < dk; ++row, from += dv, to += dv) {
            step_row(from, to, columns, head.forget, head.kI[row], head.q[row], v, h);
        }
        for (size_t at = 0; at < columns; ++at) h[at] /= head.normalizer;
    };
    parallel_for(parallel, heads * strips, strip);
    return true;
}

// --- any S ---------------------------------------------------------------------------------------------------

// Everything of one chunk that does not depend on the columns of v. Position j is column j + 1 of the decay
// matrix, the incoming state column 0.
struct Chunk {
    float *decay, *weight, *row;  // (L + 1)
    float *W;                     // (L, L): what is left of position j at position t, lower triangle
    float *carried, *m;           // (L): what is left of the incoming state; stabilizers
    float *normalizer;            // (L)
    float *kT;                    // (Dk, L)
    float *kW;                    // (L, Dk)
    float *numerator;             // (L, columns)
    float *panel;
};

template <bool plain>
void chunk_decay(const Mlstm &call, const Chunk &chunk, const float *i, const float *f, size_t step,
                 size_t length, float m_in) {
    const size_t width = Scratch::rounded(kChunk + 1);
    for (size_t j = 0; j < width; ++j) chunk.decay[j] = 0, chunk.weight[j] = kLogZero;
    chunk.weight[0] = m_in;
    for (size_t t = 0; t < length; ++t) {
        const Vec lf = all(log_forget<plain>(call, f[t * step]));
        // Running sums over their own terms, never a difference of two sums, which would cancel.
        for (size_t j = 0; j <= t; j += kLanes) store(chunk.decay + j, load(chunk.decay + j) + lf);
        chunk.decay[t + 1] = 0;
        chunk.weight[t + 1] = log_input<plain>(call, i[t * step]);
        Vec largest = all(kLogZero);
        for (size_t j = 0; j <= t + 1; j += kLanes) {
            largest = max(largest, load(chunk.decay + j) + load(chunk.weight + j));
        }
        chunk.m[t] = maximum(largest);
        const Vec m = all(chunk.m[t]);
        for (size_t j = 0; j <= t + 1; j += kLanes) {
            store(chunk.row + j, exp(load(chunk.decay + j) + (load(chunk.weight + j) - m)));
        }
        chunk.carried[t] = chunk.row[0];
        for (size_t j = 0; j < kChunk; ++j) chunk.W[t * kChunk + j] = j <= t ? chunk.row[j + 1] : 0.f;
    }
}

// One head, `width` columns of v from column `first`; n (Dk) and m in, out.
template <bool plain>
bool chunkwise_strip(const Mlstm &call, size_t head, size_t first, size_t width, float *n, float *m) {
    const size_t heads = call.heads, dk = call.dk, dv = call.dv, length = call.length;
    const size_t depth = dk > kChunk ? dk : kChunk;
    const size_t square = kChunk * kChunk, line = Scratch::rounded(kChunk + 1);
    Scratch scratch(7 * line + 2 * square + 2 * Scratch::rounded(kChunk * dk) +
                    Scratch::rounded(kChunk * width) + Scratch::rounded(panel_floats(depth)));
    if (!scratch.ok()) return false;
    Chunk chunk;
    for (float **part :
         {&chunk.decay, &chunk.weight, &chunk.row, &chunk.carried, &chunk.m, &chunk.normalizer}) {
        *part = scratch.take(kChunk + 1);
    }
    chunk.W = scratch.take(square);
    float *E = scratch.take(square);
    chunk.kT = scratch.take(kChunk * dk);
    chunk.kW = scratch.take(kChunk * dk);
    chunk.numerator = scratch.take(kChunk * width);
    chunk.panel = scratch.take(panel_floats(depth));

    const size_t row = head / heads, column = head % heads;
    const size_t qk_stride = heads * dk, v_stride = heads * dv;
    const float *q = static_cast<const float *>(call.q) + (row * length * heads + column) * dk;
    const float *k = static_cast<const float *>(call.k) + (row * length * heads + column) * dk;
    const float *v = static_cast<const float *>(call.v) + (row * length * heads + column) * dv + first;
    float *h = static_cast<float *>(call.h) + (row * length * heads + column) * dv + first;
    const float *i = call.i + row * length * heads + column, *f = call.f + row * length * heads + column;
    const float *C0 = static_cast<const float *>(call.C0) + head * dk * dv + first;
    float *C = static_cast<float *>(call.C) + head * dk * dv + first;
    if (C != C0) {
        for (size_t r = 0; r < dk; ++r) std::memcpy(C + r * dv, C0 + r * dv, width * sizeof(float));
    }
    for (size_t start = 0; start < length; start += kChunk) {
        const size_t L = length - start < kChunk ? length - start : kChunk;
        chunk_decay<plain>(call, chunk, i, f, heads, L, *m);
        for (size_t t = 0; t < L; ++t) {
            const float left = chunk.W[(L - 1) * kChunk + t];
            for (size_t d = 0; d < dk; ++d) {
                chunk.kT[d * L + t] = k[t * qk_stride + d];
                chunk.kW[t * dk + d] = k[t * qk_stride + d] * left;
            }
        }
        gemm(L, L, dk, {q, qk_stride, 1}, chunk.kT, L, E, kChunk, 0, chunk.panel);
        for (size_t t = 0; t < L; ++t) {
            Vec total{};
            for (size_t j = 0; j < L; j += kLanes) {  // beyond L, E is no value of ours but W is zero
                Vec e = load(E + t * kChunk + j);
                e = j + kLanes <= L ? e : load_some(E + t * kChunk + j, L - j);
                e = e * call.scale * load(chunk.W + t * kChunk + j);
                store(E + t * kChunk + j, e);
                total += e;
            }
            const float qn = sum(total) + call.scale * chunk.carried[t] * dot(q + t * qk_stride, n, dk);
            chunk.normalizer[t] = normalizer_of<plain>(call, qn, chunk.m[t]);
        }
        gemm(L, width, dk, {q, qk_stride, 1}, C, dv, chunk.numerator, width, 0, chunk.panel);
        for (size_t t = 0; t < L; ++t) {
            const float left = call.scale * chunk.carried[t];
            for (size_t d = 0; d < width; ++d) chunk.numerator[t * width + d] *= left;
        }
        gemm(L, width, L, {E, kChunk, 1}, v, v_stride, chunk.numerator, width, 1, chunk.panel);
        for (size_t t = 0; t < L; ++t) {
            for (size_t d = 0; d < width; ++d) {
                h[t * v_stride + d] = chunk.numerator[t * width + d] / chunk.normalizer[t];
            }
        }
        const float kept = chunk.carried[L - 1];
        gemm(dk, width, L, {chunk.kW, 1, dk}, v, v_stride, C, dv, kept, chunk.panel);
        for (size_t d = 0; d < dk; d += kLanes) {
            const size_t some = dk - d < kLanes ? dk - d : kLanes;
            Vec sums[4] = {};  // several short sums round less than a long one
            for (size_t t = 0; t < L; ++t) sums[t % 4] += load_some(chunk.kW + t * dk + d, some);
            const Vec added = (sums[0] + sums[1]) + (sums[2] + sums[3]);
            store_some(n + d, kept * load_some(n + d, some) + added, some);
        }
        *m = chunk.m[L - 1];
        q += L * qk_stride, k += L * qk_stride, v += L * v_stride, h += L * v_stride;
        i += L * heads, f += L * heads;
    }
    return true;
}

bool mlstm_chunkwise(const Mlstm &call, const Parallel *parallel) {
    const size_t heads = (size_t)call.batch * call.heads, dk = call.dk, dv = call.dv;
    const size_t width = strip_width(call), strips = (dv + width - 1) / width;
    const size_t line = Scratch::rounded(dk) + 16;  // n and m of one task
    Scratch states(heads * strips * line);
    if (!states.ok()) return false;
    float *state = states.take(heads * strips * line);
    // Every strip carries n and m along; the call's own are written last, as they may be the ones read here.
    for (size_t task = 0; task < heads * strips; ++task) {
        std::memcpy(state + task * line, call.n0 + task / strips * dk, dk * sizeof(float));
        state[task * line + Scratch::rounded(dk)] = call.m0[task / strips];
    }
    const auto strip = is_plain(call) ? chunkwise_strip<true> : chunkwise_strip<false>;
    bool ok = true;
    parallel_for(parallel, heads * strips, [&](size_t task) {
        const size_t first = task % strips * width, columns = dv - first < width ? dv - first : width;
        float *n = state + task * line;
        if (!strip(call, task / strips, first, columns, n, n + Scratch::rounded(dk))) ok = false;
    });
    for (size_t head = 0; head < heads; ++head) {
        std::memcpy(call.n + head * dk, state + head * strips * line, dk * sizeof(float));
        call.m[head] = state[head * strips * line + Scratch::rounded(dk)];
    }
    return ok;
}

}  // namespace
}  // namespace xlstm
