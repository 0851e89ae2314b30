// The adapter for ONNX Runtime's CUDA provider, its own source, as operators of the CPU provider: its streams are
// null, its allocators give host memory, and the kernels are emulated.
#define XLSTM_ORT_PROVIDER "CPUExecutionProvider"
#include "adapters/onnxruntime/cuda.cc"
