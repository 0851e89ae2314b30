// The two recurrence operators as custom operators of ONNX Runtime's CPU provider.
//
//     session_options.register_custom_ops_library("libxlstm_ort_cpu.so")
//
// Kernels compute in FP32 and on the session's own threads. A graph that carries function bodies for the
// operators must be stripped of them: ONNX Runtime inlines a body before it looks for a kernel.

#include <array>

#include "adapters/onnxruntime/attributes.h"
#include "adapters/onnxruntime/ort_api.h"
#include "common/call.h"
#include "common/parallel.h"

namespace xlstm::ort {
namespace {

// Reads inputs and makes outputs of one call; the first failure stays and everything after it is skipped.
class Tensors {
public:
    Tensors(const Api *api, KernelContext *context) : api_(api), context_(context) {}

    // Data of input `index`, and its sizes in `shape`.
    template <size_t rank>
    const float *input(size_t index, std::array<int64_t, rank> &shape) {
        const Value *value = nullptr;
        TensorInfo *info = nullptr;
        void *data = nullptr;
        size_t found = 0;
        check(KernelContext_GetInput::call(api_, context_, index, &value));
        if (ok()) check(GetTensorTypeAndShape::call(api_, value, &info));
        if (ok()) check(GetDimensionsCount::call(api_, info, &found));
        if (ok() && found != rank) fail("an input has the wrong number of dimensions");
        if (ok()) check(GetDimensions::call(api_, info, shape.data(), rank));
        if (ok()) check(GetTensorMutableData::call(api_, const_cast<Value *>(value), &data));
        if (info != nullptr) ReleaseTensorInfo::call(api_, info);
        return static_cast<const float *>(data);
    }

    // Data of input `index`, which must have this shape.
    template <size_t rank>
    const float *input_of(size_t index, const std::array<int64_t, rank> &wanted) {
        std::array<int64_t, rank> shape{};
        const float *data = input(index, shape);
        if (ok() && shape != wanted) fail("inputs do not fit together: see the shapes of the operator");
        return data;
    }

    template <size_t rank>
    float *output(size_t index, const std::array<int64_t, rank> &shape) {
        Value *value = nullptr;
        void *data = nullptr;
        if (ok()) check(KernelContext_GetOutput::call(api_, context_, index, shape.data(), rank, &value));
        if (ok()) check(GetTensorMutableData::call(api_, value, &data));
        return static_cast<float *>(data);
    }

    void fail(const char *message) { status_ = CreateStatus::call(api_, kInvalidArgument, message); }
    bool ok() const { return status_ == nullptr; }
    Status *status() const { return status_; }

    // Runs tasks on the session's threads.
    Parallel threads() const { return {run_tasks, this}; }

private:
    void check(Status *status) { status_ = status; }

    static void run_tasks(const void *pool, size_t count, void (*task)(void *, size_t), void *data) {
        const auto &self = *static_cast<const Tensors *>(pool);
        Status *status = KernelContext_ParallelFor::call(self.api_, self.context_, task, count, 0, data);
        if (status == nullptr) return;
        ReleaseStatus::call(self.api_, status);  // nothing has run then
        for (size_t index = 0; index < count; ++index) task(data, index);
    }

    const Api *api_;
    KernelContext *context_;
    Status *status_ = nullptr;
};

struct MlstmKernel {
    static constexpr const char *kName = "XlstmMlstm";
    static constexpr size_t kInputs = 8, kOutputs = 4;

    const Api *api;
    float scale, eps, forget_exp, input_sigmoid, normalize;

    MlstmKernel(const Api *api, Attributes &attributes)
        : api(api),
          scale(attributes(kScale)),
          eps(attributes(kEps)),
          forget_exp(attributes(kForgetExp)),
          input_sigmoid(attributes(kInputSigmoid)),
          normalize(attributes(kNormalize)) {}

    Status *compute(KernelContext *context) const {
        Tensors tensors(api, context);
        Mlstm call{};
        std::array<int64_t, 4> q{}, v{};
        call.q = tensors.input(0, q);
        if (tensors.ok()) call.v = tensors.input(2, v);
        const auto [B, S, H, Dk] = q;
        const int64_t Dv = v[3];
        const std::array<int64_t, 4> values{B, S, H, Dv}, C{B, H, Dk, Dv};
        const std::array<int64_t, 3> gates{B, S, H}, n{B, H, Dk};
        const std::array<int64_t, 2> m{B, H};
        if (tensors.ok()) call.k = tensors.input_of(1, q);
        if (tensors.ok()) tensors.input_of(2, values);
        if (tensors.ok()) call.i = tensors.input_of(3, gates);
        if (tensors.ok()) call.f = tensors.input_of(4, gates);
        if (tensors.ok()) call.C0 = tensors.input_of(5, C);
        if (tensors.ok()) call.n0 = tensors.input_of(6, n);
        if (tensors.ok()) call.m0 = tensors.input_of(7, m);
        call.h = tensors.output(0, values);
        call.C = tensors.output(1, C);
        call.n = tensors.output(2, n);
        call.m = tensors.output(3, m);
        call.batch = B, call.length = S, call.heads = H, call.dk = Dk, call.dv = Dv;
        call.io = call.state = Dtype::f32;
        call.scale = scale_of(scale, Dk), call.eps = eps;
        call.forget_exp = forget_exp != 0, call.input_sigmoid = input_sigmoid != 0;
        call.normalize = normalize != 0;
        if (!tensors.ok()) return tensors.status();
        if (const char *refusal = xlstm_mlstm_check(&call))
            return CreateStatus::call(api, kInvalidArgument, refusal);
        Parallel threads = tensors.threads();
        if (xlstm_mlstm_run(&call, nullptr, &threads) != 0)
            return CreateStatus::call(api, kFail, "out of memory");
        return nullptr;
    }
};

struct SlstmKernel {
    static constexpr const char *kName = "XlstmSlstm";
    static constexpr size_t kInputs = 7, kOutputs = 5;

