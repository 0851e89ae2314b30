#define XLSTM_LANES 8
#include "mlstm/cpu_kernels.h"

const xlstm::MlstmKernels xlstm::mlstm_avx2 = {"avx2", xlstm::mlstm_step, xlstm::mlstm_chunkwise};
