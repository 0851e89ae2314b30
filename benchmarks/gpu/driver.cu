// Every kernel on small shapes, without Python: what compute-sanitizer runs. Each operand has an allocation of
// its own, so that an access past its end is seen.
//
//     gpu_driver          runs all cases; exit code 1 if a call fails or a result is not finite
//
// Compiled as C++ (emulated kernels), "device" memory is host memory.

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "common/call.h"

namespace {

using xlstm::Dtype;

#ifdef __CUDACC__
void require(cudaError_t status, const char *what) {
    if (status == cudaSuccess) return;
    std::fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(status));
    std::exit(1);
}
void *allocate(size_t bytes) {
    void *p = nullptr;
    require(cudaMalloc(&p, bytes), "cudaMalloc");
    return p;
}
void release(void *p) { cudaFree(p); }
void upload(void *to, const void *from, size_t bytes) {
    require(cudaMemcpy(to, from, bytes, cudaMemcpyHostToDevice), "copy to the device");
}
void download(void *to, const void *from, size_t bytes) {
    require(cudaMemcpy(to, from, bytes, cudaMemcpyDeviceToHost), "copy from the device");
}
void wait() { require(cudaDeviceSynchronize(), "kernel"); }
#else
void *allocate(size_t bytes) { return std::aligned_alloc(256, (bytes + 255) / 256 * 256); }
void release(void *p) { std::free(p); }
void upload(void *to, const void *from, size_t bytes) { std::memcpy(to, from, bytes); }
void download(void *to, const void *from, size_t bytes) { std::memcpy(to, from, bytes); }
void wait() {}
#endif

size_t size_of(Dtype type) { return type == Dtype::f32 ? 4 : type == Dtype::i8 ? 1 : 2; }

// Uniform numbers from -1 to 1, the same in every run.
float next() {
    static uint32_t state = 1;
    state = state * 1664525u + 1013904223u;
    return static_cast<float>(state >> 8) / 8388608.0f - 1.0f;
}

// A float in 16 bits, cut off; numbers here are zero or between 2^-14 and 2^15.
uint16_t to_16_bits(float value, Dtype type) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    if (type == Dtype::bf16) return static_cast<uint16_t>(bits >> 16);
    const int exponent = static_cast<int>(bits >> 23 & 255) - 127 + 15;
    if (exponent <= 0) return 0;
    return static_cast<uint16_t>((bits >> 16 & 0x8000) | static_cast<uint32_t>(exponent) << 10 |
                                 (bits >> 13 & 0x3ff));
}

bool is_finite(const void *p, size_t index, Dtype type) {
    if (type == Dtype::f32) return std::isfinite(static_cast<const float *>(p)[index]);
    const uint16_t bits = static_cast<const uint16_t *>(p)[index];
    return type == Dtype::bf16 ? (bits & 0x7f80) != 0x7f80 : (bits & 0x7c00) != 0x7c00;
}

class Tensor {
public:
    // Random numbers: offset + scale * uniform.
    Tensor(size_t count, Dtype type, float scale, float offset = 0.0f) : Tensor(count, type) {
        std::vector<char> host(count * size_of(type));
        for (size_t j = 0; j < count; ++j) {
            const float value = offset + scale * next();
            if (type == Dtype::f32) std::memcpy(&host[4 * j], &value, 4);
            if (type == Dtype::i8) host[j] = static_cast<char>(127.0f * value);
            if (type == Dtype::f16 || type == Dtype::bf16) {
                const uint16_t half = to_16_bits(value, type);
                std::memcpy(&host[2 * j], &half, 2);
            }
        }
        upload(data_, host.data(), host.size());
    }
    // An output: holds nothing that was initialized.
    Tensor(size_t count, Dtype type) : count_(count), type_(type), data_(allocate(count * size_of(type))) {}
    ~Tensor() { release(data_); }
    Tensor(const Tensor &) = delete;
    Tensor &operator=(const Tensor &) = delete;

    void *get() const { return data_; }
    float *f32() const { return static_cast<float *>(data_); }
    bool finite() const {
        std::vector<char> host(count_ * size_of(type_));
        download(host.data(), data_, host.size());
        for (size_t j = 0; j < count_; ++j)
            if (!is_finite(host.data(), j, type_)) return false;
        return true;
    }

private:
    size_t count_;
    Dtype type_;
    void *data_;
};

int failures = 0;

template <typename Call>
void run(const char *name, const Call &call, const char *(*check)(const Call *),
         size_t (*workspace)(const Call *), int (*launch)(const Call *, void *, void *),
         std::initializer_list<const Tensor *> results) {
    std::printf("%s", name);
    bool good = false;
    if (const char *refusal = check(&call)) {
        std::printf(": refused: %s\n", refusal);
    } else {
        Tensor scratch(workspace(&call) + 1, Dtype::i8);
        const int status = launch(&call, scratch.get(), nullptr);
        wait();
        good = status == 0;
        for (const Tensor *result : results) good = good && result->finite();
        std::printf(good ? ": ok\n" : ": failed, status %d\n", status);
    }
    failures += !good;
    std::fflush(stdout);
}

