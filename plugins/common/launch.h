// Kernel launches, written once for a GPU and for the fibers of host/ that run the same kernels on a CPU.
#pragma once

#include <cstddef>

#ifdef __CUDACC__
#include <cuda_runtime.h>
#else
#include "host/cuda.h"
#endif

// Dynamic shared memory of a kernel as `unsigned char name[]`, aligned to 128 bytes.
#ifdef __CUDACC__
#define XLSTM_DYNAMIC_SHARED(name) extern __shared__ __align__(128) unsigned char name[]
#else
#define XLSTM_DYNAMIC_SHARED(name) unsigned char *const name = ::xlstm::host::dynamic_shared()
#endif

namespace xlstm {

using Stream = cudaStream_t;

namespace detail {

// Its type is not deduced, so that arguments convert to a kernel's parameters.
template <class T>
struct Same {
    using type = T;
};

inline int device_value(cudaDeviceAttr attribute) {
    int device = 0, value = 0;
    if (cudaGetDevice(&device) != cudaSuccess) return 0;
    if (cudaDeviceGetAttribute(&value, attribute, device) != cudaSuccess) return 0;
    return value;
}

}  // namespace detail

// Streaming multiprocessors of the current device; 1 where there is none.
inline int processors() {
    const int count = detail::device_value(cudaDevAttrMultiProcessorCount);
    return count > 0 ? count : 1;
}

// Bytes of shared memory that a CTA can have on the current device; where there is none, as on a large one.
inline int shared_limit() {
    const int bytes = detail::device_value(cudaDevAttrMaxSharedMemoryPerBlockOptin);
    return bytes > 0 ? bytes : 227 * 1024;
}

// Starts `kernel` on a grid of CTAs of `threads` threads with `shared` bytes of dynamic shared memory. Returns
// 0 or a cudaError_t; an error of the kernel itself shows in a later call, as usual.
template <class... Parameters>
int launch(void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared, Stream stream,
           typename detail::Same<Parameters>::type... arguments) {
#ifdef __CUDACC__
    if (shared > 48 * 1024) {
        const cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                        static_cast<int>(shared));
        if (status != cudaSuccess) return static_cast<int>(status);
    }
    kernel<<<grid, threads, shared, stream>>>(arguments...);
    return static_cast<int>(cudaGetLastError());
#else
    (void)stream;
    return host::run(grid, threads, shared, [&] { kernel(arguments...); });
#endif
}

}  // namespace xlstm
