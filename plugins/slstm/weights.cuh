// Recurrent weights by type: how a tile of R lies in shared memory and in registers, and how a warp multiplies it
// with y (README.md, "Product").
//
// A tile is R from `depth` units of the past (k) to all four gates of 16 units of one warp. Lane 4 g + t of the warp
// works out the gates of units unit(0, g) and unit(1, g) for batch row row(t). Each type of weights has
//   depth             k of a tile: lane t's are `depth / 4` neighbours
//   rows              batch rows that one CTA takes
//   Part              a tile in registers, 32 of them per lane: set(x...)
//   place(gate, k, c) where the c-th 16 bytes of a row of the tile lie
//   Y                 y as registers of the product; in shared memory, columns of `pitch` bytes
//   Sums              running sums: add(y, x...), add(y, part); gates(a, t, scale, raw) at the end
//   for_each(tile, lane, use)     calls use(x...) with all pieces of a tile in shared memory
#pragma once

#include "common/half.h"
#include "common/launch.h"
#include "common/mma.cuh"

namespace xlstm::slstm {

constexpr int UNITS = 16;  // of a tile
constexpr unsigned WARP = 0xffffffffu;

// y times `factor` is what lies in shared memory, `back` undoes it. Powers of two.
struct Scale {
    float factor, back;
};

// --- Tensor cores: 16-bit weights and integers -----------------------------------------------------------------
//
// Rows of a product are the gates (two of them, 8 units each), its columns pieces of y that add up to FP32: two FP16
// pieces per batch row, the second 2^11 times as large as it counts, or three bfloat16 pieces. Both lie in
// neighbouring columns, which one lane sums.

// Position of k (0 to 31) among the 8 x 8 matrices of a tile: the product `half` takes it, in the lower or upper half of
// its own k, in row `row`. Lane t's eight k are neighbours, so that it reads their y at once.
struct Order {
    int half, upper, row;
    __device__ explicit Order(int k) : half(k / 4 % 2), upper(k / 2 % 2), row(k / 8 * 2 + k % 2) {}
};

struct Fragments {
    uint32_t a[2][2][2][4];  // half of k, units, two gates

    __device__ __forceinline__ void set(int half, int units, int pair, const uint32_t (&gates)[4]) {
#pragma unroll
        for (int x = 0; x < 4; ++x) a[half][units][pair][x] = gates[x];
    }
};

template <bool brain>  // bfloat16, otherwise FP16
__device__ __forceinline__ void product(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    if constexpr (brain) mma_bf16(d, a, b);
    else mma_f16(d, a, b);
}

// 8 columns of y by k, in 16-bit pieces; `blocks` such groups of columns.
template <int blocks>
struct PiecesOfY {
    uint32_t b[blocks][4];

    // Bytes from column to column: an odd number of times 64, so that two columns lie in different banks.
    static int pitch(int panels) { return (panels + 1 - panels % 2) * 64; }
    static constexpr int most_columns = blocks * 8;

    // Columns from `used` on are zero.
    __device__ __forceinline__ void load(const unsigned char *y, int pitch, int panel, int used, int lane) {
        const int column = lane / 4;
#pragma unroll
        for (int x = 0; x < blocks; ++x) {
            uint4 four = make_uint4(0, 0, 0, 0);
            const int at = (x * 8 + column) * pitch + panel * 64 + lane % 4 * 16;
            if (column < used) four = *reinterpret_cast<const uint4 *>(y + at);
            b[x][0] = four.x, b[x][1] = four.y, b[x][2] = four.z, b[x][3] = four.w;
        }
    }

    __device__ __forceinline__ static void put(unsigned char *y, int pitch, int column, int k, uint16_t bits) {
        *reinterpret_cast<uint16_t *>(y + column * pitch + k * 2) = bits;
    }
};

template <bool brain, int blocks>
struct ProductSums {
    float d[blocks][2][2][4] = {};  // columns, units, two gates

    __device__ __forceinline__ void add(const PiecesOfY<blocks> &y, int half, int a, int pair,
                                        const uint32_t (&gates)[4]) {
#pragma unroll
        for (int x = 0; x < blocks; ++x) {
            const uint32_t b[2] = {y.b[x][2 * half], y.b[x][2 * half + 1]};
            product<brain>(d[x][a][pair], gates, b);
        }
    }

