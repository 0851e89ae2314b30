// The whole sequence in one launch: one CTA per head and group of batch rows, R in registers, then shared memory, the
// rest streamed (README.md, "Plan").
#pragma once

#include "slstm/cell.cuh"
#include "slstm/weights.cuh"

namespace xlstm::slstm {

// Of R, copies under way to shared memory while others are multiplied.
constexpr int RING = 2;

// How a launch divides the work (launch.cu).
struct Plan {
    int panels;              // of R: k in units of Weights::depth
    int y_pitch, y_bytes;    // of the two copies of y at the start of shared memory
    int tiles;               // where tiles of R begin in shared memory; constants lie before them
    int slots;               // tiles there of each warp
    int resident, streamed;  // of each warp's tiles that are not in registers
    bool vector;             // rows of R are aligned to 16 bytes
    bool sliced;             // S is 1, and a head's units are shared out over several CTAs (blockIdx.y)
    const float *y0;         // call.y0, or where it was copied to from there, because other CTAs overwrite it
};

// Starts the copy of a tile of one head's R (D, 4, D): k from `k` on, units from `unit` on. What lies outside becomes
// zero. With `vector`, rows are aligned to 16 bytes; otherwise the copy is made at once, element by element.
template <class Weights>
__device__ __forceinline__ void copy_tile(unsigned char *tile, const typename Weights::Element *R, int k_0,
                                          int unit, int dim, int lane, bool vector) {
    using Element = typename Weights::Element;
    constexpr int width = 16 / sizeof(Element), across = UNITS / width, step = 32 / (4 * across);
    const int chunk = lane % across, gate = lane / across % 4, left = dim - unit - chunk * width;
    const Element *const from = R + (size_t(k_0) * 4 + gate) * dim + unit + chunk * width;
    if (vector) {
#pragma unroll 1
        for (int k = lane / across / 4; k < Weights::depth; k += step) {
            const bool inside = k_0 + k < dim && left > 0;
            copy_async(tile + Weights::place(gate, k, chunk), inside ? from + k * 4 * dim : R,
                       inside ? 16 : 0);
        }
    } else {
#pragma unroll 1
        for (int k = lane / across / 4; k < Weights::depth; k += step) {
            Element *const to = reinterpret_cast<Element *>(tile + Weights::place(gate, k, chunk));
#pragma unroll 1
            for (int e = 0; e < width; ++e)
                to[e] = k_0 + k < dim && e < left ? from[k * 4 * dim + e] : Element{};
        }
    }
}

// From the largest |y| there can be: |c / n| is an average of its past and of tanh. Everyone gets the same.
__device__ __forceinline__ Scale scale_of_y(const Slstm &call, const Plan &plan, int head, int first,
                                            int rows) {
    __shared__ unsigned bound;
    if (threadIdx.x == 0) bound = bits_of_float(1.0f);
    __syncthreads();
    for (int x = threadIdx.x; x < rows * call.dim; x += blockDim.x) {
        const size_t at = (size_t(first + x / call.dim) * call.heads + head) * call.dim + x % call.dim;
        float largest = fabsf(plan.y0[at]);
        if (!plan.sliced && call.n0[at] != 0.0f) largest = fmaxf(largest, fabsf(call.c0[at] / call.n0[at]));
        if (largest > 1.0f && largest < INFINITY) atomicMax(&bound, bits_of_float(largest));
    }
    __syncthreads();
    // At most 2^14 in shared memory: both pieces of y are then in the range of FP16.
    const uint32_t exponent = bound >> 23;
    return {float_of_bits((267 - exponent) << 23), float_of_bits((exponent - 13) << 23)};
}

// `tiles` of 16 units to a warp, of each the first `held` panels of k in registers, the others in the warp's `slots` of
// shared memory, or streamed through the last RING of them. blockIdx.x is the head and group of batch rows.
template <class Weights, int tiles, int held, int threads>
__global__ void __launch_bounds__(threads, 1) scan(Slstm call, Plan plan) {
    XLSTM_DYNAMIC_SHARED(shared);
    using Part = typename Weights::Part;
    using Y = typename Weights::Y;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const int dim = call.dim, head = blockIdx.x % call.heads, first = blockIdx.x / call.heads * Weights::rows;
    const int rows = min(Weights::rows, call.batch - first), row = Weights::row(t);
    float4 *const bias = reinterpret_cast<float4 *>(shared + 2 * plan.y_bytes);  // (D) of gates
    float4 *const factors = bias + dim;                                          // the same of R_scale
    unsigned char *const slot_0 = shared + plan.tiles + warp * plan.slots * Weights::tile_bytes;
    const auto *const R =
        static_cast<const typename Weights::Element *>(call.R) + size_t(head) * dim * 4 * dim;

    // A warp's tiles in the order of their use after the held ones: by panel, then by tile.
    const int first_unit = (blockIdx.y * blockDim.x / 32 + warp) * tiles * UNITS;
    const auto slot = [&](int x) { return slot_0 + x * Weights::tile_bytes; };
    const auto copy = [&](int x, int panel, int tile) {
        copy_tile<Weights>(slot(x), R, panel * Weights::depth, first_unit + tile * UNITS, dim, lane,
                           plan.vector);
    };
    const auto copy_other = [&](int x, int other) { copy(x, held + other / tiles, other % tiles); };

    Part parts[held > 0 ? held : 1][tiles];
#pragma unroll
    for (int x = 0; x < held * tiles; ++x) {
        if (x % plan.slots == 0) {
            __syncwarp();
            for (int next = x; next < min(x + plan.slots, held * tiles); ++next)
                copy(next - x, next / tiles, next % tiles);
            copy_commit();
            copy_wait<0>();
            __syncwarp();
        }
        Part &part = parts[x / tiles][x % tiles];
        Weights::for_each(slot(x % plan.slots), lane, [&](const auto &...piece) { part.set(piece...); });
    }
    __syncwarp();
    for (int x = 0; x < plan.resident; ++x) copy_other(x, x);
    copy_commit();
    if (plan.streamed > 0) {
        for (int x = 0; x < RING; ++x) {
            copy_other(plan.resident + x, plan.resident + x % plan.streamed);
            copy_commit();
        }
    }

    // Constants, the past y, and zeros where there is none.
    for (int x = threadIdx.x; x < 2 * plan.y_bytes / 16; x += blockDim.x)
        reinterpret_cast<uint4 *>(shared)[x] = make_uint4(0, 0, 0, 0);
    const auto copy_gates = [&](float4 *to, const float *from, size_t step) {
        for (int x = threadIdx.x; x < dim; x += blockDim.x)
            to[x] = make_float4(from[x], from[x + step], from[x + 2 * step], from[x + 3 * step]);
    };
    copy_gates(bias, call.bias + size_t(head) * dim, size_t(call.heads) * dim);
    if (Weights::scaled_sums) copy_gates(factors, call.R_scale + size_t(head) * 4 * dim, dim);
    Scale scale = {1.0f, 1.0f};
    if (Weights::scaled_y) scale = scale_of_y(call, plan, head, first, rows);
    else __syncthreads();
    for (int x = threadIdx.x; x < rows * dim; x += blockDim.x) {
        const float y = plan.y0[(size_t(first + x / dim) * call.heads + head) * dim + x % dim];
        Y::put(shared, plan.y_pitch, x / dim, x % dim, y, scale);
    }

    // This lane's cells.
    constexpr int cells = tiles * Weights::cells;
    Cell cell[cells];
    uint32_t x_next[cells][4];
    const size_t width = size_t(call.heads) * dim;                         // elements of x from gate to gate
    const size_t state_0 = (first + row) * width + head * dim;             // of this row's states
    size_t y_at = size_t(first + row) * call.length * width + head * dim;  // of this row's y at a position
    const auto unit = [&](int u) {
        return first_unit + u / Weights::cells * UNITS +
               Weights::unit(Weights::second(u % Weights::cells, t), g);
    };
    const auto active = [&](int u) { return row < rows && unit(u) < dim; };
    const auto fetch_x = [&](size_t y_at) {
        const size_t x_at = 4 * y_at - 3 * head * dim;
#pragma unroll
        for (int u = 0; u < cells; ++u)
#pragma unroll
            for (int gate = 0; gate < 4; ++gate)
                if (active(u)) x_next[u][gate] = fetch(call.x, x_at + gate * width + unit(u), call.io);
    };
#pragma unroll
    for (int u = 0; u < cells; ++u)
        if (active(u))
            cell[u] = {call.c0[state_0 + unit(u)], call.n0[state_0 + unit(u)], call.m0[state_0 + unit(u)]};
    // Where registers allow, x is on its way for a whole step; otherwise for as long as the product takes.
    constexpr bool early = threads <= 256;
    if (early) fetch_x(y_at);
    copy_wait<0>();
    __syncthreads();

    int ring = 0;
    for (int position = 0; position < call.length; ++position) {
        const unsigned char *const y_past = shared + position % 2 * plan.y_bytes;
        unsigned char *const y_present = shared + (1 - position % 2) * plan.y_bytes;
        uint32_t x[cells][4];
        if (early) {
#pragma unroll
            for (int u = 0; u < cells; ++u)
#pragma unroll
                for (int gate = 0; gate < 4; ++gate) x[u][gate] = x_next[u][gate];
        }
        if (!early || position + 1 < call.length) fetch_x(early ? y_at + width : y_at);

        typename Weights::template Sums<early && Weights::apart> sums[tiles];
#pragma unroll
        for (int p = 0; p < held; ++p) {
            if (p >= plan.panels) break;
            Y y;
            y.load(y_past, plan.y_pitch, p, rows, lane);
#pragma unroll
            for (int tile = 0; tile < tiles; ++tile) sums[tile].add(y, parts[p][tile]);
        }
#pragma unroll 1
        for (int p = held, other = 0; p < plan.panels; ++p) {
            Y y;
            y.load(y_past, plan.y_pitch, p, rows, lane);
#pragma unroll
            for (int tile = 0; tile < tiles; ++tile, ++other) {
                const auto multiply = [&](int x) {
                    Weights::for_each(slot(x), lane,
                                      [&](const auto &...piece) { sums[tile].add(y, piece...); });
                };
                if (other < plan.resident) {
                    multiply(other);
                    continue;
                }
                copy_wait<RING - 1>();
                __syncwarp();
                multiply(plan.resident + ring);
                __syncwarp();
                copy_other(plan.resident + ring,
                           plan.resident + (other - plan.resident + RING) % plan.streamed);
                copy_commit();
                ring = (ring + 1) % RING;
            }
        }

        const bool last = position + 1 == call.length;
        float sum[cells][4];
#pragma unroll
        for (int u = 0; u < cells; ++u) sums[u / Weights::cells].gates(u % Weights::cells, t, scale, sum[u]);
#pragma unroll
        for (int u = 0; u < cells; ++u) {
            if (!active(u)) continue;
            const int e = unit(u);
            float4 factor = make_float4(1.0f, 1.0f, 1.0f, 1.0f);
            if (Weights::scaled_sums) factor = factors[e];
            const float4 b = bias[e];
            const auto in = [&](int gate) { return value(early ? x[u][gate] : x_next[u][gate], call.io); };
            const float raw[4] = {
                fmaf(sum[u][0], factor.x, in(0) + b.x), fmaf(sum[u][1], factor.y, in(1) + b.y),
                fmaf(sum[u][2], factor.z, in(2) + b.z), fmaf(sum[u][3], factor.w, in(3) + b.w)};
            const float y = advance(cell[u], raw, call);
            Y::put(y_present, plan.y_pitch, row, e, y, scale);
            store(call.y, y_at + e, y, call.io);
            if (last) {
                call.y_n[state_0 + e] = y, call.c_n[state_0 + e] = cell[u].c;
                call.n_n[state_0 + e] = cell[u].n, call.m_n[state_0 + e] = cell[u].m;
            }
        }
        y_at += width;
        __syncthreads();
    }
    copy_wait<0>();
}

// The past y where slices of a head would overwrite it for each other.
__global__ void copy_past(Slstm call, float *to, int count) {
    const int x = blockIdx.x * blockDim.x + threadIdx.x;
    if (x < count) to[x] = call.y0[x];
}

}  // namespace xlstm::slstm
