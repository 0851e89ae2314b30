// XlstmSlstm as a TensorRT plugin: axes B batch, S sequence, H heads, D units of a head, 4 the gates.
#include "adapters/tensorrt/op.h"

namespace xlstm::tensorrt {
namespace {

enum { forget_max, forget_exp, normalizer_min };
constexpr size_t R_scale = 7;

Slstm call_of(const Request &request) {
    Slstm call{};
    const Sizes &sizes = request.sizes;
    call.batch = sizes['B'], call.length = sizes['S'], call.heads = sizes['H'], call.dim = sizes['D'];
    call.io = request.io, call.weight = request.weight;
    call.forget_max = request.attributes[forget_max];
    call.forget_exp = request.attributes[forget_exp] != 0;
    call.normalizer_min = request.attributes[normalizer_min];
    if (const void *const *in = request.inputs) {
        const auto f32 = [in](size_t index) { return static_cast<const float *>(in[index]); };
        call.x = in[0], call.R = in[1], call.bias = f32(2);
        call.y0 = f32(3), call.c0 = f32(4), call.n0 = f32(5), call.m0 = f32(6);
        call.R_scale = request.weight == Dtype::i8 ? f32(R_scale) : nullptr;
    }
    if (void *const *out = request.outputs) {
        const auto f32 = [out](size_t index) { return static_cast<float *>(out[index]); };
        call.y = out[0];
        call.y_n = f32(1), call.c_n = f32(2), call.n_n = f32(3), call.m_n = f32(4);
    }
    return call;
}

const char *check(const Request &request) {
    const Slstm call = call_of(request);
    return xlstm_slstm_check(&call);
}

size_t workspace(const Request &request) {
    const Slstm call = call_of(request);
    return xlstm_slstm_workspace(&call);
}

int run(const Request &request, void *scratch, cudaStream_t stream) {
    const Slstm call = call_of(request);
    return xlstm_slstm_run(&call, scratch, stream);
}

}  // namespace

const Op &slstm_op() {
    static const Op op{
        "XlstmSlstm",
        "xlstm.XlstmSlstm.1",
        {{"x", "BS4HD", Kind::io},
         {"R", "HD4D", Kind::weight},
         {"bias", "4HD", Kind::f32},
         {"y0", "BHD", Kind::f32},
         {"c0", "BHD", Kind::f32},
         {"n0", "BHD", Kind::f32},
         {"m0", "BHD", Kind::f32},
         {"R_scale", "H4D", Kind::f32}},
        R_scale,
        {{"y", "BSHD", Kind::io},
         {"y_n", "BHD", Kind::f32, 3},
         {"c_n", "BHD", Kind::f32, 4},
         {"n_n", "BHD", Kind::f32, 5},
         {"m_n", "BHD", Kind::f32, 6}},
        {kForgetMax, kForgetExp, kNormalizerMin},
        check,
        workspace,
        run,
    };
    return op;
}

}  // namespace xlstm::tensorrt
