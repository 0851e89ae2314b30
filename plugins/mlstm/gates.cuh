// Gates of the mLSTM: the logarithmic sigmoid, and what a whole sequence needs of i and f before any matrix
// is touched (README.md, "Gates").
#pragma once

#include "common/call.h"
#include "common/launch.h"

namespace xlstm::mlstm {

constexpr int BLOCK = 64;  // positions in one step of the chunkwise form
constexpr unsigned WARP = 0xffffffffu;

__device__ __forceinline__ float log_sigmoid(float x) { return fminf(x, 0.0f) - log1pf(expf(-fabsf(x))); }

// Logarithms of the gates.
__device__ __forceinline__ float log_forget(const Mlstm &call, float f) {
    return call.forget_exp ? f : log_sigmoid(f);
}
__device__ __forceinline__ float log_input(const Mlstm &call, float i) {
    return call.input_sigmoid ? log_sigmoid(i) : i;
}

// What the numerator is divided by; C, n and qn are in units of exp(m).
__device__ __forceinline__ float normalizer_of(const Mlstm &call, float qn, float m) {
    const float one = expf(-m);
    if (call.normalize && !call.input_sigmoid) return fmaxf(fabsf(qn), one) + call.eps;
    const float floor = fmaxf(one, 1.17549435e-38f);  // nothing may be divided by zero
    return call.normalize ? fmaxf(fabsf(qn), floor) + call.eps * floor : floor;
}

// Results of gate_scan in scratch memory. Per head (B·H of them), S padded to whole blocks; padded positions
// neither decay nor insert. "Before" and "after" a position do not leave its block.
struct Gates {
    float *i, *lf;    // (B·H, blocks, 64) logarithms of the gates, heads first
    float *m;         // stabilizer of the recurrence after this position
    float *to_start;  // sum of lf up to and including this position
    float *to_end;    // sum of lf after this position
    float *weight;    // what is left of this position's insertion at the end of its block
    // (B·H, blocks): sum of lf, decay of the block's incoming state, its stabilizer
    float *total, *kept, *m_0;
};

// One element of the scan over positions: the sum of their lf, and their stabilizer from m = -infinity.
struct Span {
    float sum, peak;
};

// First a, then b. Sums are only ever extended by further terms of their own; no sum is taken back from
// another, so strong gates cancel nothing and an lf of -infinity makes no NaN.
__device__ __forceinline__ Span join(Span a, Span b) {
    return {a.sum + b.sum, fmaxf(a.peak + b.sum, b.peak)};
}

// One CTA per head. Every warp takes a block of 64 positions at a time, two to a lane, and the CTA carries m
// from one group of blocks to the next.
constexpr int SCAN_WARPS = 16;

__global__ void __launch_bounds__(SCAN_WARPS * 32) gate_scan(Mlstm call, Gates gates) {
    __shared__ Span blocks[SCAN_WARPS];
    __shared__ float incoming[SCAN_WARPS + 1];  // stabilizer before each block of the group
    const int head = blockIdx.x, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int count = (call.length + BLOCK - 1) / BLOCK;
    const size_t source = size_t(head / call.heads) * call.length * call.heads + head % call.heads;
    if (threadIdx.x == 0) incoming[SCAN_WARPS] = call.m0[head];

    for (int group = 0; group < count; group += SCAN_WARPS) {
        const int block = group + warp;
        float i[2], lf[2];
        for (int x = 0; x < 2; ++x) {
            const int t = block * BLOCK + 2 * lane + x;
            const bool real = t < call.length;
            i[x] = real ? log_input(call, call.i[source + size_t(t) * call.heads]) : -INFINITY;
            lf[x] = real ? log_forget(call, call.f[source + size_t(t) * call.heads]) : 0.0f;
        }
        // Inclusive scan from the left, and the plain sum from the right.
        const Span first{lf[0], i[0]};
        Span left = join(first, {lf[1], i[1]});
        float right = lf[0] + lf[1];
        for (int step = 1; step < 32; step *= 2) {
            const Span other{__shfl_up_sync(WARP, left.sum, step), __shfl_up_sync(WARP, left.peak, step)};
            const float sum = __shfl_down_sync(WARP, right, step);
            if (lane >= step) left = join(other, left);
            if (lane + step < 32) right += sum;
        }
        Span before{__shfl_up_sync(WARP, left.sum, 1), __shfl_up_sync(WARP, left.peak, 1)};
        float after = __shfl_down_sync(WARP, right, 1);
        if (lane == 0) before = {0.0f, -INFINITY};
        if (lane == 31) after = 0.0f;
        if (lane == 31) blocks[warp] = left;

        __syncthreads();
        if (threadIdx.x == 0) {
            float m = incoming[SCAN_WARPS];
            for (int w = 0; w < SCAN_WARPS; ++w) {
                incoming[w] = m;
                m = fmaxf(blocks[w].sum + m, blocks[w].peak);
            }
            incoming[SCAN_WARPS] = m;
        }
        __syncthreads();

        const float m_0 = incoming[warp], m_end = incoming[warp + 1];
        const Span here[2] = {join(before, first), left};
        if (block < count) {
            for (int x = 0; x < 2; ++x) {
                const size_t at = (size_t(head) * count + block) * BLOCK + 2 * lane + x;
                const float to_end = x == 0 ? lf[1] + after : after;
                gates.i[at] = i[x];
                gates.lf[at] = lf[x];
                gates.m[at] = fmaxf(here[x].sum + m_0, here[x].peak);
                gates.to_start[at] = here[x].sum;
                gates.to_end[at] = to_end;
                gates.weight[at] = expf(to_end + (i[x] - m_end));
            }
            if (lane == 31) {
                const size_t at = size_t(head) * count + block;
                gates.total[at] = left.sum;
                gates.kept[at] = expf(left.sum + (m_0 - m_end));
                gates.m_0[at] = m_0;
            }
        }
    }
    __syncthreads();
    if (threadIdx.x == 0) call.m[head] = incoming[SCAN_WARPS];
}

}  // namespace xlstm::mlstm