void mlstm(int B, int S, int H, int Dk, int Dv, Dtype io, Dtype state, bool in_place) {
    const size_t rows = size_t(B) * S * H, heads = size_t(B) * H;
    Tensor q(rows * Dk, io, 1), k(rows * Dk, io, 1), v(rows * Dv, io, 1);
    Tensor i(rows, Dtype::f32, 4), f(rows, Dtype::f32, 4, 2);
    Tensor C0(heads * Dk * Dv, state, 1), n0(heads * Dk, Dtype::f32, 1), m0(heads, Dtype::f32, 1);
    Tensor h(rows * Dv, io);
    Tensor C(heads * Dk * Dv, state), n(heads * Dk, Dtype::f32), m(heads, Dtype::f32);
    const Tensor &C1 = in_place ? C0 : C, &n1 = in_place ? n0 : n, &m1 = in_place ? m0 : m;
    xlstm::Mlstm call{};
    call.batch = B, call.length = S, call.heads = H, call.dk = Dk, call.dv = Dv;
    call.io = io, call.state = state, call.scale = 1.0f / std::sqrt(float(Dk)), call.eps = 1e-6f;
    call.q = q.get(), call.k = k.get(), call.v = v.get(), call.i = i.f32(), call.f = f.f32();
    call.C0 = C0.get(), call.n0 = n0.f32(), call.m0 = m0.f32();
    call.h = h.get(), call.C = C1.get(), call.n = n1.f32(), call.m = m1.f32();
    char name[128];
    std::snprintf(name, sizeof name, "mlstm B%d S%d H%d Dk%d Dv%d io%d state%d%s", B, S, H, Dk, Dv, int(io),
                  int(state), in_place ? " in place" : "");
    run(name, call, xlstm_mlstm_check, xlstm_mlstm_workspace, xlstm_mlstm_run, {&h, &C1, &n1, &m1});
}

void slstm(int B, int S, int H, int D, Dtype io, Dtype weight, bool in_place) {
    const size_t rows = size_t(B) * S * H * D, units = size_t(B) * H * D;
    Tensor x(rows * 4, io, 2), R(size_t(H) * D * 4 * D, weight, weight == Dtype::i8 ? 1.0f : 0.02f);
    Tensor R_scale(size_t(H) * 4 * D, Dtype::f32, 1e-4f, 2e-4f), bias(size_t(4) * H * D, Dtype::f32, 1);
    Tensor y0(units, Dtype::f32, 1), c0(units, Dtype::f32, 1), n0(units, Dtype::f32, 0.5f, 2);
    Tensor m0(units, Dtype::f32, 1), y(rows, io);
    Tensor y_n(units, Dtype::f32), c_n(units, Dtype::f32), n_n(units, Dtype::f32), m_n(units, Dtype::f32);
    const Tensor &y1 = in_place ? y0 : y_n, &c1 = in_place ? c0 : c_n;
    const Tensor &n1 = in_place ? n0 : n_n, &m1 = in_place ? m0 : m_n;
    xlstm::Slstm call{};
    call.batch = B, call.length = S, call.heads = H, call.dim = D, call.io = io, call.weight = weight;
    call.forget_max = INFINITY, call.x = x.get(), call.R = R.get(), call.bias = bias.f32();
    call.R_scale = weight == Dtype::i8 ? R_scale.f32() : nullptr;
    call.y0 = y0.f32(), call.c0 = c0.f32(), call.n0 = n0.f32(), call.m0 = m0.f32();
    call.y = y.get(), call.y_n = y1.f32(), call.c_n = c1.f32(), call.n_n = n1.f32(), call.m_n = m1.f32();
    char name[128];
    std::snprintf(name, sizeof name, "slstm B%d S%d H%d D%d io%d weight%d%s", B, S, H, D, int(io),
                  int(weight), in_place ? " in place" : "");
    run(name, call, xlstm_slstm_check, xlstm_slstm_workspace, xlstm_slstm_run, {&y, &y1, &c1, &n1, &m1});
}

}  // namespace

int main() {
    const Dtype types[] = {Dtype::f32, Dtype::f16, Dtype::bf16};
    for (const Dtype io : types) {
        const bool flip = io == Dtype::f16;
        mlstm(2, 1, 2, 24, 40, io, Dtype::f32, flip);
        mlstm(1, 1, 1, 64, 64, io, io, !flip);
        mlstm(1, 70, 2, 24, 40, io, Dtype::f32, !flip);
        mlstm(1, 129, 1, 64, 64, io, io, flip);
        mlstm(1, 17, 1, 136, 72, io, Dtype::f32, flip);
        slstm(2, 5, 2, 24, io, io, flip);
        slstm(1, 4, 1, 128, io, Dtype::f16, !flip);
        slstm(3, 3, 1, 64, io, Dtype::i8, flip);
    }
    slstm(1, 3, 1, 256, Dtype::bf16, Dtype::bf16, true);
    slstm(2, 2, 1, 512, Dtype::f32, Dtype::f32, false);
    std::printf("%d failed\n", failures);
    return failures != 0;
}
