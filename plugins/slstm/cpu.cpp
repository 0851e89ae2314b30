// The sLSTM on a CPU behind the interface of common/call.h: checks, and the choice of kernels at run time.
// `context` is a `const xlstm::Parallel *` or null, which means one thread.

#include "slstm/cpu.h"

#include "common/cpu_features.h"

#define XLSTM_EXPORT extern "C" __attribute__((visibility("default")))

const xlstm::SlstmKernels &xlstm::slstm_kernels() {
#if defined(__x86_64__)
    static const SlstmKernels &best =
        best_kernels<SlstmKernels>(slstm_generic, &slstm_avx2, &slstm_avx512, nullptr);
#elif defined(__aarch64__)
    static const SlstmKernels &best =
        best_kernels<SlstmKernels>(slstm_generic, nullptr, nullptr, &slstm_neon);
#else
    static const SlstmKernels &best = slstm_generic;
#endif
    return best;
}

XLSTM_EXPORT const char *xlstm_slstm_check(const xlstm::Slstm *call) {
    using xlstm::Dtype;
    if (call->batch < 1 || call->length < 1 || call->heads < 1 || call->dim < 1) {
        return "batch, length, heads and head size must be at least 1";
    }
    if (call->io != Dtype::f32 || call->weight != Dtype::f32)
        return "the CPU operator computes in float32 only";
    return xlstm::check_function(*call);
}

XLSTM_EXPORT size_t xlstm_slstm_workspace(const xlstm::Slstm *) { return 0; }

XLSTM_EXPORT int xlstm_slstm_run(const xlstm::Slstm *call, void *, void *context) {
    const auto *parallel = static_cast<const xlstm::Parallel *>(context);
    const xlstm::SlstmKernels &kernels = xlstm::slstm_kernels();
    return kernels.scan(*call, parallel) ? 0 : 1;
}
