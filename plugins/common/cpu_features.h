// Which instruction set of the CPU kernels this processor runs.
#pragma once

namespace xlstm {

// The first of what is given that can run here; `generic` always can.
template <typename Kernels>
const Kernels &best_kernels(const Kernels &generic, const Kernels *avx2, const Kernels *avx512,
                            const Kernels *neon) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (avx512 != nullptr && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl")) {
        return *avx512;
    }
    if (avx2 != nullptr && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return *avx2;
#elif defined(__aarch64__)
    if (neon != nullptr) return *neon;  // part of the architecture
#endif
    (void)avx2, (void)avx512, (void)neon;
    return generic;
}

}  // namespace xlstm
