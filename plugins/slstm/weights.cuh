// Recurrent weights by type: how a tile of R lies in shared memory and in registers, and how a warp multiplies it
// with y (README.md, "Product").
//
// A tile is R from `depth` units of the past (k) to all four gates of 16 units of one warp. Its product with y ends
// up in lanes 4 g + t: of units unit(0, g) and unit(1, g), for a batch row that t stands for (Lanes). Each type of
// weights has
//   depth             k of a tile: lane t's are `depth / 4` neighbours
//   rows              batch rows that one CTA takes
//   Part              a tile in registers, 32 of them per lane: set(x...)
//   place(gate, k, c) where the c-th 16 bytes of a row of the tile lie
//   Y                 y as registers of the product; in shared memory, columns of `pitch` bytes
//   Sums<apart>       running sums: add(y, x...), add(y, part); gates(u, t, scale, raw) at the end
//   apart             whether registers allow to sum a product by itself before it is added, see ProductSums
//   for_each(tile, lane, use)     calls use(x...) with all pieces of a tile in shared memory
#pragma once

#include "common/half.h"
#include "common/launch.h"
#include "common/mma.cuh"

namespace xlstm::slstm {

constexpr int UNITS = 16;  // of a tile
constexpr unsigned WARP = 0xffffffffu;

// Which batch row and units the lanes with index t work out. With one or two rows, two lanes share a row, and each has
// one of the two units: gates take as long as the product, and no lane that could do a part of them shall idle.
template <int most_rows>
struct Lanes {
    static constexpr int rows = most_rows;
    static constexpr bool shared = rows <= 2;
    static constexpr int cells = shared ? 1 : 2;  // of each lane, per tile
    __device__ __forceinline__ static int row(int t) { return shared ? t / 2 : t; }
    __device__ __forceinline__ static int second(int u, int t) {
        return shared ? t % 2 : u;
    }  // the a of cell u
};

// One of two lanes' sums: this lane's own part of what it keeps, and the partner's.
__device__ __forceinline__ float exchange(float first, float second, bool keeps_second, int partner) {
    const float kept = keeps_second ? second : first, given = keeps_second ? first : second;
    return kept + __shfl_xor_sync(WARP, given, partner);
}

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

    __device__ __forceinline__ void load(const unsigned char *y, int pitch, int panel, int column, bool used,
                                         int lane) {
#pragma unroll
        for (int x = 0; x < blocks; ++x) {
            uint4 four = make_uint4(0, 0, 0, 0);
            if (used)
                four = *reinterpret_cast<const uint4 *>(y + (x * 8 + column) * pitch + panel * 64 +
                                                        lane % 4 * 16);
            b[x][0] = four.x, b[x][1] = four.y, b[x][2] = four.z, b[x][3] = four.w;
        }
    }

    __device__ __forceinline__ static void put(unsigned char *y, int pitch, int column, int k,
                                               uint16_t bits) {
        *reinterpret_cast<uint16_t *>(y + column * pitch + k * 2) = bits;
    }
};

// `apart`: each product is summed by itself first, because tensor cores cut off what is added to a larger sum. Such
// products do not wait for each other, either, but they take four registers more.
template <bool brain, int blocks, bool apart>
struct ProductSums {
    float d[blocks][2][2][4] = {};  // columns, units, two gates

