// The sLSTM kernel behind the C interface of common/call.h. `context` is a cudaStream_t.
#include <cmath>
#include <cstdio>

#include "slstm/scan.cuh"

namespace xlstm::slstm {
namespace {

constexpr int MAX_DIM = 512;

template <class Weights, int tiles, int held, int threads>
int start(const Slstm &call, Stream stream) {
    const int warps = (call.dim + tiles * UNITS - 1) / (tiles * UNITS);
    const int others = tiles * max(0, Layout<Weights>(call.dim, warps, 0).panels - held);
    const int room = shared_limit() - 1024 - Layout<Weights>(call.dim, warps, 0).total;
    const int slots = min(max(max(others, held * tiles), 1), room / (warps * Weights::tile_bytes));
    if (slots < 1 || (slots < others && slots < RING)) return static_cast<int>(cudaErrorInvalidValue);
    constexpr int width = 16 / sizeof(typename Weights::Element);
    const bool vector = call.dim % width == 0 && reinterpret_cast<uintptr_t>(call.R) % 16 == 0;
    const int groups = (call.batch + Weights::rows - 1) / Weights::rows;
    return launch(scan<Weights, tiles, held, threads>, unsigned(groups * call.heads), warps * 32,
                  size_t(Layout<Weights>(call.dim, warps, slots).total), stream, call, slots, vector);
}

// As many registers for R as the threads of a CTA leave to each.
template <class Weights>
int run_with(const Slstm &call, Stream stream) {
    if (call.dim <= 128) return start<Weights, 1, 4, 256>(call, stream);
    if (call.dim <= 192) return start<Weights, 1, 3, 384>(call, stream);
    if (call.dim <= 256) return start<Weights, 1, 2, 512>(call, stream);
    return start<Weights, 2, 0, 512>(call, stream);
}

int run(const Slstm &call, Stream stream) {
    const bool large = call.dim > 384;  // where y of four rows in three pieces would leave R too little
    switch (call.weight) {
        case Dtype::f16: return run_with<HalfWeights>(call, stream);
        case Dtype::i8: return run_with<IntegerWeights>(call, stream);
        case Dtype::bf16:
            if (call.batch <= 2 || large) return run_with<BrainWeights<1>>(call, stream);
            return run_with<BrainWeights<2>>(call, stream);
        default:
            if (call.batch == 1) return run_with<SingleWeights<1>>(call, stream);
            return run_with<SingleWeights<4>>(call, stream);
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
    return nullptr;
}

}  // namespace
}  // namespace xlstm::slstm

extern "C" {
const char *xlstm_slstm_check(const xlstm::Slstm *call) { return xlstm::slstm::check(*call); }

size_t xlstm_slstm_workspace(const xlstm::Slstm *) { return 0; }

int xlstm_slstm_run(const xlstm::Slstm *call, void *, void *context) {
    return xlstm::slstm::run(*call, static_cast<xlstm::Stream>(context));
}
}
