// The part of CUDA C++ that the kernels use, for a C++17 compiler: keywords, indices, intrinsics. Included in place
// of the CUDA headers (common/launch.h).
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "host/block.h"

#define __global__ inline
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(bytes) alignas(bytes)
// CTAs run one after another on one thread, so one copy of a variable serves them all. Thread-local storage is not
// for threads here: it is the one section that a compiler keeps such variables, and nothing else, together in.
#define __shared__ static thread_local

using cudaStream_t = void *;
using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0, cudaErrorInvalidValue = 1;
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount, cudaDevAttrMaxSharedMemoryPerBlockOptin };

inline cudaError_t cudaGetDevice(int *device) {
    *device = 0;
    return cudaSuccess;
}

inline cudaError_t cudaDeviceGetAttribute(int *value, cudaDeviceAttr attribute, int) {
    const auto &device = xlstm::host::device;
    *value = attribute == cudaDevAttrMultiProcessorCount ? device.processors : device.shared_limit;
    return cudaSuccess;
}

// --- Vectors --------------------------------------------------------------------------------------------------

struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct alignas(8) int2 {
    int x, y;
};
struct alignas(16) int4 {
    int x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline int2 make_int2(int x, int y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }

// --- Barriers, shuffles, votes --------------------------------------------------------------------------------

inline void __syncthreads(XLSTM_HOST_SITE) { xlstm::host::Block::active().barrier(0, 0, {file, line}); }
inline void __syncwarp(unsigned mask = ~0u, XLSTM_HOST_SITE) { xlstm::host::warp_barrier(mask, file, line); }

namespace xlstm::host {

// PTX bar.sync id, count.
inline void named_barrier(int id, int count, XLSTM_HOST_SITE) {
    Block::active().barrier(static_cast<unsigned>(id), static_cast<unsigned>(count), {file, line});
}

template <class T>
struct Shuffle {
    T value;
    unsigned source;  // lane
    unsigned width;
};

template <class T>
T shuffle(unsigned mask, const char *what, T value, unsigned source, int width, const char *file, int line) {
    const Shuffle<T> mine{value, source, static_cast<unsigned>(width)};
    T result;
    const auto exchange = [](const Lanes &lanes) {
        const Block &block = Block::active();
        const unsigned width =
            static_cast<const Shuffle<T> *>(*std::find_if(lanes.in, lanes.in + WARP_SIZE, [](const void *in) {
                return in != nullptr;
            }))->width;
        for (unsigned l = 0; l < WARP_SIZE; ++l) {
            if (lanes.out[l] == nullptr) continue;
            const auto &lane = *static_cast<const Shuffle<T> *>(lanes.in[l]);
            if (lane.width != width)
                block.fail("a shuffle with different widths, %u and %u", width, lane.width);
            const void *const from = lanes.in[lane.source];
            if (from == nullptr)
                block.fail("lane %u shuffles from lane %u, which takes no part", l, lane.source);
            *static_cast<T *>(lanes.out[l]) = static_cast<const Shuffle<T> *>(from)->value;
        }
    };
    warp_collective(mask, what, &mine, &result, exchange, file, line);
    return result;
}

inline unsigned segment(int width) { return lane_index() & ~(static_cast<unsigned>(width) - 1); }

}  // namespace xlstm::host

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, XLSTM_HOST_SITE) {
    const unsigned from = xlstm::host::segment(width) + (static_cast<unsigned>(source) & unsigned(width - 1));
    return xlstm::host::shuffle(mask, "__shfl_sync", value, from, width, file, line);
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int flip, int width = 32, XLSTM_HOST_SITE) {
    const unsigned lane = xlstm::host::lane_index(), from = lane ^ static_cast<unsigned>(flip);
    const bool inside = from < xlstm::host::segment(width) + unsigned(width);
    return xlstm::host::shuffle(mask, "__shfl_xor_sync", value, inside ? from : lane, width, file, line);
}

template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, XLSTM_HOST_SITE) {
    const unsigned lane = xlstm::host::lane_index(), first = xlstm::host::segment(width);
    const unsigned from = lane >= first + delta ? lane - delta : lane;
    return xlstm::host::shuffle(mask, "__shfl_up_sync", value, from, width, file, line);
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, XLSTM_HOST_SITE) {
    const unsigned lane = xlstm::host::lane_index(), end = xlstm::host::segment(width) + unsigned(width);
    const unsigned from = lane + delta < end ? lane + delta : lane;
    return xlstm::host::shuffle(mask, "__shfl_down_sync", value, from, width, file, line);
}

inline unsigned __ballot_sync(unsigned mask, int predicate, XLSTM_HOST_SITE) {
    unsigned result;
    const auto vote = [](const xlstm::host::Lanes &lanes) {
        unsigned bits = 0;
        for (unsigned l = 0; l < xlstm::host::WARP_SIZE; ++l)
            if (lanes.in[l] != nullptr && *static_cast<const int *>(lanes.in[l]) != 0) bits |= 1u << l;
        for (void *out : lanes.out)
            if (out != nullptr) *static_cast<unsigned *>(out) = bits;
    };
    xlstm::host::warp_collective(mask, "__ballot_sync", &predicate, &result, vote, file, line);
    return result;
}

inline int __any_sync(unsigned mask, int predicate, XLSTM_HOST_SITE) {
    return __ballot_sync(mask, predicate, file, line) != 0;
}

inline int __all_sync(unsigned mask, int predicate, XLSTM_HOST_SITE) {
    return __ballot_sync(mask, !predicate, file, line) == 0;
}

// --- Memory and arithmetic ------------------------------------------------------------------------------------

template <class T>
T __ldg(const T *at) {
    return *at;
}

template <class T>
T atomicAdd(T *at, T value) {
    const T old = *at;
    *at = old + value;
    return old;
}

template <class T>
T atomicMax(T *at, T value) {
    const T old = *at;
    *at = std::max(old, value);
    return old;
}

inline void __threadfence() {}
inline void __threadfence_block() {}

inline float __uint_as_float(unsigned bits) {
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}
inline unsigned __float_as_uint(float x) {
    unsigned bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits;
}
inline float __int_as_float(int bits) { return __uint_as_float(static_cast<unsigned>(bits)); }
inline int __float_as_int(float x) { return static_cast<int>(__float_as_uint(x)); }

inline float __fdividef(float x, float y) { return x / y; }
inline float __expf(float x) { return std::exp(x); }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }

using std::max;
using std::min;
