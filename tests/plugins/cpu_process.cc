// The CPU kernels of one instruction set in a process of their own, for a processor that only an emulator has.
// Calls come on stdin and results go to stdout, both as the bytes of this machine: `operator` and its sizes as
// int32, its attributes as float, tensors as float32 in the order of the operator (cpu_library.py writes them).

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "common/call.h"

extern "C" void apply(int function, const float *x, float *y, size_t count);

namespace {

// The end of stdin between two calls is how the process is told to go.
template <class T>
bool read(T *to, size_t count) {
    return std::fread(to, sizeof(T), count, stdin) == count;
}

std::vector<float> tensor(size_t count) {
    std::vector<float> values(count);
    if (!read(values.data(), count)) std::exit(2);
    return values;
}

void write(const std::vector<float> &values) {
    if (std::fwrite(values.data(), sizeof(float), values.size(), stdout) != values.size()) std::exit(2);
}

// Results are NaN until they are written, or start as the incoming state that they replace.
struct State {
    std::vector<float> past, present;
    State(size_t count, bool in_place) : past(tensor(count)), present(in_place ? 0 : count, NAN) {}
    float *out() { return present.empty() ? past.data() : present.data(); }
    void send() { write(present.empty() ? past : present); }
};

int run_mlstm() {
    int32_t sizes[6];  // B, S, H, Dk, Dv, in place
    float attributes[5];
    if (!read(sizes, 6) || !read(attributes, 5)) return 2;
    const size_t heads = size_t(sizes[0]) * sizes[2], positions = heads * sizes[1], dk = sizes[3],
                 dv = sizes[4];
    xlstm::Mlstm call{};
    call.batch = sizes[0], call.length = sizes[1], call.heads = sizes[2], call.dk = sizes[3],
    call.dv = sizes[4];
    call.scale = attributes[0], call.eps = attributes[1], call.forget_exp = attributes[2] != 0;
    call.input_sigmoid = attributes[3] != 0, call.normalize = attributes[4] != 0;
    const auto q = tensor(positions * dk), k = tensor(positions * dk), v = tensor(positions * dv);
    const auto i = tensor(positions), f = tensor(positions);
    State C(heads * dk * dv, sizes[5] != 0), n(heads * dk, sizes[5] != 0), m(heads, sizes[5] != 0);
    std::vector<float> h(positions * dv, NAN);
    call.q = q.data(), call.k = k.data(), call.v = v.data(), call.i = i.data(), call.f = f.data();
    call.C0 = C.past.data(), call.n0 = n.past.data(), call.m0 = m.past.data();
    call.h = h.data(), call.C = C.out(), call.n = n.out(), call.m = m.out();
    if (xlstm_mlstm_run(&call, nullptr, nullptr) != 0) return 3;
    write(h), C.send(), n.send(), m.send();
    return 0;
}

int run_slstm() {
    int32_t sizes[5];  // B, S, H, D, in place
    float attributes[3];
    if (!read(sizes, 5) || !read(attributes, 3)) return 2;
    const size_t units = size_t(sizes[2]) * sizes[3], state = sizes[0] * units;
    xlstm::Slstm call{};
    call.batch = sizes[0], call.length = sizes[1], call.heads = sizes[2], call.dim = sizes[3];
    call.forget_max = attributes[0], call.forget_exp = attributes[1] != 0,
    call.normalizer_min = attributes[2];
    const auto x = tensor(state * sizes[1] * 4), R = tensor(units * 4 * sizes[3]), bias = tensor(4 * units);
    const bool in_place = sizes[4] != 0;
    State y(state, in_place), c(state, in_place), n(state, in_place), m(state, in_place);
    std::vector<float> ys(state * sizes[1], NAN);
    call.x = x.data(), call.R = R.data(), call.bias = bias.data(), call.y = ys.data();
    call.y0 = y.past.data(), call.c0 = c.past.data(), call.n0 = n.past.data(), call.m0 = m.past.data();
    call.y_n = y.out(), call.c_n = c.out(), call.n_n = n.out(), call.m_n = m.out();
    if (xlstm_slstm_run(&call, nullptr, nullptr) != 0) return 3;
    write(ys), y.send(), c.send(), n.send(), m.send();
    return 0;
}

int run_function() {
    int32_t function, count;
    if (!read(&function, 1) || !read(&count, 1)) return 2;
    const auto x = tensor(count);
    std::vector<float> y(x.size(), NAN);
    apply(function, x.data(), y.data(), x.size());
    write(y);
    return 0;
}

}  // namespace

int main() {
    int (*const operators[])() = {run_mlstm, run_slstm, run_function};
    int32_t which;
    while (read(&which, 1)) {
        const int status = which >= 0 && which < 3 ? operators[which]() : 2;
        if (status != 0) return status;
        std::fflush(stdout);
    }
    return 0;
}
