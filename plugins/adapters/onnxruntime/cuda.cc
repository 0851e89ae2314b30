// The two recurrence operators as custom operators of ONNX Runtime's CUDA provider.
//
//     session_options.register_custom_ops_library("libxlstm_ort_cuda.so")
//
// One operator per combination of types, all of the same name: ONNX Runtime takes the one that fits a node. INT8
// weights have no form in the graph (their scales are no input), so R is a floating type here. A graph that
// carries function bodies for the operators must be stripped of them, as for the CPU (cpu.cpp).
//
// Nothing here calls CUDA: the provider's stream goes to the kernels, scratch memory comes from its allocator. It
// is given back when the kernels are launched and not when they have run: whoever gets it next uses it on the
// same stream, after them. So far not run on hardware; tests run this file with the kernels emulated on a CPU.

#include <array>
#include <cstdio>
#include <limits>
#include <new>

#include "adapters/onnxruntime/attributes.h"
#include "adapters/onnxruntime/ort_api.h"
#include "common/call.h"

#ifndef XLSTM_ORT_PROVIDER
#define XLSTM_ORT_PROVIDER "CUDAExecutionProvider"
#endif

namespace xlstm::ort {
namespace {

using ReleaseAllocator = Slot<132, void, Allocator *>;

constexpr std::array<Dtype, 3> kFloats = {Dtype::f32, Dtype::f16, Dtype::bf16};

ElementType element_type(Dtype type) {
    return type == Dtype::f16 ? kFloat16 : type == Dtype::bf16 ? kBFloat16 : kFloat;
}

// A custom operator for inputs and outputs of type `io`, and C (mLSTM) or R (sLSTM) of type `second`.
struct Op : CustomOp {
    Dtype io, second;
};

// Reads inputs and makes outputs of one call; the first failure stays and everything after it is skipped.
class Tensors {
public:
    Tensors(const Api *api, KernelContext *context) : api_(api), context_(context) {}

    // Sizes of input `index`.
    template <size_t rank>
    std::array<int64_t, rank> shape(size_t index) {
        std::array<int64_t, rank> shape{};
        size_t found = 0;
        TensorInfo *info = nullptr;
        const Value *tensor = value(index);
        if (ok()) check(GetTensorTypeAndShape::call(api_, tensor, &info));
        if (ok()) check(GetDimensionsCount::call(api_, info, &found));
        if (ok() && found != rank) fail("input %zu has %zu dimensions, expected %zu", index, found, rank);
        if (ok()) check(GetDimensions::call(api_, info, shape.data(), rank));
        if (info != nullptr) ReleaseTensorInfo::call(api_, info);
        for (const int64_t size : shape)
            if (ok() && (size < 1 || size > std::numeric_limits<int32_t>::max()))
                fail("input %zu has a dimension of %lld", index, static_cast<long long>(size));
        return shape;
    }

    // Address of input `index`, which must have this shape.
    template <typename T, size_t rank>
    void input(size_t index, const std::array<int64_t, rank> &wanted, const T *&data) {
        const auto found = shape<rank>(index);
        void *address = nullptr;
        if (ok() && found != wanted) fail("input %zu does not fit to the others", index);
        const Value *tensor = value(index);
        if (ok()) check(GetTensorMutableData::call(api_, const_cast<Value *>(tensor), &address));
        data = static_cast<const T *>(address);
    }

    // Address of output `index`.
    template <typename T, size_t rank>
    void output(size_t index, const std::array<int64_t, rank> &shape, T *&data) {
        Value *value = nullptr;
        void *address = nullptr;
        if (ok()) check(KernelContext_GetOutput::call(api_, context_, index, shape.data(), rank, &value));
        if (ok()) check(GetTensorMutableData::call(api_, value, &address));
        if (ok()) check(GetTensorMemoryInfo::call(api_, value, &memory_));
        data = static_cast<T *>(address);
    }

    // Checks and launches; scratch memory comes from where the outputs lie.
    template <typename Call>
    Status *run(const Call &call, const char *(*refuse)(const Call *), size_t (*workspace)(const Call *),
                int (*launch)(const Call *, void *, void *)) {
        if (!ok()) return status_;
        if (const char *refusal = refuse(&call)) return CreateStatus::call(api_, kInvalidArgument, refusal);
        void *stream = nullptr, *scratch = nullptr;
        Allocator *allocator = nullptr;
        const size_t bytes = workspace(&call);
        check(KernelContext_GetGPUComputeStream::call(api_, context_, &stream));
        if (ok() && bytes > 0) check(KernelContext_GetAllocator::call(api_, context_, memory_, &allocator));
        if (ok() && bytes > 0) check(AllocatorAlloc::call(api_, allocator, bytes, &scratch));
        if (ok()) {
            const int error = launch(&call, scratch, stream);
            if (error != 0) fail("the kernel failed with CUDA error %d", error);
        }
        // A failure to give memory back must not hide an earlier one.
        Status *freed = scratch == nullptr ? nullptr : AllocatorFree::call(api_, allocator, scratch);
        if (allocator != nullptr) ReleaseAllocator::call(api_, allocator);
        if (ok()) return freed;
        if (freed != nullptr) ReleaseStatus::call(api_, freed);
        return status_;
    }