    const Api *api;
    float forget_max, forget_exp, normalizer_min;

    SlstmKernel(const Api *api, Attributes &attributes)
        : api(api),
          forget_max(attributes(kForgetMax)),
          forget_exp(attributes(kForgetExp)),
          normalizer_min(attributes(kNormalizerMin)) {}

    Status *compute(KernelContext *context) const {
        Tensors tensors(api, context);
        Slstm call{};
        std::array<int64_t, 5> x{};
        call.x = tensors.input(0, x);
        const auto [B, S, gates, H, D] = x;
        if (tensors.ok() && gates != 4) tensors.fail("x must be (B, S, 4, H, D)");
        const std::array<int64_t, 4> R{H, D, 4, D}, y{B, S, H, D};
        const std::array<int64_t, 3> bias{4, H, D}, state{B, H, D};
        if (tensors.ok()) call.R = tensors.input_of(1, R);
        if (tensors.ok()) call.bias = tensors.input_of(2, bias);
        if (tensors.ok()) call.y0 = tensors.input_of(3, state);
        if (tensors.ok()) call.c0 = tensors.input_of(4, state);
        if (tensors.ok()) call.n0 = tensors.input_of(5, state);
        if (tensors.ok()) call.m0 = tensors.input_of(6, state);
        call.y = tensors.output(0, y);
        call.y_n = tensors.output(1, state);
        call.c_n = tensors.output(2, state);
        call.n_n = tensors.output(3, state);
        call.m_n = tensors.output(4, state);
        call.batch = B, call.length = S, call.heads = H, call.dim = D;
        call.io = call.weight = Dtype::f32;
        call.forget_max = forget_max, call.forget_exp = forget_exp != 0;
        call.normalizer_min = normalizer_min;
        if (!tensors.ok()) return tensors.status();
        if (const char *refusal = xlstm_slstm_check(&call))
            return CreateStatus::call(api, kInvalidArgument, refusal);
        Parallel threads = tensors.threads();
        if (xlstm_slstm_run(&call, nullptr, &threads) != 0)
            return CreateStatus::call(api, kFail, "out of memory");
        return nullptr;
    }
};

template <typename Kernel>
CustomOp make_op() {
    CustomOp op{};
    op.version = kApiVersion;
    op.name = [](const CustomOp *) { return Kernel::kName; };
    op.provider = [](const CustomOp *) -> const char * { return "CPUExecutionProvider"; };
    op.input_count = [](const CustomOp *) { return Kernel::kInputs; };
    op.output_count = [](const CustomOp *) { return Kernel::kOutputs; };
    op.input_type = op.output_type = [](const CustomOp *, size_t) { return kFloat; };
    op.input_characteristic = op.output_characteristic = [](const CustomOp *, size_t) { return kRequired; };
    op.input_memory_type = [](const CustomOp *, size_t) { return kMemoryDefault; };
    op.variadic_input_min = op.variadic_output_min = [](const CustomOp *) { return 0; };
    op.variadic_input_homogeneous = op.variadic_output_homogeneous = [](const CustomOp *) { return 0; };
    op.create_kernel_v2 = [](const CustomOp *, const Api *api, const KernelInfo *info,
                             void **kernel) -> Status * {
        Attributes attributes(api, info, Kernel::kName);
        const Kernel made(api, attributes);
        if (Status *refusal = attributes.status()) return refusal;
        *kernel = new Kernel(made);
        return nullptr;
    };
    op.compute_v2 = [](void *kernel, KernelContext *context) {
        return static_cast<const Kernel *>(kernel)->compute(context);
    };
    op.destroy_kernel = [](void *kernel) { delete static_cast<Kernel *>(kernel); };
    return op;
}

}  // namespace
}  // namespace xlstm::ort

// The attributes that these operators compute. Who opens a graph asks for them first: an operator sees those
// only that it asks for, and a library of another version would leave out what it does not know.
extern "C" __attribute__((visibility("default"))) const char *xlstm_attributes() {
    return "scale eps forget_max forget_exp input_sigmoid normalize normalizer_min";
}

extern "C" __attribute__((visibility("default"))) xlstm::ort::Status *RegisterCustomOps(
    xlstm::ort::SessionOptions *options, const xlstm::ort::ApiBase *base) {
    using namespace xlstm::ort;
    const Api *api = base->get_api(kApiVersion);
    if (api == nullptr) return nullptr;  // an older runtime: it has printed why, and finds no kernel later
    // Operators and their domain must outlive every session.
    static const CustomOp mlstm = make_op<MlstmKernel>(), slstm = make_op<SlstmKernel>();
    CustomOpDomain *domain = nullptr;
    if (Status *status = CreateCustomOpDomain::call(api, "xlstm", &domain)) return status;
    if (Status *status = CustomOpDomain_Add::call(api, domain, &mlstm)) return status;
    if (Status *status = CustomOpDomain_Add::call(api, domain, &slstm)) return status;
    return AddCustomOpDomain::call(api, options, domain);
}
