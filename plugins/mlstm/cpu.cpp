// The mLSTM on a CPU behind the interface of common/call.h: checks, and the choice of kernels at run time.
// `context` is a `const xlstm::Parallel *` or null, which means one thread.

#include "mlstm/cpu.h"

#include "common/cpu_features.h"

#define XLSTM_EXPORT extern "C" __attribute__((visibility("default")))

const xlstm::MlstmKernels &xlstm::mlstm_kernels() {
#if defined(__x86_64__)
    static const MlstmKernels &best =
        best_kernels<MlstmKernels>(mlstm_generic, &mlstm_avx2, &mlstm_avx512, nullptr);
#elif defined(__aarch64__)
    static const MlstmKernels &best =
        best_kernels<MlstmKernels>(mlstm_generic, nullptr, nullptr, &mlstm_neon);
#else
    static const MlstmKernels &best = mlstm_generic;
#endif
    return best;
}

XLSTM_EXPORT const char *xlstm_mlstm_check(const xlstm::Mlstm *call) {
    using xlstm::Dtype;
    if (call->batch < 1 || call->length < 1 || call->heads < 1 || call->dk < 1 || call->dv < 1) {
        return "batch, length, heads and head sizes must be at least 1";
    }
    if (call->io != Dtype::f32 || call->state != Dtype::f32)
        return "the CPU operator computes in float32 only";
    return xlstm::check_function(*call);
}

XLSTM_EXPORT size_t xlstm_mlstm_workspace(const xlstm::Mlstm *) { return 0; }

XLSTM_EXPORT int xlstm_mlstm_run(const xlstm::Mlstm *call, void *, void *context) {
    const auto *parallel = static_cast<const xlstm::Parallel *>(context);
    const xlstm::MlstmKernels &kernels = xlstm::mlstm_kernels();
    const bool done = call->length == 1 ? kernels.step(*call, parallel) : kernels.chunkwise(*call, parallel);
    return done ? 0 : 1;
}
