// The part of ONNX Runtime's C interface that custom operators need, declared here because its Python packages
// carry no headers. The interface only grows: a function keeps its place in the table of OrtApi, and a custom
// operator says by `version` up to where its own table goes. Checked against onnxruntime 1.17 … 1.32.
#pragma once

#include <cstddef>
#include <cstdint>

namespace xlstm::ort {

constexpr uint32_t kApiVersion = 17;  // onnxruntime 1.17: the first with KernelContext_ParallelFor

struct Api;  // a table of function pointers, see `slot`
struct Status;
struct SessionOptions;
struct CustomOpDomain;
struct KernelInfo;
struct KernelContext;
struct Value;
struct TensorInfo;
struct Allocator;
struct MemoryInfo;

struct ApiBase {
    const Api *(*get_api)(uint32_t version);
    const char *(*version_string)();
};

enum ElementType : int { kUndefined = 0, kFloat = 1, kInt8 = 3, kInt64 = 7, kFloat16 = 10, kBFloat16 = 16 };
enum Characteristic : int { kRequired = 0, kOptional = 1, kVariadic = 2 };
enum MemoryType : int { kMemoryDefault = 0 };
enum ErrorCode : int { kFail = 1, kInvalidArgument = 2 };

struct CustomOp {
    uint32_t version;
    void *(*create_kernel)(const CustomOp *, const Api *, const KernelInfo *);
    const char *(*name)(const CustomOp *);
    const char *(*provider)(const CustomOp *);
    ElementType (*input_type)(const CustomOp *, size_t);
    size_t (*input_count)(const CustomOp *);
    ElementType (*output_type)(const CustomOp *, size_t);
    size_t (*output_count)(const CustomOp *);
    void (*compute)(void *kernel, KernelContext *);
    void (*destroy_kernel)(void *kernel);
    Characteristic (*input_characteristic)(const CustomOp *, size_t);
    Characteristic (*output_characteristic)(const CustomOp *, size_t);
    MemoryType (*input_memory_type)(const CustomOp *, size_t);
    int (*variadic_input_min)(const CustomOp *);
    int (*variadic_input_homogeneous)(const CustomOp *);
    int (*variadic_output_min)(const CustomOp *);
    int (*variadic_output_homogeneous)(const CustomOp *);
    Status *(*create_kernel_v2)(const CustomOp *, const Api *, const KernelInfo *, void **kernel);
    Status *(*compute_v2)(void *kernel, KernelContext *);
    Status *(*infer_shapes)(const CustomOp *, void *context);  // may be null
    int (*start_version)(const CustomOp *);                    // may be null
    int (*end_version)(const CustomOp *);                      // may be null
};

// The functions by their place in OrtApi.
template <int index, typename Result, typename... Arguments>
struct Slot {
    static Result call(const Api *api, Arguments... arguments) {
        const auto *table = reinterpret_cast<Result (*const *)(Arguments...)>(api);
        return table[index](arguments...);
    }
};

using CreateStatus = Slot<0, Status *, int, const char *>;
using CreateCustomOpDomain = Slot<26, Status *, const char *, CustomOpDomain **>;
using CustomOpDomain_Add = Slot<27, Status *, CustomOpDomain *, const CustomOp *>;
using AddCustomOpDomain = Slot<28, Status *, SessionOptions *, CustomOpDomain *>;
using GetTensorMutableData = Slot<51, Status *, Value *, void **>;
using GetTensorElementType = Slot<60, Status *, const TensorInfo *, ElementType *>;
using GetDimensionsCount = Slot<61, Status *, const TensorInfo *, size_t *>;
using GetDimensions = Slot<62, Status *, const TensorInfo *, int64_t *, size_t>;
using GetTensorTypeAndShape = Slot<65, Status *, const Value *, TensorInfo **>;
using AllocatorAlloc = Slot<75, Status *, Allocator *, size_t, void **>;
using AllocatorFree = Slot<76, Status *, Allocator *, void *>;
using KernelInfoGetAttribute_float = Slot<85, Status *, const KernelInfo *, const char *, float *>;
using KernelInfoGetAttribute_int64 = Slot<86, Status *, const KernelInfo *, const char *, int64_t *>;
using KernelContext_GetInputCount = Slot<88, Status *, const KernelContext *, size_t *>;
using KernelContext_GetInput = Slot<90, Status *, const KernelContext *, size_t, const Value **>;
using KernelContext_GetOutput =
    Slot<91, Status *, KernelContext *, size_t, const int64_t *, size_t, Value **>;
using ReleaseStatus = Slot<93, void, Status *>;
using ReleaseTensorInfo = Slot<99, void, TensorInfo *>;
using GetTensorMemoryInfo = Slot<194, Status *, const Value *, const MemoryInfo **>;
using KernelContext_GetGPUComputeStream = Slot<193, Status *, const KernelContext *, void **>;
using KernelContext_GetAllocator =
    Slot<253, Status *, const KernelContext *, const MemoryInfo *, Allocator **>;
using KernelContext_ParallelFor =
    Slot<274, Status *, const KernelContext *, void (*)(void *, size_t), size_t, size_t, void *>;

}  // namespace xlstm::ort
