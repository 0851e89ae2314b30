// The sLSTM kernel behind the C interface of common/call.h. `context` is a cudaStream_t.
#include <cmath>
#include <cstdio>

#include "slstm/scan.cuh"

namespace xlstm::slstm {
namespace {

constexpr int MAX_DIM = 512;

// Where a step needs more of R than one processor reads in the time of a launch, S = 1 is spread over several.
bool sliced(const Slstm &call) { return call.length == 1 && call.dim > 256; }

bool overwrites_past(const Slstm &call) { return sliced(call) && call.y_n == call.y0; }

// `warps` to a CTA.
template <class Weights, int tiles, int held, int threads>
int start(const Slstm &call, float *past, Stream stream, int warps) {
    constexpr int width = 16 / sizeof(typename Weights::Element);
    const int groups = (call.batch + Weights::rows - 1) / Weights::rows;
    const int units = warps * tiles * UNITS, slices = (call.dim + units - 1) / units;
    Plan plan;
    plan.panels = (call.dim + Weights::depth - 1) / Weights::depth;
    plan.y_pitch = Weights::Y::pitch(plan.panels);
    plan.y_bytes = Weights::Y::most_columns * plan.y_pitch;
    const int constants = call.dim * 16 * (Weights::scaled_sums ? 2 : 1);
    plan.tiles = (2 * plan.y_bytes + constants + 127) / 128 * 128;
    const int others = tiles * max(0, plan.panels - held);
    const int room = shared_limit() - 1024 - plan.tiles;  // some for static variables
    plan.slots = min(max(max(others, held * tiles), 1), room / (warps * Weights::tile_bytes));
    if (plan.slots < 1 || (plan.slots < others && plan.slots < RING))
        return static_cast<int>(cudaErrorInvalidValue);
    plan.resident = plan.slots < others ? plan.slots - RING : others;
    plan.streamed = others - plan.resident;
    plan.vector = call.dim % width == 0 && reinterpret_cast<uintptr_t>(call.R) % 16 == 0;
    plan.sliced = slices > 1;
    plan.y0 = overwrites_past(call) ? past : call.y0;
    return launch(scan<Weights, tiles, held, threads>, dim3(unsigned(groups * call.heads), unsigned(slices)),
                  warps * 32, size_t(plan.tiles + warps * plan.slots * Weights::tile_bytes), stream, call,
                  plan);
}

// As many registers for R as the threads of a CTA leave to each; `less` panels where sums take more of them.
template <class Weights, int less = 0>
int run_to_256(const Slstm &call, Stream stream) {
    const int warps = (call.dim + UNITS - 1) / UNITS;
    if (warps <= 8) return start<Weights, 1, 4, 256>(call, nullptr, stream, warps);
    if (warps <= 12) return start<Weights, 1, 3 - less, 384>(call, nullptr, stream, warps);
    return start<Weights, 1, 2 - less, 512>(call, nullptr, stream, warps);
}

template <class Weights>
int run_large(const Slstm &call, float *past, Stream stream) {
    if (!sliced(call))
        return start<Weights, 2, 0, 512>(call, nullptr, stream, (call.dim + 2 * UNITS - 1) / (2 * UNITS));
    if (overwrites_past(call)) {
        const int count = call.batch * call.heads * call.dim;
        const int status = launch(copy_past, unsigned(count + 255) / 256, 256, 0, stream, call, past, count);
        if (status != 0) return status;
    }
    // As many CTAs as there are processors, if that leaves each a warp.
    const int groups = (call.batch + Weights::rows - 1) / Weights::rows * call.heads;
    const int slices = max(1, processors() / groups), tiles = (call.dim + UNITS - 1) / UNITS;
    return start<Weights, 1, 4, 256>(call, past, stream, min(8, (tiles + slices - 1) / slices));
}

template <class Weights>
int run_with(const Slstm &call, float *past, Stream stream) {
    return call.dim <= 256 ? run_to_256<Weights>(call, stream) : run_large<Weights>(call, past, stream);
}

int run(const Slstm &call, float *past, Stream stream) {
    switch (call.weight) {
        case Dtype::f16:
            if (call.batch <= 2) return run_with<HalfWeights<2>>(call, past, stream);
            return run_with<HalfWeights<4>>(call, past, stream);
        case Dtype::i8:
            if (call.batch <= 2) return run_with<IntegerWeights<2>>(call, past, stream);
            return run_with<IntegerWeights<4>>(call, past, stream);
        case Dtype::bf16:
            if (call.batch > 2 && call.dim <= 128)
                return start<BrainWeights<4>, 1, 4, 256>(call, nullptr, stream,
                                                         (call.dim + UNITS - 1) / UNITS);
            return run_with<BrainWeights<2>>(call, past, stream);
        default:
            if (call.batch == 1) return run_with<SingleWeights<1>>(call, past, stream);
            if (call.dim <= 256) return run_to_256<SingleWeights<4>, 1>(call, stream);
            return run_large<SingleWeights<2>>(call, past, stream);
    }
}

// Null, or what is wrong; the text lives until the next call of this thread.
const char *check(const Slstm &call) {
    static thread_local char message[160];
    const auto refuse = [&](const char *format, auto... values) {
        std::snprintf(message, sizeof message, format, values...);
        return message;
    };
    const struct {
        const char *name;
        int value, most;
    } sizes[] = {{"batch B", call.batch, 1 << 20},
                 {"length S", call.length, 1 << 24},
                 {"heads H", call.heads, 1 << 10},
                 {"head size D", call.dim, MAX_DIM}};
    for (const auto &size : sizes)
        if (size.value < 1 || size.value > size.most)
            return refuse("%s is %d, must be between 1 and %d", size.name, size.value, size.most);
    const auto floating = [](Dtype type) { return type >= Dtype::f32 && type <= Dtype::bf16; };
    if (!floating(call.io)) return refuse("x and y have type %d, must be f32, f16 or bf16", int(call.io));
    if (!floating(call.weight) && call.weight != Dtype::i8)
        return refuse("R has type %d, must be f32, f16, bf16 or i8", int(call.weight));
    if (std::isnan(call.forget_max)) return refuse("forget_max is no number");
    return check_function(call);
}

}  // namespace
}  // namespace xlstm::slstm

extern "C" {
const char *xlstm_slstm_check(const xlstm::Slstm *call) { return xlstm::slstm::check(*call); }

size_t xlstm_slstm_workspace(const xlstm::Slstm *call) {
    // Whether y is updated in place is not known here: pointers are not looked at.
    return xlstm::slstm::sliced(*call) ? sizeof(float) * call->batch * call->heads * call->dim : 0;
}

int xlstm_slstm_run(const xlstm::Slstm *call, void *workspace, void *context) {
    return xlstm::slstm::run(*call, static_cast<float *>(workspace), static_cast<xlstm::Stream>(context));
}
}
