#define XLSTM_LANES 4
#include "mlstm/cpu_kernels.h"

const xlstm::MlstmKernels xlstm::mlstm_generic = {"generic", xlstm::mlstm_step, xlstm::mlstm_chunkwise};
