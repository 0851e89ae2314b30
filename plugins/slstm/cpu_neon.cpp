#define XLSTM_LANES 4
#include "slstm/cpu_kernels.h"

const xlstm::SlstmKernels xlstm::slstm_neon = {"neon", xlstm::slstm_scan};