    __device__ __forceinline__ void add(const PiecesOfY<blocks> &y, const Fragments &part) {
#pragma unroll
        for (int half = 0; half < 2; ++half)
#pragma unroll
            for (int a = 0; a < 2; ++a)
#pragma unroll
                for (int pair = 0; pair < 2; ++pair) add(y, half, a, pair, part.a[half][a][pair]);
    }
};

// Two FP16 pieces: 4 batch rows in 8 columns.
struct HalfSums : ProductSums<false, 1> {
    __device__ __forceinline__ void gates(int a, int, Scale scale, float (&raw)[4]) const {
#pragma unroll
        for (int gate = 0; gate < 4; ++gate) {
            const int pair = gate / 2, e = gate % 2 * 2;
            raw[gate] = fmaf(d[0][a][pair][e + 1], 0x1p-11f, d[0][a][pair][e]) * scale.back;
        }
    }
};

struct HalfY : PiecesOfY<1> {
    __device__ __forceinline__ static void put(unsigned char *y, int pitch, int row, int k, float value, Scale scale) {
        value *= scale.factor;
        const f16 large = to_f16(value), small = to_f16((value - to_float(large)) * 0x1p11f);
        PiecesOfY::put(y, pitch, 2 * row, k, large.bits);
        PiecesOfY::put(y, pitch, 2 * row + 1, k, small.bits);
    }
    __device__ static constexpr int columns(int rows) { return 2 * rows; }
};

// Three bfloat16 pieces: 2 batch rows in 8 columns, one column of each row zero. With two blocks of columns, the row of
// pair p of neighbouring lanes in block x is 2 p + x, so that lane t sums row t.
template <int blocks>
struct BrainSums : ProductSums<true, blocks> {
    __device__ __forceinline__ void gates(int a, int t, Scale, float (&raw)[4]) const {
#pragma unroll
        for (int gate = 0; gate < 4; ++gate) {
            const int pair = gate / 2, e = gate % 2 * 2;
            float sum[blocks];
#pragma unroll
            for (int x = 0; x < blocks; ++x) {
                sum[x] = this->d[x][a][pair][e] + this->d[x][a][pair][e + 1];
                sum[x] += __shfl_xor_sync(WARP, sum[x], 1);
            }
            raw[gate] = t % 2 == 0 ? sum[0] : sum[blocks - 1];
        }
    }
};

template <int blocks>
struct BrainY : PiecesOfY<blocks> {
    __device__ __forceinline__ static void put(unsigned char *y, int pitch, int row, int k, float value, Scale) {
        const int block = blocks == 1 ? 0 : row % 2, pair = blocks == 1 ? row : row / 2;
        const int column = block * 8 + pair * 4;
#pragma unroll
        for (int piece = 0; piece < 3; ++piece) {
            const bf16 bits = to_bf16(value);
            PiecesOfY<blocks>::put(y, pitch, column + piece, k, bits.bits);
            value -= to_float(bits);
        }
    }
    __device__ static constexpr int columns(int rows) { return blocks == 1 ? 4 * rows : 4 * ((rows + 1) / 2); }
};

// 16-bit weights. A tile is 32 matrices of 8 k (rows) by 8 units.
struct Tile16 {
    using Part = Fragments;
    static constexpr int depth = 32, tile_bytes = depth * 4 * UNITS * 2;

    __device__ static int matrix(int half, int upper, int a, int gate) {
        return (((half * 2 + upper) * 2 + a) * 4 + gate) * 128;
    }
    __device__ __forceinline__ static int place(int gate, int k, int chunk) {
        const Order order(k);
        return matrix(order.half, order.upper, chunk, gate) + order.row * 16;
    }
    __device__ __forceinline__ static int unit(int a, int g) { return 8 * a + g; }

