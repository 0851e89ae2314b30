// XlstmMlstm as a TensorRT plugin: axes B batch, S sequence, H heads, K and V the sizes of a key and a value.
#include "adapters/tensorrt/op.h"

namespace xlstm::tensorrt {
namespace {

enum { scale, eps, forget_exp, input_sigmoid, normalize };

Mlstm call_of(const Request &request) {
    Mlstm call{};
    const Sizes &sizes = request.sizes;
    call.batch = sizes['B'], call.length = sizes['S'], call.heads = sizes['H'];
    call.dk = sizes['K'], call.dv = sizes['V'];
    call.io = request.io, call.state = request.state;
    call.processors = request.processors;
    call.scale = scale_of(request.attributes[scale], call.dk);
    call.eps = request.attributes[eps];
    call.forget_exp = request.attributes[forget_exp] != 0;
    call.input_sigmoid = request.attributes[input_sigmoid] != 0;
    call.normalize = request.attributes[normalize] != 0;
    if (const void *const *in = request.inputs) {
        call.q = in[0], call.k = in[1], call.v = in[2];
        call.i = static_cast<const float *>(in[3]), call.f = static_cast<const float *>(in[4]);
        call.C0 = in[5];
        call.n0 = static_cast<const float *>(in[6]), call.m0 = static_cast<const float *>(in[7]);
    }
    if (void *const *out = request.outputs) {
        call.h = out[0], call.C = out[1];
        call.n = static_cast<float *>(out[2]), call.m = static_cast<float *>(out[3]);
    }
    return call;
}

const char *check(const Request &request) {
    const Mlstm call = call_of(request);
    return xlstm_mlstm_check(&call);
}

size_t workspace(const Request &request) {
    const Mlstm call = call_of(request);
    return xlstm_mlstm_workspace(&call);
}

int run(const Request &request, void *scratch, cudaStream_t stream) {
    const Mlstm call = call_of(request);
    return xlstm_mlstm_run(&call, scratch, stream);
}

}  // namespace

const Op &mlstm_op() {
    static const Op op{
        "XlstmMlstm",
        "xlstm.XlstmMlstm.1",
        {{"q", "BSHK", Kind::io},
         {"k", "BSHK", Kind::io},
         {"v", "BSHV", Kind::io},
         {"i", "BSH", Kind::f32},
         {"f", "BSH", Kind::f32},
         {"C0", "BHKV", Kind::state},
         {"n0", "BHK", Kind::f32},
         {"m0", "BH", Kind::f32}},
        8,
        {{"h", "BSHV", Kind::io},
         {"C", "BHKV", Kind::state, 5},
         {"n", "BHK", Kind::f32, 6},
         {"m", "BH", Kind::f32, 7}},
        {kScale, kEps, kForgetExp, kInputSigmoid, kNormalize},
        check,
        workspace,
        run,
    };
    return op;
}

}  // namespace xlstm::tensorrt
