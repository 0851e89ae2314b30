// Chunkwise form, first pass: carries C and n over a segment of the sequence and leaves what they were at the
// start of every chunk (README.md, "State pass").
#pragma once

#include "mlstm/gates.cuh"
#include "mlstm/tiles.cuh"

namespace xlstm::mlstm {

// In what pieces the operands of type Io and what is made of them are multiplied (README.md, "Precision").
//   input   bfloat16 pieces of q, k, v
//   inner   bfloat16 pieces of what only outputs depend on: C at the start of a chunk, weighted scores
//   order   how many pairs of pieces make a product of these
//   Key, keys, key_order   weighted keys, which the FP32 state depends on
//   values  pieces of v that they are multiplied with; one: v itself
template <class Io>
struct Pieces;
template <>
struct Pieces<float> {
    static constexpr int input = 3, inner = 3, order = 3;
    using Key = bf16;
    static constexpr int keys = 3, values = 3, key_order = 3;
};
template <>
struct Pieces<f16> {
    static constexpr int input = 2, inner = 2, order = 2;
    using Key = f16;
    static constexpr int keys = 2, values = 1, key_order = 2;
};
template <>
struct Pieces<bf16> {
    static constexpr int input = 1, inner = 2, order = 2;
    using Key = bf16;
    static constexpr int keys = 3, values = 1, key_order = 3;
};

// FP16 keys are scaled, FP32 and bfloat16 need no scale.
template <class Io>
constexpr bool scaled_keys = sizeof(Io) == 2 && Pieces<Io>::keys == 2;

// A segment of the sequence, and scratch memory that lives as long.
struct Segment {
    int first, count;   // blocks
    int chunk;          // blocks to a chunk; `first` is the start of one
    bool starts, ends;  // the sequence
    int rows, columns;  // Dk and Dv rounded up to whole state tiles
    bits16 *C;          // (B·H, chunks of the segment, pieces, rows, columns): C at the start of each chunk
    float *n;           // (B·H, chunks of the segment, rows): n there
    float *carried_C, *carried_n;  // state between segments, in the order of the threads
};

constexpr int STATE_TILE = 64;  // of C, in both directions
constexpr int STATE_THREADS = 128;

template <class Io>
struct StateShared {
    static constexpr int raw = STATE_TILE * raw_pitch<Io>(STATE_TILE);
    static constexpr bool direct = Pieces<Io>::values == 1;  // a raw tile is a plane as it is
    static constexpr int plane = tile_size(BLOCK, STATE_TILE) * int(sizeof(bits16));
    static constexpr int stage = 2 * raw + BLOCK * int(sizeof(float));  // k, v, weights
    static constexpr int planes = Pieces<Io>::keys + (direct ? 0 : Pieces<Io>::values);
    static constexpr int bytes = 2 * stage + planes * plane + STATE_TILE * int(sizeof(float));
};

// One CTA per head and 64 x 64 tile of C, four warps with a 32 x 32 quarter each. C stays in FP32 registers; a
// block's contribution is summed by itself first, because tensor cores truncate when they accumulate.
template <class Io, class State>
__global__ void __launch_bounds__(STATE_THREADS, sizeof(Io) == 4 ? 1 : 3)
    state_pass(Mlstm call, Gates gates, Segment segment, bool vector) {
    using P = Pieces<Io>;
    using Shared = StateShared<Io>;
    XLSTM_DYNAMIC_SHARED(shared);
    unsigned char *const stages = shared;
    bits16 *const keys = reinterpret_cast<bits16 *>(shared + 2 * Shared::stage);
    bits16 *const values = keys + P::keys * tile_size(BLOCK, STATE_TILE);
    float *const inverses = reinterpret_cast<float *>(keys + Shared::planes * tile_size(BLOCK, STATE_TILE));

    const int across = segment.columns / STATE_TILE, tiles = segment.rows / STATE_TILE * across;
    const int head = blockIdx.x / tiles, tile = blockIdx.x % tiles;
    const int row = tile / across * STATE_TILE, column = tile % across * STATE_TILE;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int warp_row = warp % 2 * 32, warp_column = warp / 2 * 32;
    const int blocks = (call.length + BLOCK - 1) / BLOCK;
    const size_t token = size_t(head / call.heads) * call.length * call.heads + head % call.heads;
    const Io *const k = static_cast<const Io *>(call.k) + token * call.dk + row;
    const Io *const v = static_cast<const Io *>(call.v) + token * call.dv + column;
    const size_t stride_k = size_t(call.heads) * call.dk, stride_v = size_t(call.heads) * call.dv;

    const auto load = [&](int block, int stage) {
        unsigned char *const at = stages + stage * Shared::stage;
        const int start = block * BLOCK, valid = call.length - start;
        load_tile<Io, BLOCK, STATE_TILE, STATE_THREADS>(at, k + start * stride_k, stride_k, valid,
                                                        call.dk - row, vector);
        load_tile<Io, BLOCK, STATE_TILE, STATE_THREADS>(at + Shared::raw, v + start * stride_v, stride_v,
                                                        valid, call.dv - column, vector);
        if (threadIdx.x < BLOCK / 4) {
            const float *weights = gates.weight + (size_t(head) * blocks + block) * BLOCK;
            copy_async(at + 2 * Shared::raw + threadIdx.x * 16, weights + threadIdx.x * 4, 16);
        }
        copy_commit();
    };

    // The state as it comes in: this thread's part of C, and one row of n for every two threads of a CTA of the
    // first column of tiles.
    const bool owns_n = column == 0;
    const int n_row = row + threadIdx.x / 2;
    const size_t head_state = size_t(head) * call.dk;
    float C[2][4][4], n = 0.0f;
    float *const carried = segment.carried_C + (size_t(blockIdx.x) * 32) * STATE_THREADS + threadIdx.x;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const int d = row + warp_row + 16 * i + lane / 4 + e / 2 * 8;
                const int c = column + warp_column + 8 * j + lane % 4 * 2 + e % 2;
                if (segment.starts) {
                    const bool valid = d < call.dk && c < call.dv;
                    C[i][j][e] =
                        valid ? to_float(static_cast<const State *>(call.C0)[(head_state + d) * call.dv + c])
                              : 0.0f;
                } else {
                    C[i][j][e] = carried[((i * 4 + j) * 4 + e) * STATE_THREADS];
                }
            }
        }
    }
    if (owns_n) {
        if (segment.starts) n = n_row < call.dk ? call.n0[head_state + n_row] : 0.0f;
        else n = segment.carried_n[size_t(head) * segment.rows + n_row];
    }

    load(segment.first, 0);
    for (int b = 0; b < segment.count; ++b) {
        const int block = segment.first + b;
        unsigned char *const at = stages + b % 2 * Shared::stage;
        const float *const weights = reinterpret_cast<const float *>(at + 2 * Shared::raw);
        const float kept = gates.kept[size_t(head) * blocks + block];
        copy_wait<0>();
        __syncthreads();
        if (b + 1 < segment.count) load(block + 1, (b + 1) % 2);

        if (b % segment.chunk == 0) {
            const int chunks = (segment.count + segment.chunk - 1) / segment.chunk;
            const size_t chunk = size_t(head) * chunks + b / segment.chunk;
            const size_t plane = size_t(segment.rows) * segment.columns;
            bits16 *const to = segment.C + chunk * P::inner * plane;
#pragma unroll
            for (int i = 0; i < 2; ++i) {
#pragma unroll
                for (int j = 0; j < 4; ++j) {
#pragma unroll
                    for (int half = 0; half < 2; ++half) {
                        const int d = row + warp_row + 16 * i + lane / 4 + half * 8;
                        const int c = column + warp_column + 8 * j + lane % 4 * 2;
                        uint32_t bits[P::inner];
                        split<bf16>(C[i][j][2 * half], C[i][j][2 * half + 1], bits);
#pragma unroll
                        for (int p = 0; p < P::inner; ++p)
                            *reinterpret_cast<uint32_t *>(to + p * plane + size_t(d) * segment.columns + c) =
                                bits[p];
                    }
                }
            }
            if (owns_n && threadIdx.x % 2 == 0) segment.n[chunk * segment.rows + n_row] = n;
        }

        if constexpr (scaled_keys<Io>) expand_scaled(keys, at, weights, inverses);
        else expand<Io, BLOCK, STATE_TILE, STATE_THREADS, P::keys>(keys, at, weights);
        if constexpr (!Shared::direct)
            expand<Io, BLOCK, STATE_TILE, STATE_THREADS, P::values>(values, at + Shared::raw, nullptr);
        if (owns_n) {
            float sum = 0.0f;
            for (int j = threadIdx.x % 2; j < BLOCK; j += 2) {
                const Io *key =
                    reinterpret_cast<const Io *>(at + j * raw_pitch<Io>(STATE_TILE)) + threadIdx.x / 2;
                sum += weights[j] * to_float(*key);
            }
            sum += __shfl_xor_sync(WARP, sum, 1);
            n = kept * n + sum;
        }
        __syncthreads();

        float added[2][4][4];
        clear(added);
        const bits16 *const B = Shared::direct ? reinterpret_cast<const bits16 *>(at + Shared::raw) : values;
        multiply<typename P::Key, P::keys, P::values, P::key_order, Layout::transposed, Layout::plain, BLOCK>(
            added, {keys + warp_row, pitch(STATE_TILE), tile_size(BLOCK, STATE_TILE)},
            {B + warp_column, pitch(STATE_TILE), tile_size(BLOCK, STATE_TILE)});
#pragma unroll
        for (int i = 0; i < 2; ++i) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const float unit = scaled_keys<Io> ? inverses[warp_row + 16 * i + 8 * half + lane / 4] : 1.0f;
#pragma unroll
                for (int j = 0; j < 4; ++j) {
#pragma unroll
                    for (int e = 2 * half; e < 2 * half + 2; ++e)
                        C[i][j][e] = fmaf(kept, C[i][j][e], unit * added[i][j][e]);
                }
            }
        }
    }

#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const int d = row + warp_row + 16 * i + lane / 4 + e / 2 * 8;
                const int c = column + warp_column + 8 * j + lane % 4 * 2 + e % 2;
                if (!segment.ends) carried[((i * 4 + j) * 4 + e) * STATE_THREADS] = C[i][j][e];
                else if (d < call.dk && c < call.dv)
                    static_cast<State *>(call.C)[(head_state + d) * call.dv + c] =
                        from_float<State>(C[i][j][e]);
            }
        }
    }
    if (owns_n && threadIdx.x % 2 == 0) {
        if (!segment.ends) segment.carried_n[size_t(head) * segment.rows + n_row] = n;
        else if (n_row < call.dk) call.n[head_state + n_row] = n;
    }
}

}  // namespace xlstm::mlstm
