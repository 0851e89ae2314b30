// One call of a recurrence operator, as every implementation takes it: kernels on a GPU, the same kernels on
// a CPU, the CPU operators. Plain data, so that C, C++ and ctypes (native.py) agree on the layout.
//
// Tensors are contiguous, in the shapes of xlstm_export/ops.py. A state may be updated in place: each pair of
// past and present pointers is either equal or does not overlap. An all-zero state is a fresh start.
#pragma once

#include <cstddef>
#include <cstdint>

namespace xlstm {

enum class Dtype : int32_t { f32 = 0, f16 = 1, bf16 = 2, i8 = 3 };

struct Mlstm {
    int32_t batch, length, heads, dk, dv;  // B, S, H, Dk, Dv
    Dtype io;                              // q, k, v, h: f32, f16 or bf16
    Dtype state;                           // C0, C: f32, f16 or bf16; n and m are always f32
    float scale;                           // multiplies q
    float eps;                             // added to the normalizer
    int32_t forget_exp;                    // 1: the forget gate is exp(f), 0: sigmoid(f)
    int32_t input_sigmoid;                 // 1: the input gate is sigmoid(i), 0: exp(i)
    int32_t normalize = 1;                 // 0: h is (scale·q)ᵀC·eᵐ, without a normalizer
    int32_t processors;                    // that scratch memory is shared out to; 0: those of the device
    const void *q, *k;                     // (B, S, H, Dk)
    const void *v;                         // (B, S, H, Dv)
    const float *i, *f;                    // (B, S, H) pre-activations
    const void *C0;                        // (B, H, Dk, Dv)
    const float *n0;                       // (B, H, Dk)
    const float *m0;                       // (B, H)
    void *h;                               // (B, S, H, Dv)
    void *C;
    float *n, *m;
};

// Whether the function is that of a call without the attributes that select another one.
inline bool is_plain(const Mlstm &call) {
    return call.forget_exp == 0 && call.input_sigmoid == 0 && call.normalize == 1;
}

struct Slstm {
    int32_t batch, length, heads, dim;  // B, S, H, D
    Dtype io;                           // x, y: f32, f16 or bf16
    Dtype weight;                       // R: f32, f16, bf16 or i8
    float forget_max;                   // the forget pre-activation is at most this; +inf: no bound
    int32_t forget_exp;                 // 1: the forget gate is exp(f), 0: sigmoid(f)
    float normalizer_min;               // n is at least this, 0 to 1
    const void *x;                      // (B, S, 4, H, D) pre-activations in the order i, f, z, o
    const void *R;                      // (H, D, 4, D): from unit (axis 1) to gate and unit
    const float *R_scale;               // (H, 4, D) for i8: R = R_scale * integers; else null
    const float *bias;                  // (4, H, D)
    const float *y0, *c0, *n0, *m0;     // (B, H, D)
    void *y;                            // (B, S, H, D)
    float *y_n, *c_n, *n_n, *m_n;       // (B, H, D) after the last position
};

inline bool is_plain(const Slstm &call) { return call.forget_exp == 0 && call.normalizer_min == 0; }

// Null, or what is wrong with the attributes that select a function: a value that is not known is refused and
// not taken for another.
inline const char *check_function(const Mlstm &call) {
    const auto flag = [](int32_t value) { return value == 0 || value == 1; };
    if (!flag(call.forget_exp) || !flag(call.input_sigmoid) || !flag(call.normalize))
        return "forget_exp, input_sigmoid and normalize must be 0 or 1";
    return nullptr;
}

inline const char *check_function(const Slstm &call) {
    if (call.forget_exp != 0 && call.forget_exp != 1) return "forget_exp must be 0 or 1";
    if (!(call.normalizer_min >= 0 && call.normalizer_min <= 1)) return "normalizer_min must be 0 to 1";
    return nullptr;
}

}  // namespace xlstm

// Multiprocessors of the current GPU, 1 where there is none. Power modes of a Jetson change it, so what depends
// on it and outlives a process is stored, see Mlstm::processors. Only libraries for a GPU have it.
extern "C" int xlstm_processors();

// What every library of kernels exports. `check` returns null or what is wrong with sizes and types (pointers
// are not looked at); `workspace` the bytes of scratch memory that `run` wants, aligned to 256; `run` returns
// 0, or an error number of the library's own (a cudaError_t on a GPU). `context` is a cudaStream_t on a GPU;
// see the library elsewhere.
extern "C" {
const char *xlstm_mlstm_check(const xlstm::Mlstm *call);
size_t xlstm_mlstm_workspace(const xlstm::Mlstm *call);
int xlstm_mlstm_run(const xlstm::Mlstm *call, void *workspace, void *context);

const char *xlstm_slstm_check(const xlstm::Slstm *call);
size_t xlstm_slstm_workspace(const xlstm::Slstm *call);
int xlstm_slstm_run(const xlstm::Slstm *call, void *workspace, void *context);
}
