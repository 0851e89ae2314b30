// Kernels with and without mistakes, for test_host_fibers.py. Each function runs one of them on host memory.
#include "common/half.h"
#include "common/launch.h"

using namespace xlstm;

namespace {

constexpr unsigned WARP = 0xffffffffu;

__global__ void reverse(const float *x, float *y, bool barrier) {
    __shared__ float values[128];
    values[threadIdx.x] = x[threadIdx.x];
    if (barrier) __syncthreads();
    y[threadIdx.x] = values[blockDim.x - 1 - threadIdx.x];
}

enum Divergence { none, other_place, one_more, early_return, in_warp };  // of barriers

__global__ void diverge(Divergence what, int *y) {
    const int x = threadIdx.x;
    if (what == early_return && x % 2 == 1) return;
    if (what == other_place && x >= 32) {
        __syncthreads();
    } else {
        __syncthreads();
    }
    if (what == one_more && x == 5) __syncthreads();
    if (what == in_warp) {
        if (x >= 32 && x < 48) {
            __syncwarp();
        } else {
            __syncthreads();
        }
    }
    y[x] = x;
}

template <class T>
__global__ void unwritten(T *y, bool dynamic) {
    XLSTM_DYNAMIC_SHARED(shared);
    __shared__ T values[64];
    const T *const from = dynamic ? reinterpret_cast<const T *>(shared) : values;
    y[blockIdx.x * 64 + threadIdx.x] = from[threadIdx.x];
    values[threadIdx.x] = T{};
    reinterpret_cast<T *>(shared)[threadIdx.x] = T{};
}

// y (6, 64): what lanes get.
__global__ void shuffles(const int *x, int *y) {
    const int t = threadIdx.x, mine = x[t];
    y[t] = __shfl_xor_sync(WARP, mine, 5);
    y[64 + t] = __shfl_down_sync(WARP, mine, 3);
    y[128 + t] = __shfl_up_sync(WARP, mine, 3);
    y[192 + t] = __shfl_sync(WARP, mine, t * 7 % 32);
    y[256 + t] = __shfl_xor_sync(WARP, mine, 1, 8) + __shfl_down_sync(WARP, mine, 3, 8);
    // Two halves of a warp on ways of their own.
    if (t % 32 < 16) {
        for (int i = 0; i < 3; ++i) y[320 + t] = __shfl_sync(0x0000ffffu, mine, 2);
    } else {
        y[320 + t] = static_cast<int>(__ballot_sync(0xffff0000u, mine % 2));
    }
}

enum Mistake { foreign_mask, absent_lane, other_operation, other_width };

__global__ void wrong_shuffle(Mistake what, int *y) {
    const int t = threadIdx.x;
    int value = t;
    if (what == foreign_mask) value = __shfl_sync(0x0000ffffu, value, 1);
    if (what == absent_lane && t < 16) value = __shfl_sync(0x0000ffffu, value, 20);
    if (what == other_operation)
        value = t < 16 ? __shfl_sync(WARP, value, 0) : __shfl_xor_sync(WARP, value, 1);
    if (what == other_width) value = __shfl_sync(WARP, value, 0, t < 16 ? 16 : 32);
    y[t] = value;
}

// Warps 0 and 1 fill one buffer after another, warps 2 and 3 read them: barriers 1 and 2 say "full" and "empty".
__global__ void handed_over(int *y, int rounds) {
    __shared__ int buffer[64];
    const int t = threadIdx.x % 64;
    for (int r = 0; r < rounds; ++r) {
        if (threadIdx.x < 64) buffer[63 - t] = 100 * r + t;
        host::named_barrier(1, 128);
        if (threadIdx.x >= 64) y[r * 64 + t] = buffer[t];
        host::named_barrier(2, 128);
    }
    if (threadIdx.x < 64) host::named_barrier(3, 64);
}

__global__ void grid_sum(float *sum) { atomicAdd(sum, float(1 + blockIdx.x + 10 * blockIdx.y)); }

__global__ void past_the_end(float *y) {
    XLSTM_DYNAMIC_SHARED(shared);
    y[threadIdx.x] = reinterpret_cast<float *>(shared)[threadIdx.x];
}

}  // namespace

extern "C" {
int run_reverse(const float *x, float *y, int barrier) {
    return launch(reverse, 1, 128, 0, nullptr, x, y, barrier);
}
int run_diverge(int what, int *y) { return launch(diverge, 1, 64, 0, nullptr, Divergence(what), y); }
int run_unwritten(float *y, int dynamic) { return launch(unwritten<float>, 2, 64, 256, nullptr, y, dynamic); }
int run_unwritten_half(uint16_t *y) { return launch(unwritten<uint16_t>, 2, 64, 128, nullptr, y, false); }
int run_shuffles(const int *x, int *y) { return launch(shuffles, 1, 64, 0, nullptr, x, y); }
int run_wrong_shuffle(int what, int *y) { return launch(wrong_shuffle, 1, 32, 0, nullptr, Mistake(what), y); }
int run_handed_over(int *y, int rounds) { return launch(handed_over, 1, 128, 0, nullptr, y, rounds); }
int run_grid_sum(float *y) { return launch(grid_sum, dim3(3, 2), 40, 0, nullptr, y); }
int run_past_the_end(float *y) { return launch(past_the_end, 1, 64, 63 * 4, nullptr, y); }
int run_with_shared(int bytes, float *y) {
    return launch(past_the_end, 1, 1, static_cast<size_t>(bytes), nullptr, y);
}

void halves_to_float(const f16 *x, float *y, int count) {
    for (int i = 0; i < count; ++i) y[i] = to_float(x[i]);
}
void bfloats_to_float(const bf16 *x, float *y, int count) {
    for (int i = 0; i < count; ++i) y[i] = to_float(x[i]);
}
void float_to_halves(const float *x, f16 *y, int count) {
    for (int i = 0; i < count; ++i) y[i] = from_float<f16>(x[i]);
}
void float_to_bfloats(const float *x, bf16 *y, int count) {
    for (int i = 0; i < count; ++i) y[i] = from_float<bf16>(x[i]);
}
}
