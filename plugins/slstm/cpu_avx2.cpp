#define XLSTM_LANES 8
#include "slstm/cpu_kernels.h"

const xlstm::SlstmKernels xlstm::slstm_avx2 = {"avx2", xlstm::slstm_scan};
