// S > 1: the scan over the gates, and then, segment by segment, the state pass and the output pass. A segment is
// as much of the sequence as fills the GPU, if the states of its chunks fit into scratch memory of a bounded size.
#pragma once

#include <algorithm>

#include "mlstm/output_pass.cuh"

namespace xlstm::mlstm {

// Blocks of 64 positions to a chunk. A longer chunk writes and reads fewer states, and multiplies more scores.
constexpr int CHUNK = 2;
static_assert(CHUNK <= MAX_CHUNK);

// States of all chunks of a segment: at most what a large GPU keeps in its level 2 cache.
constexpr size_t STATE_BYTES = size_t(64) << 20;

// CTAs of the output pass to a processor in one segment. More only cost scratch memory.
constexpr int OUTPUT_CTAS = 16;

constexpr int round_up(int x, int unit) { return (x + unit - 1) / unit * unit; }

// Columns of h to a CTA of the output pass. Wide ones compute the scores less often; FP32 has no room for them.
template <class Io>
int output_columns(const Mlstm &call) {
    if (sizeof(Io) == 4 || call.dv <= 64) return 64;
    return OutputShared<Io, 128>::bytes(round_up(call.dk, STATE_TILE)) <= shared_limit() ? 128 : 64;
}

// Bytes of shared memory that a CTA of a sequence needs at least.
template <class Io>
int least_shared(const Mlstm &call) {
    return std::max(int(StateShared<Io>::bytes), OutputShared<Io, 64>::bytes(round_up(call.dk, STATE_TILE)));
}

// Where everything lies in scratch memory.
struct Scratch {
    int heads, blocks, rows, columns, output_columns, chunks;  // chunks: of a full segment
    size_t bytes = 0;
    size_t position_gates, block_gates, C, n, carried_C, carried_n;

    template <class Io>
    static Scratch plan(const Mlstm &call) {
        Scratch s;
        s.heads = call.batch * call.heads;
        s.blocks = (call.length + BLOCK - 1) / BLOCK;
        s.rows = round_up(call.dk, STATE_TILE);
        s.columns = round_up(call.dv, STATE_TILE);
        s.output_columns = mlstm::output_columns<Io>(call);
        const size_t heads = s.heads, elements = heads * s.rows * s.columns;
        const size_t state = elements * Pieces<Io>::inner * sizeof(bits16);
        const size_t all = (s.blocks + CHUNK - 1) / CHUNK, fit = STATE_BYTES / state;
        const size_t ctas = heads * CHUNK * s.across(call);  // of the output pass, to a chunk
        const size_t count = call.processors > 0 ? call.processors : processors();
        const size_t fill = (count * OUTPUT_CTAS + ctas - 1) / ctas;
        s.chunks = int(std::max<size_t>(1, std::min({all, fit, fill})));
        const bool carries = size_t(s.chunks) < all;
        s.position_gates = s.take(6 * heads * s.blocks * BLOCK * sizeof(float));
        s.block_gates = s.take(3 * heads * s.blocks * sizeof(float));
        s.C = s.take(state * s.chunks);
        s.n = s.take(heads * s.rows * s.chunks * sizeof(float));
        s.carried_C = s.take(carries ? elements * sizeof(float) : 0);
        s.carried_n = s.take(carries ? heads * s.rows * sizeof(float) : 0);
        return s;
    }

    int across(const Mlstm &call) const { return (call.dv + output_columns - 1) / output_columns; }

    Gates gates(unsigned char *scratch) const {
        float *const positions = reinterpret_cast<float *>(scratch + position_gates);
        float *const per_block = reinterpret_cast<float *>(scratch + block_gates);
        const size_t n = size_t(heads) * blocks * BLOCK, m = size_t(heads) * blocks;
        return {positions,         positions + n, positions + 2 * n, positions + 3 * n, positions + 4 * n,
                positions + 5 * n, per_block,     per_block + m,     per_block + 2 * m};
    }

    Segment segment(unsigned char *scratch, int first) const {
        const int count = std::min(blocks - first, chunks * CHUNK);
        return {first,
                count,
                CHUNK,
                first == 0,
                first + count == blocks,
                rows,
                columns,
                reinterpret_cast<bits16 *>(scratch + C),
                reinterpret_cast<float *>(scratch + n),
                reinterpret_cast<float *>(scratch + carried_C),
                reinterpret_cast<float *>(scratch + carried_n)};
    }

private:
    size_t take(size_t size) {
        const size_t at = bytes;
        bytes += (size + 255) / 256 * 256;
        return at;
    }
};

// Whether rows of `count` elements of `size` bytes are aligned to 16 bytes.
inline bool aligned_rows(const void *at, size_t count, size_t size) {
    return reinterpret_cast<uintptr_t>(at) % 16 == 0 && count * size % 16 == 0;
}

template <class Io, int columns>
int launch_output(const Mlstm &call, const Gates &gates, const Segment &segment, int ctas, bool vector,
                  Stream stream) {
    return launch(output_pass<Io, columns>, ctas, OUTPUT_THREADS,
                  OutputShared<Io, columns>::bytes(segment.rows), stream, call, gates, segment, vector);
}

template <class Io, class State>
int run_chunkwise(const Mlstm &call, unsigned char *scratch, Stream stream) {
    const Scratch plan = Scratch::plan<Io>(call);
    const Gates gates = plan.gates(scratch);
    const bool vector = aligned_rows(call.q, call.dk, sizeof(Io)) &&
                        aligned_rows(call.k, call.dk, sizeof(Io)) &&
                        aligned_rows(call.v, call.dv, sizeof(Io));
    const int tiles = plan.rows / STATE_TILE * (plan.columns / STATE_TILE);

    int status = launch(gate_scan, plan.heads, SCAN_WARPS * 32, 0, stream, call, gates);
    for (int first = 0; first < plan.blocks && status == 0; first += plan.chunks * CHUNK) {
        const Segment segment = plan.segment(scratch, first);
        status = launch(state_pass<Io, State>, plan.heads * tiles, STATE_THREADS, StateShared<Io>::bytes,
                        stream, call, gates, segment, vector);
        if (status != 0) break;
        const int ctas = plan.heads * segment.count * plan.across(call);
        if constexpr (sizeof(Io) == 2) {
            if (plan.output_columns == 128) {
                status = launch_output<Io, 128>(call, gates, segment, ctas, vector, stream);
                continue;
            }
        }
        status = launch_output<Io, 64>(call, gates, segment, ctas, vector, stream);
    }
    return status;
}

}  // namespace xlstm::mlstm
