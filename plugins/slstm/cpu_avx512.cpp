#define XLSTM_LANES 16
#include "slstm/cpu_kernels.h"

const xlstm::SlstmKernels xlstm::slstm_avx512 = {"avx512", xlstm::slstm_scan};