    bool ok() const { return status_ == nullptr; }

private:
    template <typename... Values>
    void fail(const char *format, Values... values) {
        char message[160];
        std::snprintf(message, sizeof message, format, values...);
        status_ = CreateStatus::call(api_, kInvalidArgument, message);
    }

    void check(Status *status) { status_ = status; }

    const Value *value(size_t index) {
        const Value *value = nullptr;
        if (ok()) check(KernelContext_GetInput::call(api_, context_, index, &value));
        return value;
    }

    const Api *api_;
    KernelContext *context_;
    const MemoryInfo *memory_ = nullptr;
    Status *status_ = nullptr;
};

struct MlstmKernel {
    static constexpr const char *kName = "XlstmMlstm";
    static constexpr size_t kInputs = 8, kOutputs = 4;  // q k v i f C0 n0 m0; h C n m

    const Api *api;
    Dtype io, state;
    float scale, eps, forget_exp, input_sigmoid, normalize;

    MlstmKernel(const Op &op, const Api *api, Attributes &attributes)
        : api(api),
          io(op.io),
          state(op.second),
          scale(attributes(kScale)),
          eps(attributes(kEps)),
          forget_exp(attributes(kForgetExp)),
          input_sigmoid(attributes(kInputSigmoid)),
          normalize(attributes(kNormalize)) {}

    static Dtype input(const Op &op, size_t index) {
        return index < 3 ? op.io : index == 5 ? op.second : Dtype::f32;
    }
    static Dtype output(const Op &op, size_t index) {
        return index == 0 ? op.io : index == 1 ? op.second : Dtype::f32;
    }

    Status *compute(KernelContext *context) const {
        Tensors tensors(api, context);
        const auto q = tensors.shape<4>(0), v = tensors.shape<4>(2);
        const auto [B, S, H, Dk] = q;
        const int64_t Dv = v[3];
        const std::array<int64_t, 4> values{B, S, H, Dv}, C{B, H, Dk, Dv};
        const std::array<int64_t, 3> gates{B, S, H}, n{B, H, Dk};
        const std::array<int64_t, 2> m{B, H};
        Mlstm call{};
        call.batch = int32_t(B), call.length = int32_t(S), call.heads = int32_t(H);
        call.dk = int32_t(Dk), call.dv = int32_t(Dv), call.io = io, call.state = state;
        call.scale = scale_of(scale, int(Dk)), call.eps = eps;
        call.forget_exp = forget_exp != 0, call.input_sigmoid = input_sigmoid != 0;
        call.normalize = normalize != 0;
        tensors.input(0, q, call.q);
        tensors.input(1, q, call.k);
        tensors.input(2, values, call.v);
        tensors.input(3, gates, call.i);
        tensors.input(4, gates, call.f);
        tensors.input(5, C, call.C0);
        tensors.input(6, n, call.n0);
        tensors.input(7, m, call.m0);
        tensors.output(0, values, call.h);
        tensors.output(1, C, call.C);
        tensors.output(2, n, call.n);
        tensors.output(3, m, call.m);
        return tensors.run(call, xlstm_mlstm_check, xlstm_mlstm_workspace, xlstm_mlstm_run);
    }
};

struct SlstmKernel {
    static constexpr const char *kName = "XlstmSlstm";
    static constexpr size_t kInputs = 7, kOutputs = 5;  // x R bias y0 c0 n0 m0; y y_n c_n n_n m_n

    const Api *api;
    Dtype io, weight;
    float forget_max, forget_exp, normalizer_min;

    SlstmKernel(const Op &op, const Api *api, Attributes &attributes)
        : api(api),
          io(op.io),
          weight(op.second),
          forget_max(attributes(kForgetMax)),
          forget_exp(attributes(kForgetExp)),
          normalizer_min(attributes(kNormalizerMin)) {}

    static Dtype input(const Op &op, size_t index) {
        return index == 0 ? op.io : index == 1 ? op.second : Dtype::f32;
    }
    static Dtype output(const Op &op, size_t index) { return index == 0 ? op.io : Dtype::f32; }