    // Calls use(half, a, pair, registers) with all of a tile.
    template <class Use>
    __device__ __forceinline__ static void for_each(const unsigned char *tile, int lane, const Use &use) {
        // Lanes name the rows of four matrices: gates 2 pair and 2 pair + 1 in the lower half of k, then in the upper.
        const unsigned char *const row = tile + matrix(0, lane / 16, 0, lane / 8 % 2) + lane % 8 * 16;
#pragma unroll
        for (int half = 0; half < 2; ++half)
#pragma unroll
            for (int a = 0; a < 2; ++a)
#pragma unroll
                for (int pair = 0; pair < 2; ++pair) {
                    uint32_t gates[4];
                    load_matrices_transposed(gates, row + matrix(half, 0, a, 2 * pair));
                    use(half, a, pair, gates);
                }
    }
};

struct HalfWeights : Tile16 {
    using Element = f16;
    using Y = HalfY;
    using Sums = HalfSums;
    static constexpr int rows = 4;
    static constexpr bool scaled_y = true, scaled_sums = false;
    __device__ __forceinline__ static int row(int t) { return t; }
};

template <int blocks>
struct BrainWeights : Tile16 {
    using Element = bf16;
    using Y = BrainY<blocks>;
    using Sums = BrainSums<blocks>;
    static constexpr int rows = 2 * blocks;
    static constexpr bool scaled_y = false, scaled_sums = false;
    // With one block, both lanes of a pair hold the sum, and the first one uses it.
    __device__ __forceinline__ static int row(int t) { return blocks == 2 ? t : t % 2 == 0 ? t / 2 : rows; }
};

// Two of the integers in `bits` as FP16: bytes 0 and 2, or 1 and 3.
__device__ __forceinline__ uint32_t integers(uint32_t bits, bool odd) {
#ifdef __CUDA_ARCH__
    // 0x6400 + u is the FP16 number 1024 + u for a byte u, here the integer + 128.
    const uint32_t biased = __byte_perm(bits ^ 0x80808080u, 0x64646464u, odd ? 0x4341 : 0x4240);
    uint32_t result;
    asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(result) : "r"(biased), "r"(0x64806480u));
    return result;
#else
    const int first = odd ? 8 : 0;
    return pack_f16(static_cast<int8_t>(bits >> first), static_cast<int8_t>(bits >> (first + 16)));
#endif
}

// Integers, FP16 once they are in registers. A tile is 16 matrices of 8 k by 8 pairs of units.
struct IntegerWeights {
    using Element = int8_t;
    using Part = Fragments;
    using Y = HalfY;
    using Sums = HalfSums;
    static constexpr int depth = 32, tile_bytes = depth * 4 * UNITS;
    static constexpr int rows = 4;
    static constexpr bool scaled_y = true, scaled_sums = true;

    __device__ static int matrix(int half, int upper, int gate) { return ((half * 2 + upper) * 4 + gate) * 128; }
    __device__ __forceinline__ static int place(int gate, int k, int) {
        const Order order(k);
        return matrix(order.half, order.upper, gate) + order.row * 16;
    }
    __device__ __forceinline__ static int unit(int a, int g) { return 2 * g + a; }
    __device__ __forceinline__ static int row(int t) { return t; }

    template <class Use>
    __device__ __forceinline__ static void for_each(const unsigned char *tile, int lane, const Use &use) {
        const unsigned char *const row = tile + matrix(0, lane / 16, lane / 8 % 2) + lane % 8 * 16;
#pragma unroll
        for (int half = 0; half < 2; ++half)
#pragma unroll
            for (int pair = 0; pair < 2; ++pair) {
                uint32_t bytes[4], gates[4];
                load_matrices_transposed(bytes, row + matrix(half, 0, 2 * pair));
#pragma unroll
                for (int a = 0; a < 2; ++a) {
#pragma unroll
                    for (int x = 0; x < 4; ++x) gates[x] = integers(bytes[x], a == 1);
                    use(half, a, pair, gates);
                }
            }
    }
};

// --- FP32 weights: multiply and add ----------------------------------------------------------------------------

template <int most_rows>
struct SingleY {
    float y[most_rows][4];

    static int pitch(int panels) { return panels * 64; }
    static constexpr int most_columns = most_rows;

