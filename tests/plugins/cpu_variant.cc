// The CPU kernels of one instruction set (XLSTM_VARIANT) behind the interface of common/call.h, so that tests
// reach those that this processor would not choose, and the functions of simd.h for vectors of XLSTM_LANES.

#include "mlstm/cpu.h"
#include "slstm/cpu.h"

#include "common/simd.h"

#define JOIN(a, b) a##b
#define VARIANT(op, name) JOIN(op, name)

extern "C" {

const char *xlstm_mlstm_check(const xlstm::Mlstm *) { return nullptr; }
size_t xlstm_mlstm_workspace(const xlstm::Mlstm *) { return 0; }
int xlstm_mlstm_run(const xlstm::Mlstm *call, void *, void *) {
    const xlstm::MlstmKernels &kernels = xlstm::VARIANT(mlstm_, XLSTM_VARIANT);
    return (call->length == 1 ? kernels.step : kernels.chunkwise)(*call, nullptr) ? 0 : 1;
}

const char *xlstm_slstm_check(const xlstm::Slstm *) { return nullptr; }
size_t xlstm_slstm_workspace(const xlstm::Slstm *) { return 0; }
int xlstm_slstm_run(const xlstm::Slstm *call, void *, void *) {
    return xlstm::VARIANT(slstm_, XLSTM_VARIANT).scan(*call, nullptr) ? 0 : 1;
}

// y[j] = function(x[j]) for whole vectors: 0 exp, 1 log1p_unit, 2 log_sigmoid, 3 sigmoid, 4 tanh.
void apply(int function, const float *x, float *y, size_t count) {
    using namespace xlstm;
    Vec (*const table[])(Vec) = {exp, log1p_unit, log_sigmoid, sigmoid, tanh};
    for (size_t at = 0; at + kLanes <= count; at += kLanes) store(y + at, table[function](load(x + at)));
}
}