    __device__ __forceinline__ void add(const PiecesOfY<blocks> &y, int half, int a, int pair,
                                        const uint32_t (&gates)[4]) {
#pragma unroll
        for (int x = 0; x < blocks; ++x) {
            const uint32_t b[2] = {y.b[x][2 * half], y.b[x][2 * half + 1]};
            if constexpr (apart) {
                float part[4] = {};
                product<brain>(part, gates, b);
#pragma unroll
                for (int e = 0; e < 4; ++e) d[x][a][pair][e] += part[e];
            } else {
                product<brain>(d[x][a][pair], gates, b);
            }
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

// Two FP16 pieces: 4 batch rows in 8 columns, or 2 rows in 4 columns that the product has twice.
template <int rows, bool apart>
struct HalfSums : ProductSums<false, 1, apart> {
    __device__ __forceinline__ void gates(int u, int t, Scale scale, float (&raw)[4]) const {
#pragma unroll
        for (int gate = 0; gate < 4; ++gate) {
            const int pair = gate / 2, e = gate % 2 * 2;
            const bool second = Lanes<rows>::second(u, t) == 1;
            const float large = second ? this->d[0][1][pair][e] : this->d[0][0][pair][e];
            const float small = second ? this->d[0][1][pair][e + 1] : this->d[0][0][pair][e + 1];
            raw[gate] = fmaf(small, 0x1p-11f, large) * scale.back;
        }
    }
};

template <int rows>
struct HalfY : PiecesOfY<1> {
    __device__ __forceinline__ static void put(unsigned char *y, int pitch, int row, int k, float value,
                                               Scale scale) {
        value *= scale.factor;
        const f16 large = to_f16(value), small = to_f16((value - to_float(large)) * 0x1p11f);
        PiecesOfY::put(y, pitch, 2 * row, k, large.bits);
        PiecesOfY::put(y, pitch, 2 * row + 1, k, small.bits);
    }
    __device__ __forceinline__ void load(const unsigned char *y, int pitch, int panel, int used_rows,
                                         int lane) {
        const int g = lane / 4, column = Lanes<rows>::shared ? g / 4 * 2 + g % 2 : g;
        PiecesOfY::load(y, pitch, panel, column, column < 2 * used_rows, lane);
    }
};

// Three bfloat16 pieces: 2 batch rows in 8 columns, one column of each row zero, and so a row's sums in two lanes. With
// two blocks of columns, pair p of lanes has row 2 p in the first block and 2 p + 1 in the second.
template <int blocks, bool apart>
struct BrainSums : ProductSums<true, blocks, apart> {
    __device__ __forceinline__ void gates(int u, int t, Scale, float (&raw)[4]) const {
#pragma unroll
        for (int gate = 0; gate < 4; ++gate) {
            const int pair = gate / 2, e = gate % 2 * 2;
            const auto sum = [&](int x, int a) {
                return this->d[x][a][pair][e] + this->d[x][a][pair][e + 1];
            };
            const float first = sum(0, blocks == 1 ? 0 : u),
                        second = blocks == 1 ? sum(0, 1) : sum(blocks - 1, u);
            raw[gate] = exchange(first, second, t % 2 == 1, 1);
        }
    }
};

template <int blocks>
struct BrainY : PiecesOfY<blocks> {
    __device__ __forceinline__ static void put(unsigned char *y, int pitch, int row, int k, float value,
                                               Scale) {
        const int column = blocks == 1 ? row * 4 : row % 2 * 8 + row / 2 * 4;
#pragma unroll
        for (int piece = 0; piece < 3; ++piece) {
            const bf16 bits = to_bf16(value);
            PiecesOfY<blocks>::put(y, pitch, column + piece, k, bits.bits);
            value -= to_float(bits);
        }
    }
    __device__ __forceinline__ void load(const unsigned char *y, int pitch, int panel, int used_rows,
                                         int lane) {
        const int column = lane / 4;
        PiecesOfY<blocks>::load(y, pitch, panel, column, column / 4 * blocks < used_rows, lane);
    }
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

template <int rows>  // 2 or 4
struct HalfWeights : Tile16, Lanes<rows> {
    using Element = f16;
    using Y = HalfY<rows>;
    template <bool apart>
    using Sums = HalfSums<rows, apart>;
    static constexpr bool scaled_y = true, scaled_sums = false, apart = true;
};

template <int rows>  // 2 or 4
struct BrainWeights : Tile16, Lanes<rows> {
    using Element = bf16;
    using Y = BrainY<rows / 2>;
    template <bool apart>
    using Sums = BrainSums<rows / 2, apart>;
    static constexpr bool scaled_y = false, scaled_sums = false, apart = rows == 2;
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
template <int rows>  // 2 or 4
struct IntegerWeights : Lanes<rows> {
    using Element = int8_t;
    using Part = Fragments;
    using Y = HalfY<rows>;
    template <bool apart>
    using Sums = HalfSums<rows, apart>;
    static constexpr int depth = 32, tile_bytes = depth * 4 * UNITS;
    static constexpr bool scaled_y = true, scaled_sums = true, apart = true;

    __device__ static int matrix(int half, int upper, int gate) {
        return ((half * 2 + upper) * 4 + gate) * 128;
    }
    __device__ __forceinline__ static int place(int gate, int k, int) {
        const Order order(k);
        return matrix(order.half, order.upper, gate) + order.row * 16;
    }
    __device__ __forceinline__ static int unit(int a, int g) { return 2 * g + a; }

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
    __device__ __forceinline__ static void put(unsigned char *y, int pitch, int row, int k, float value,
                                               Scale) {
        *reinterpret_cast<float *>(y + row * pitch + k * 4) = value;
    }
};

template <int most_rows>  // 1, 2 or 4
struct SingleWeights : Lanes<most_rows> {
    using Element = float;
    struct Part {
        float w[2][4][4];  // units, gates, k

        __device__ __forceinline__ void set(int a, int gate, int r, float weight) { w[a][gate][r] = weight; }
    };
    using Y = SingleY<most_rows>;
    static constexpr int depth = 16, tile_bytes = depth * 4 * UNITS * 4;
    static constexpr bool scaled_y = false, scaled_sums = false, apart = false;

    // Words [gate][k % 4][a][t][g]: what a warp reads at a time lies side by side.
    __device__ static int word(int gate, int r, int a) { return ((gate * 4 + r) * 2 + a) * 32; }
    __device__ __forceinline__ static int place(int gate, int k, int chunk) {
        return (word(gate, k % 4, chunk / 2) + k / 4 * 8 + chunk % 2 * 4) * 4;
    }
    __device__ __forceinline__ static int unit(int a, int g) { return 8 * a + g; }
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

    template <bool>
    struct Sums {
        float sum[2][4][most_rows] = {};

        __device__ __forceinline__ void add(const Y &y, int a, int gate, int r, float w) {
#pragma unroll
            for (int row = 0; row < most_rows; ++row)
                sum[a][gate][row] = fmaf(w, y.y[row][r], sum[a][gate][row]);
        }

        __device__ __forceinline__ void add(const Y &y, const Part &part) {
#pragma unroll
            for (int r = 0; r < 4; ++r)
#pragma unroll
                for (int a = 0; a < 2; ++a)
#pragma unroll
                    for (int gate = 0; gate < 4; ++gate) add(y, a, gate, r, part.w[a][gate][r]);
        }

        // Over the four lanes t, which share out rows and units: first between t and t + 2, then between neighbours.
        __device__ __forceinline__ void gates(int u, int t, Scale, float (&raw)[4]) const {
            const bool upper = t >= 2, odd = t % 2 == 1;
#pragma unroll
            for (int gate = 0; gate < 4; ++gate) {
                float two[2];
#pragma unroll
                for (int x = 0; x < 2; ++x) {
                    if constexpr (most_rows == 1) {
                        two[x] = sum[x][gate][0] + __shfl_xor_sync(WARP, sum[x][gate][0], 2);
                    } else if constexpr (most_rows == 2) {
                        two[x] = exchange(sum[x][gate][0], sum[x][gate][1], upper, 2);
                    } else {
                        two[x] = exchange(sum[u][gate][x], sum[u][gate][x + 2], upper, 2);
                    }
                }
                raw[gate] = exchange(two[0], two[1], odd, 1);
            }
        }
    };
};

}  // namespace xlstm::slstm
