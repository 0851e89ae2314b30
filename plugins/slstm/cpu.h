// The sLSTM on a CPU: what the kernels of one instruction set offer, and which one this processor runs.
#pragma once

#include "common/call.h"
#include "common/parallel.h"

namespace xlstm {

struct SlstmKernels {
    const char *name;  // of the instruction set
    // Any S, FP32 throughout; false when there is no memory for scratch space.
    bool (*scan)(const Slstm &call, const Parallel *parallel);
};

extern const SlstmKernels slstm_generic, slstm_avx2, slstm_avx512,
    slstm_neon;  // those of this architecture exist

const SlstmKernels &slstm_kernels();

}  // namespace xlstm
