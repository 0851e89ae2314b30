#define XLSTM_LANES 16
#include "mlstm/cpu_kernels.h"

const xlstm::MlstmKernels xlstm::mlstm_avx512 = {"avx512", xlstm::mlstm_step, xlstm::mlstm_chunkwise};