    __device__ __forceinline__ void load(const unsigned char *at, int pitch, int panel, int, int lane) {
#pragma unroll
        for (int row = 0; row < most_rows; ++row) {
            const float4 four =
                *reinterpret_cast<const float4 *>(at + row * pitch + panel * 64 + lane % 4 * 16);
            y[row][0] = four.x, y[row][1] = four.y, y[row][2] = four.z, y[row][3] = four.w;
        }
    }
    __device__ __forceinline__ static void put(unsigned char *y, int pitch, int row, int k, float value, Scale) {
        *reinterpret_cast<float *>(y + row * pitch + k * 4) = value;
    }
    __device__ static constexpr int columns(int rows) { return rows; }
};

template <int most_rows>  // 1, 2 or 4
struct SingleWeights {
    using Element = float;
    struct Part {
        float w[2][4][4];  // units, gates, k

        __device__ __forceinline__ void set(int a, int gate, int r, float weight) { w[a][gate][r] = weight; }
    };
    using Y = SingleY<most_rows>;
    static constexpr int depth = 16, tile_bytes = depth * 4 * UNITS * 4;
    static constexpr int rows = most_rows;
    static constexpr bool scaled_y = false, scaled_sums = false;

    // Words [gate][k % 4][a][t][g]: what a warp reads at a time lies side by side.
    __device__ static int word(int gate, int r, int a) { return ((gate * 4 + r) * 2 + a) * 32; }
    __device__ __forceinline__ static int place(int gate, int k, int chunk) {
        return (word(gate, k % 4, chunk / 2) + k / 4 * 8 + chunk % 2 * 4) * 4;
    }
    __device__ __forceinline__ static int unit(int a, int g) { return 8 * a + g; }
    // The first of the lanes that end up with a row uses it.
    __device__ __forceinline__ static int row(int t) {
        constexpr int lanes = 4 / most_rows;
        return t % lanes == 0 ? t / lanes : most_rows;
    }

    template <class Use>
    __device__ __forceinline__ static void for_each(const unsigned char *tile, int lane, const Use &use) {
        const float *const words = reinterpret_cast<const float *>(tile) + lane % 4 * 8 + lane / 4;
#pragma unroll
        for (int r = 0; r < 4; ++r)
#pragma unroll
            for (int a = 0; a < 2; ++a)
#pragma unroll
                for (int gate = 0; gate < 4; ++gate) use(a, gate, r, words[word(gate, r, a)]);
    }

    struct Sums {
        float sum[2][4][most_rows] = {};

        __device__ __forceinline__ void add(const Y &y, int a, int gate, int r, float w) {
#pragma unroll
            for (int row = 0; row < most_rows; ++row) sum[a][gate][row] = fmaf(w, y.y[row][r], sum[a][gate][row]);
        }

        __device__ __forceinline__ void add(const Y &y, const Part &part) {
#pragma unroll
            for (int r = 0; r < 4; ++r)
#pragma unroll
                for (int a = 0; a < 2; ++a)
#pragma unroll
                    for (int gate = 0; gate < 4; ++gate) add(y, a, gate, r, part.w[a][gate][r]);
        }

        // Over the four lanes t, which share out the rows: in each step a lane keeps half of them, and adds its
        // partner's sums of those.
        __device__ __forceinline__ void gates(int a, int t, Scale, float (&raw)[4]) const {
#pragma unroll
            for (int gate = 0; gate < 4; ++gate) {
                float s[most_rows];
#pragma unroll
                for (int row = 0; row < most_rows; ++row) s[row] = sum[a][gate][row];
#pragma unroll
                for (int step = 2, left = most_rows; step > 0; step /= 2) {
                    const bool upper = (t & step) != 0;
                    if (left == 1) {
                        s[0] += __shfl_xor_sync(WARP, s[0], step);
                        continue;
                    }
                    left /= 2;
#pragma unroll
                    for (int row = 0; row < left; ++row) {
                        const float mine = upper ? s[row + left] : s[row], other = upper ? s[row] : s[row + left];
                        s[row] = mine + __shfl_xor_sync(WARP, other, step);
                    }
                }
                raw[gate] = s[0];
            }
        }
    };
};

}  // namespace xlstm::slstm
