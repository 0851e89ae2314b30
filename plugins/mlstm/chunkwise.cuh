// S > 1: the scan over the gates, and then, segment by segment, the state pass and the output pass. A segment is
// as much of the sequence as its chunks' states fit into scratch memory of a bounded size.
#pragma once

#include <algorithm>

#include "mlstm/output_pass.cuh"

namespace xlstm::mlstm {

// Blocks of 64 positions to a chunk. A longer chunk writes and reads fewer states, and multiplies more scores.
constexpr int CHUNK = 2;

// States of all chunks of a segment: enough blocks to fill a GPU, little enough to stay in the level 2 cache of
// a large one and to spare the memory of a small one.
constexpr size_t STATE_BYTES = size_t(64) << 20;

// Where everything lies in scratch memory.
struct Scratch {
    int blocks, rows, columns, chunks;  // chunks: of a full segment
    size_t bytes = 0;
    size_t position_gates, block_gates, C, n, carried_C, carried_n;

    template <class Io>
    static Scratch plan(const Mlstm &call) {
        Scratch s;
        const size_t heads = size_t(call.batch) * call.heads;
        s.blocks = (call.length + BLOCK - 1) / BLOCK;
        s.rows = round_up(call.dk, STATE_TILE);
        s.columns = round_up(call.dv, STATE_TILE);
        const size_t elements = heads * s.rows * s.columns;
        const size_t state = elements * Pieces<Io>::inner * sizeof(bits16);
        const size_t all = (s.blocks + CHUNK - 1) / CHUNK;
        s.chunks = int(std::min(all, std::max<size_t>(1, STATE_BYTES / state)));
        s.position_gates = s.take(6 * heads * s.blocks * BLOCK * sizeof(float));
        s.block_gates = s.take(3 * heads * s.blocks * sizeof(float));
        s.C = s.take(state * s.chunks);
        s.n = s.take(heads * s.rows * s.chunks * sizeof(float));
        const bool carries = size_t(s.chunks) < all;
        s.carried_C = s.take(carries ? elements * sizeof(float) : 0);
        s.carried_n = s.take(carries ? heads * s.rows * sizeof(float) : 0);
        return s;
    }

    Gates gates(char *scratch, size_t heads) const {
        float *const positions = reinterpret_cast<float *>(scratch + position_gates);
        float *const per_block = reinterpret_cast<float *>(scratch + block_gates);
        const size_t n = heads * blocks * BLOCK, m = heads * blocks;
        return {positions,         positions + n,     positions + 2 * n, positions + 3 * n,    positions + 4 * n,
                positions + 5 * n, per_block,         per_block + m,     per_block + 2 * m};
    }

    static int round_up(int x, int unit) { return (x + unit - 1) / unit * unit; }

private:
    size_t take(size_t size) {
        const size_t at = bytes;
        bytes += (size + 255) / 256 * 256;
        return at;
    }
};

// Whether rows of 16 bytes are aligned: `count` elements to a row.
inline bool aligned_rows(const void *at, size_t count, size_t size) {
    return reinterpret_cast<uintptr_t>(at) % 16 == 0 && count * size % 16 == 0;
}

template <class Io, class State>
int run_chunkwise(const Mlstm &call, char *scratch, Stream stream) {
    const Scratch plan = Scratch::plan<Io>(call);
    const int heads = call.batch * call.heads;
    const Gates gates = plan.gates(scratch, heads);
    const bool vector = aligned_rows(call.q, call.dk, sizeof(Io)) && aligned_rows(call.k, call.dk, sizeof(Io)) &&
                        aligned_rows(call.v, call.dv, sizeof(Io));
    const int state_tiles = plan.rows / STATE_TILE * (plan.columns / STATE_TILE);
    const int across = (call.dv + output_columns<Io>() - 1) / output_columns<Io>();

    int status = launch(gate_scan, heads, SCAN_WARPS * 32, 0, stream, call, gates);
    for (int first = 0; first < plan.blocks && status == 0; first += plan.chunks * CHUNK) {
        const int count = std::min(plan.blocks - first, plan.chunks * CHUNK);
        const Segment segment{first,
                              count,
                              CHUNK,
                              first == 0,
                              first + count == plan.blocks,
                              plan.rows,
                              plan.columns,
                              reinterpret_cast<bits16 *>(scratch + plan.C),
                              reinterpret_cast<float *>(scratch + plan.n),
                              reinterpret_cast<float *>(scratch + plan.carried_C),
                              reinterpret_cast<float *>(scratch + plan.carried_n)};
        status = launch(state_pass<Io, State>, heads * state_tiles, STATE_THREADS, StateShared<Io>::bytes, stream,
                        call, gates, segment, vector);
        if (status == 0)
            status = launch(output_pass<Io>, heads * count * across, OUTPUT_THREADS,
                            OutputShared<Io>::bytes(plan.rows), stream, call, gates, segment, vector);
    }
    return status;
}

}  // namespace xlstm::mlstm