    Status *compute(KernelContext *context) const {
        Tensors tensors(api, context);
        const auto [B, S, gates, H, D] = tensors.shape<5>(0);
        const std::array<int64_t, 5> x{B, S, 4, H, D};
        const std::array<int64_t, 4> R{H, D, 4, D}, y{B, S, H, D};
        const std::array<int64_t, 3> bias{4, H, D}, state{B, H, D};
        static_cast<void>(gates);  // compared in x
        Slstm call{};
        call.batch = int32_t(B), call.length = int32_t(S), call.heads = int32_t(H), call.dim = int32_t(D);
        call.io = io, call.weight = weight, call.forget_max = forget_max;
        call.forget_exp = forget_exp != 0, call.normalizer_min = normalizer_min;
        tensors.input(0, x, call.x);
        tensors.input(1, R, call.R);
        tensors.input(2, bias, call.bias);
        tensors.input(3, state, call.y0);
        tensors.input(4, state, call.c0);
        tensors.input(5, state, call.n0);
        tensors.input(6, state, call.m0);
        tensors.output(0, y, call.y);
        tensors.output(1, state, call.y_n);
        tensors.output(2, state, call.c_n);
        tensors.output(3, state, call.n_n);
        tensors.output(4, state, call.m_n);
        return tensors.run(call, xlstm_slstm_check, xlstm_slstm_workspace, xlstm_slstm_run);
    }
};

template <typename Kernel>
Op make_op(Dtype io, Dtype second) {
    Op op{};
    op.io = io, op.second = second;
    op.version = kApiVersion;
    op.name = [](const CustomOp *) { return Kernel::kName; };
    op.provider = [](const CustomOp *) -> const char * { return XLSTM_ORT_PROVIDER; };
    op.input_count = [](const CustomOp *) { return Kernel::kInputs; };
    op.output_count = [](const CustomOp *) { return Kernel::kOutputs; };
    op.input_type = [](const CustomOp *op, size_t index) {
        return element_type(Kernel::input(*static_cast<const Op *>(op), index));
    };
    op.output_type = [](const CustomOp *op, size_t index) {
        return element_type(Kernel::output(*static_cast<const Op *>(op), index));
    };
    op.input_characteristic = op.output_characteristic = [](const CustomOp *, size_t) { return kRequired; };
    op.input_memory_type = [](const CustomOp *, size_t) { return kMemoryDefault; };
    op.variadic_input_min = op.variadic_output_min = [](const CustomOp *) { return 0; };
    op.variadic_input_homogeneous = op.variadic_output_homogeneous = [](const CustomOp *) { return 0; };
    op.create_kernel_v2 = [](const CustomOp *op, const Api *api, const KernelInfo *info,
                             void **out) -> Status * {
        Attributes attributes(api, info, Kernel::kName);
        const Kernel made(*static_cast<const Op *>(op), api, attributes);
        if (Status *refusal = attributes.status()) return refusal;
        *out = new (std::nothrow) Kernel(made);
        return *out == nullptr ? CreateStatus::call(api, kFail, "out of memory") : nullptr;
    };
    op.compute_v2 = [](void *kernel, KernelContext *context) {
        return static_cast<const Kernel *>(kernel)->compute(context);
    };
    op.destroy_kernel = [](void *kernel) { delete static_cast<Kernel *>(kernel); };
    return op;
}

// Adds an operator for each combination of types.
template <typename Kernel>
Status *add_ops(const Api *api, CustomOpDomain *domain) {
    // Operators must outlive every session.
    static const auto ops = [] {
        std::array<Op, kFloats.size() * kFloats.size()> ops{};
        for (size_t index = 0; index < ops.size(); ++index)
            ops[index] = make_op<Kernel>(kFloats[index / kFloats.size()], kFloats[index % kFloats.size()]);
        return ops;
    }();
    for (const Op &op : ops)
        if (Status *status = CustomOpDomain_Add::call(api, domain, &op)) return status;
    return nullptr;
}

}  // namespace
}  // namespace xlstm::ort

extern "C" __attribute__((visibility("default"))) xlstm::ort::Status *RegisterCustomOps(
    xlstm::ort::SessionOptions *options, const xlstm::ort::ApiBase *base) {
    using namespace xlstm::ort;
    const Api *api = base->get_api(kApiVersion);
    if (api == nullptr) return nullptr;  // an older runtime: it has printed why, and finds no kernel later
    CustomOpDomain *domain = nullptr;
    if (Status *status = CreateCustomOpDomain::call(api, "xlstm", &domain)) return status;
    if (Status *status = add_ops<MlstmKernel>(api, domain)) return status;
    if (Status *status = add_ops<SlstmKernel>(api, domain)) return status;
    return AddCustomOpDomain::call(api, options, domain);
}
