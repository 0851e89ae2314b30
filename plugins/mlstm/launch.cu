// The mLSTM kernels behind the C interface of common/call.h. `context` is a cudaStream_t.
#include <cstdio>

#include "mlstm/chunkwise.cuh"
#include "mlstm/step.cuh"

namespace xlstm::mlstm {
namespace {

constexpr int MAX_DIM = 512;

// Calls `use` with a value of the C++ type of an element.
template <class Use>
auto with_type(Dtype dtype, Use use) {
    if (dtype == Dtype::f16) return use(f16{});
    if (dtype == Dtype::bf16) return use(bf16{});
    return use(float{});
}

template <class Io, class State, int lanes, int width>
int launch_step(const Mlstm &call, Stream stream) {
    constexpr int columns = lanes * width;
    const int heads = call.batch * call.heads, strips = (call.dv + columns - 1) / columns;
    const bool in_place = call.n == call.n0 || call.m == call.m0;
    const bool writes_normalizer = strips == 1 || !in_place;
    const int shared = (2 * call.dk + STEP_THREADS / 32 * columns) * int(sizeof(float));
    const int status = launch(step<Io, State, lanes, width>, heads * strips, STEP_THREADS, shared, stream,
                              call, writes_normalizer);
    if (status != 0 || writes_normalizer) return status;
    return launch(step_normalizer<Io>, heads, STEP_THREADS, 0, stream, call);
}

// Strips as wide as still leave most processors one.
template <class Io, class State>
int run_step(const Mlstm &call, Stream stream) {
    constexpr int width = 16 / sizeof(State);
    if (!aligned_rows(call.C0, call.dv, sizeof(State)) || !aligned_rows(call.C, call.dv, sizeof(State)))
        return launch_step<Io, State, 32, 1>(call, stream);
    const int heads = call.batch * call.heads, enough = processors() * 3 / 4;
    if (heads * (call.dv / (8 * width)) >= enough) return launch_step<Io, State, 8, width>(call, stream);
    if (heads * (call.dv / (4 * width)) >= enough) return launch_step<Io, State, 4, width>(call, stream);
    return launch_step<Io, State, 2, width>(call, stream);
}

bool floating(Dtype dtype) { return dtype == Dtype::f32 || dtype == Dtype::f16 || dtype == Dtype::bf16; }

// Null, or what is wrong; the text lives until the next call of this thread.
const char *check(const Mlstm &call) {
    static thread_local char message[240];
    const auto refuse = [&](const char *format, auto... values) {
        std::snprintf(message, sizeof message, format, values...);
        return message;
    };
    const struct {
        const char *name;
        int value, most;
    } sizes[] = {{"batch B", call.batch, 1 << 20},
                 {"length S", call.length, 1 << 24},
                 {"heads H", call.heads, 1 << 12},
                 {"key size Dk", call.dk, MAX_DIM},
                 {"value size Dv", call.dv, MAX_DIM}};
    for (const auto &size : sizes)
        if (size.value < 1 || size.value > size.most)
            return refuse("%s is %d, must be 1 to %d", size.name, size.value, size.most);
    if (size_t(call.batch) * call.heads > (1 << 20))
        return refuse("B * H is %lld, must be at most %d", static_cast<long long>(call.batch) * call.heads,
                      1 << 20);
    if (!floating(call.io))
        return refuse("q, k, v and h have type %d, must be f32, f16 or bf16", int(call.io));
    if (!floating(call.state)) return refuse("C has type %d, must be f32, f16 or bf16", int(call.state));
    if (const char *refusal = check_function(call)) return refusal;
    if (call.length == 1) return nullptr;
    const int needed = with_type(call.io, [&](auto io) { return least_shared<decltype(io)>(call); });
    if (needed > shared_limit())
        return refuse(
            "a sequence of %s needs %d KB of shared memory to a CTA, this GPU has %d KB; compute "
            "q, k and v in 16 bits, or use function bodies",
            call.io == Dtype::f32 ? "FP32" : "this Dk", (needed + 1023) >> 10, shared_limit() >> 10);
    return nullptr;
}

}  // namespace
}  // namespace xlstm::mlstm

extern "C" int xlstm_processors() { return xlstm::processors(); }

extern "C" const char *xlstm_mlstm_check(const xlstm::Mlstm *call) { return xlstm::mlstm::check(*call); }

extern "C" size_t xlstm_mlstm_workspace(const xlstm::Mlstm *call) {
    using namespace xlstm::mlstm;
    if (call->length == 1) return 0;
    return with_type(call->io, [&](auto io) { return Scratch::plan<decltype(io)>(*call).bytes; });
}

extern "C" int xlstm_mlstm_run(const xlstm::Mlstm *call, void *workspace, void *context) {
    using namespace xlstm::mlstm;
    const auto stream = static_cast<xlstm::Stream>(context);
    return with_type(call->io, [&](auto io) {
        return with_type(call->state, [&](auto state) {
            using Io = decltype(io);
            using State = decltype(state);
            if (call->length == 1) return run_step<Io, State>(*call, stream);
            return run_chunkwise<Io, State>(*call, static_cast<unsigned char *>(workspace), stream);
        });
    });
}
