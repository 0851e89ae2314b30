#define XLSTM_LANES 4
#include "mlstm/cpu_kernels.h"

const xlstm::MlstmKernels xlstm::mlstm_neon = {"neon", xlstm::mlstm_step, xlstm::mlstm_chunkwise};
