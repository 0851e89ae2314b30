// The mLSTM on a CPU: what the kernels of one instruction set offer, and which one this processor runs.
#pragma once

#include "common/call.h"
#include "common/parallel.h"

namespace xlstm {

struct MlstmKernels {
    const char *name;  // of the instruction set
    // S = 1 and any S, FP32 throughout; false when there is no memory for scratch space.
    bool (*step)(const Mlstm &call, const Parallel *parallel);
    bool (*chunkwise)(const Mlstm &call, const Parallel *parallel);
};

extern const MlstmKernels mlstm_generic, mlstm_avx2, mlstm_avx512,
    mlstm_neon;  // those of this architecture exist

const MlstmKernels &mlstm_kernels();

}  // namespace xlstm
