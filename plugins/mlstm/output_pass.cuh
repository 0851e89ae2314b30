// Chunkwise form, second pass: the outputs of all blocks of a segment at once, each from the state at the start
// of its chunk and from the positions of the chunk so far (README.md, "Output pass").
#pragma once

#include "mlstm/state_pass.cuh"

namespace xlstm::mlstm {

constexpr int SLICE = 32;  // of Dk, in shared memory at a time
constexpr int OUTPUT_THREADS = 128;
constexpr int MAX_CHUNK = 4;  // blocks

// Decay between two positions of one block, from sums over groups of eight positions. Every sum is over its
// own terms.
struct BlockDecay {
    float within[BLOCK][8];  // [t][j % 8], j <= t in one group: sum of lf over j + 1 .. t
    float to_start[BLOCK];   // sum from the start of the group up to and including the position
    float to_end[BLOCK];     // sum after the position up to the end of the group
    float between[8][8];     // [later group][earlier group]: sum over the groups in between
};

// All threads of the CTA; the results are there after the next barrier.
__device__ __forceinline__ void fill(BlockDecay &decay, const float *lf) {
    const int t = threadIdx.x % BLOCK, group = t / 8;
    if (threadIdx.x < BLOCK) {
        float sum = 0.0f;
        for (int j = t % 8; j >= 0; --j) {
            decay.within[t][j] = sum;
            sum += lf[group * 8 + j];
        }
        decay.to_start[t] = sum;
    } else {
        float sum = 0.0f;
        for (int l = group * 8 + 7; l > t; --l) sum += lf[l];
        decay.to_end[t] = sum;
        if (t < 8) {
            float over = 0.0f;
            for (int later = t + 1; later < 8; ++later) {
                decay.between[later][t] = over;
                for (int l = 0; l < 8; ++l) over += lf[later * 8 + l];
            }
        }
    }
}

// Sum of lf over j + 1 .. t of one block, j <= t.
__device__ __forceinline__ float decay_between(const BlockDecay &decay, int t, int j) {
    const int later = t / 8, earlier = j / 8;
    if (later == earlier) return decay.within[t][j % 8];
    return decay.to_end[j] + decay.between[later][earlier] + decay.to_start[t];
}

template <class Io, int columns>
struct OutputShared {
    using P = Pieces<Io>;
    static constexpr bool direct = P::input == 1;           // raw tiles are bfloat16 planes as they are
    static constexpr bool scores_direct = sizeof(Io) == 2;  // q and k are multiplied in their own type
    static constexpr int raw_slice = BLOCK * raw_pitch<Io>(SLICE);
    static constexpr int raw_values = BLOCK * raw_pitch<Io>(columns);
    static constexpr int state_plane = tile_size(SLICE, columns) * int(sizeof(bits16));
    static constexpr int stage = 2 * raw_slice + P::inner * state_plane;  // q, k, C
    static constexpr int slice_plane = tile_size(BLOCK, SLICE) * int(sizeof(bits16));
    static constexpr int value_plane = tile_size(BLOCK, columns) * int(sizeof(bits16));
    static constexpr int score_plane = tile_size(BLOCK, BLOCK) * int(sizeof(bits16));
    static constexpr int values = 2 * stage;
    static constexpr int scores = values + raw_values;
    // Planes of q and k, and later those of v in their place.
    static constexpr int planes = scores + P::inner * score_plane;
    static constexpr int slice_planes = (scores_direct ? 1 : 2) * slice_plane;
    static constexpr int both = slice_planes > value_plane ? slice_planes : value_plane;
    static constexpr int floats = planes + (direct ? 0 : P::input * both);
    static constexpr int fixed = floats + int(sizeof(BlockDecay));
    // n, then i and to_end of the positions of the chunk, then of this block's positions
    // m, decay since the start of the block, two sums of scores, and q·n
    static int bytes(int rows) {
        return fixed + (rows + 2 * MAX_CHUNK * BLOCK + 5 * BLOCK) * int(sizeof(float));
    }
};

// One CTA per head, block and COLUMNS of h. Four warps, two by two, each with 32 positions. For the block
// itself and then for the earlier blocks of its chunk: scores S = q kᵀ over slices of Dk, weighted to E, then
// h += E v. The state's part, q C, comes with the slices of the first of these rounds.
template <class Io, int COLUMNS>
__global__ void __launch_bounds__(OUTPUT_THREADS, 2)
    output_pass(Mlstm call, Gates gates, Segment segment, bool vector) {
    using P = Pieces<Io>;
    using Shared = OutputShared<Io, COLUMNS>;
    constexpr int N = COLUMNS / 16;  // tiles of 8 columns to a warp
    XLSTM_DYNAMIC_SHARED(shared);
    bits16 *const scores = reinterpret_cast<bits16 *>(shared + Shared::scores);
    bits16 *const planes_q = reinterpret_cast<bits16 *>(shared + Shared::planes);
    bits16 *const planes_k = planes_q + P::input * tile_size(BLOCK, SLICE);
    bits16 *const planes_v = planes_q;
    BlockDecay &decay = *reinterpret_cast<BlockDecay *>(shared + Shared::floats);
    float *const state_n = reinterpret_cast<float *>(shared + Shared::fixed);
    float *const chunk_i = state_n + segment.rows, *const chunk_end = chunk_i + MAX_CHUNK * BLOCK;
    float *const row_m = chunk_end + MAX_CHUNK * BLOCK, *const row_start = row_m + BLOCK;
    float *const row_sums = row_start + BLOCK, *const row_qn = row_sums + 2 * BLOCK;

    const int across = (call.dv + COLUMNS - 1) / COLUMNS;
    const int column = blockIdx.x % across * COLUMNS;
    const int b = blockIdx.x / across % segment.count, head = blockIdx.x / across / segment.count;
    const int block = segment.first + b, earlier = b % segment.chunk;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int warp_row = warp % 2 * 32, side = warp / 2;
    const int blocks = (call.length + BLOCK - 1) / BLOCK;
    const size_t token = size_t(head / call.heads) * call.length * call.heads + head % call.heads;
    const Io *const q = static_cast<const Io *>(call.q) + token * call.dk;
    const Io *const k = static_cast<const Io *>(call.k) + token * call.dk;
    const Io *const v = static_cast<const Io *>(call.v) + token * call.dv + column;
    const size_t stride_k = size_t(call.heads) * call.dk, stride_v = size_t(call.heads) * call.dv;
    const int chunks = (segment.count + segment.chunk - 1) / segment.chunk;
    const size_t chunk = size_t(head) * chunks + b / segment.chunk;
    const size_t plane = size_t(segment.rows) * segment.columns;
    const bits16 *const C = segment.C + chunk * P::inner * plane + column;

    const int slices = (call.dk + SLICE - 1) / SLICE, rounds = (earlier + 1) * slices;
    const auto load = [&](int round) {
        unsigned char *const at = shared + round % 2 * Shared::stage;
        const int d = round % slices * SLICE, from = (block - round / slices) * BLOCK;
        load_tile<Io, BLOCK, SLICE, OUTPUT_THREADS>(at, q + size_t(block) * BLOCK * stride_k + d, stride_k,
                                                    call.length - block * BLOCK, call.dk - d, vector);
        load_tile<Io, BLOCK, SLICE, OUTPUT_THREADS>(at + Shared::raw_slice, k + from * stride_k + d, stride_k,
                                                    call.length - from, call.dk - d, vector);
        if (round < slices) {
            for (int p = 0; p < P::inner; ++p) {
                load_tile<bits16, SLICE, COLUMNS, OUTPUT_THREADS>(
                    at + 2 * Shared::raw_slice + p * Shared::state_plane,
                    C + p * plane + size_t(d) * segment.columns, segment.columns, SLICE,
                    segment.columns - column, true);
            }
        }
    };
    load(0);
    copy_commit();

    // What the gates say about this block and its chunk.
    const size_t block_gates = size_t(head) * blocks + block, chunk_start = block_gates - earlier;
    float since_start = 0.0f;  // sum of lf over the chunk's earlier blocks
    for (int x = 0; x < earlier; ++x) since_start += gates.total[chunk_start + x];
    for (int d = threadIdx.x; d < segment.rows; d += OUTPUT_THREADS)
        state_n[d] = segment.n[chunk * segment.rows + d];
    for (int j = threadIdx.x; j < (earlier + 1) * BLOCK; j += OUTPUT_THREADS) {
        chunk_i[j] = gates.i[chunk_start * BLOCK + j];
        chunk_end[j] = gates.to_end[chunk_start * BLOCK + j];
    }
    if (threadIdx.x < BLOCK) {
        row_m[threadIdx.x] = gates.m[block_gates * BLOCK + threadIdx.x];
        row_start[threadIdx.x] = gates.to_start[block_gates * BLOCK + threadIdx.x];
    }
    fill(decay, gates.lf + block_gates * BLOCK);
    const float m_0 = gates.m_0[chunk_start];

    float S[2][4][4], H[2][N][4], sums[2][2] = {};
    float qn = 0.0f;          // this thread's half of q·n for position threadIdx.x / 2
    float in_between = 0.0f;  // sum of lf over the blocks between the keys' block and this one
    clear(S);
    clear(H);
    for (int round = 0; round < rounds; ++round) {
        const int slice = round % slices, back = round / slices;  // keys are `back` blocks behind
        unsigned char *const at = shared + round % 2 * Shared::stage;
        copy_wait<0>();
        __syncthreads();
        if (slice == 0) {
            const int from = (block - back) * BLOCK;
            load_tile<Io, BLOCK, COLUMNS, OUTPUT_THREADS>(shared + Shared::values, v + from * stride_v,
                                                          stride_v, call.length - from, call.dv - column,
                                                          vector);
        }
        if (round + 1 < rounds) load(round + 1);
        copy_commit();

        const auto raw = [](const unsigned char *tile) { return reinterpret_cast<const bits16 *>(tile); };
        constexpr int slice_plane = tile_size(BLOCK, SLICE);
        if constexpr (!Shared::direct) {
            if (!Shared::scores_direct || back == 0)
                expand<Io, BLOCK, SLICE, OUTPUT_THREADS, P::input>(planes_q, at, nullptr);
            if (!Shared::scores_direct)
                expand<Io, BLOCK, SLICE, OUTPUT_THREADS, P::input>(planes_k, at + Shared::raw_slice, nullptr);
            __syncthreads();
        }
        const bits16 *const q_at = (Shared::direct ? raw(at) : planes_q) + warp_row * pitch(SLICE);
        if constexpr (Shared::scores_direct) {
            multiply<Io, 1, 1, 1, Layout::plain, Layout::transposed, SLICE>(
                S, {raw(at) + warp_row * pitch(SLICE), pitch(SLICE), slice_plane},
                {raw(at + Shared::raw_slice) + side * 32 * pitch(SLICE), pitch(SLICE), slice_plane});
        } else {
            multiply<bf16, P::input, P::input, P::order, Layout::plain, Layout::transposed, SLICE>(
                S, {q_at, pitch(SLICE), slice_plane},
                {planes_k + side * 32 * pitch(SLICE), pitch(SLICE), slice_plane});
        }
        if (back == 0) {
            const bits16 *const state = reinterpret_cast<const bits16 *>(at + 2 * Shared::raw_slice);
            multiply<bf16, P::input, P::inner, P::order, Layout::plain, Layout::plain, SLICE>(
                H, {q_at, pitch(SLICE), slice_plane},
                {state + side * COLUMNS / 2, pitch(COLUMNS), tile_size(SLICE, COLUMNS)});
            const Io *const row = reinterpret_cast<const Io *>(at + threadIdx.x / 2 * raw_pitch<Io>(SLICE));
            for (int d = threadIdx.x % 2; d < SLICE && slice * SLICE + d < segment.rows; d += 2)
                qn = fmaf(to_float(row[d]), state_n[slice * SLICE + d], qn);
        }
        if (slice + 1 < slices) continue;

        // All of Dk is in S: E = scale · S · weight, and what the state contributes gets its decay.
#pragma unroll
        for (int i = 0; i < 2; ++i) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int t = warp_row + 16 * i + 8 * half + lane / 4;
                const float m = row_m[t];
                if (back == 0) {
                    const float carried = call.scale * expf(since_start + row_start[t] + (m_0 - m));
#pragma unroll
                    for (int j = 0; j < N; ++j)
                        for (int e = 0; e < 2; ++e) H[i][j][2 * half + e] *= carried;
                }
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    float E[2];
#pragma unroll
                    for (int e = 0; e < 2; ++e) {
                        const int s = side * 32 + 8 * j + lane % 4 * 2 + e;  // position of the key
                        const int in_chunk = (earlier - back) * BLOCK + s;
                        float weight = 0.0f;
                        if (back > 0 || s <= t) {
                            const float lf = back == 0 ? decay_between(decay, t, s)
                                                       : chunk_end[in_chunk] + in_between + row_start[t];
                            weight = expf(lf + (chunk_i[in_chunk] - m));
                        }
                        E[e] = weight == 0.0f ? 0.0f : call.scale * S[i][j][2 * half + e] * weight;
                        sums[i][half] += E[e];
                    }
                    store_pieces<bf16, P::inner>(scores + t * pitch(BLOCK) + side * 32 + 8 * j + lane % 4 * 2,
                                                 tile_size(BLOCK, BLOCK), E[0], E[1]);
                }
            }
        }
        if (back > 0) in_between += gates.total[block_gates - back];
        copy_wait<0>();
        __syncthreads();
        if constexpr (!Shared::direct) {
            expand<Io, BLOCK, COLUMNS, OUTPUT_THREADS, P::input>(planes_v, shared + Shared::values, nullptr);
            __syncthreads();
        }
        const bits16 *const V =
            Shared::direct ? reinterpret_cast<const bits16 *>(shared + Shared::values) : planes_v;
        multiply<bf16, P::inner, P::input, P::order, Layout::plain, Layout::plain, BLOCK>(
            H, {scores + warp_row * pitch(BLOCK), pitch(BLOCK), tile_size(BLOCK, BLOCK)},
            {V + side * COLUMNS / 2, pitch(COLUMNS), tile_size(BLOCK, COLUMNS)});
        clear(S);
    }

    // The normalizer: (scale·q)ᵀn' = sum of E + decayed (scale·q)ᵀn.
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float sum = sums[i][half];
            sum += __shfl_xor_sync(WARP, sum, 1);
            sum += __shfl_xor_sync(WARP, sum, 2);
            if (lane % 4 == 0) row_sums[side * BLOCK + warp_row + 16 * i + 8 * half + lane / 4] = sum;
        }
    }
    qn += __shfl_xor_sync(WARP, qn, 1);
    if (threadIdx.x % 2 == 0) row_qn[threadIdx.x / 2] = qn;
    __syncthreads();

#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int t = warp_row + 16 * i + 8 * half + lane / 4, position = block * BLOCK + t;
            if (position >= call.length) continue;
            const float m = row_m[t], carried = call.scale * expf(since_start + row_start[t] + (m_0 - m));
            const float total = row_sums[t] + row_sums[BLOCK + t] + carried * row_qn[t];
            const float normalizer = normalizer_of(call, total, m);
            Io *const h = static_cast<Io *>(call.h) + (token + size_t(position) * call.heads) * call.dv;
#pragma unroll
            for (int j = 0; j < N; ++j) {
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    const int c = column + side * COLUMNS / 2 + 8 * j + lane % 4 * 2 + e;
                    if (c < call.dv) h[c] = from_float<Io>(H[i][j][2 * half + e] / normalizer);
                }
            }
        }
    }
}

}  // namespace xlstm::mlstm
