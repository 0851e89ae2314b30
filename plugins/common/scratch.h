// Scratch memory of one task of a CPU kernel, handed out in pieces that start on a cache line.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <cstring>

namespace xlstm {
namespace {

class Scratch {
public:
    explicit Scratch(size_t floats) {
        data_ = next_ = static_cast<float *>(std::aligned_alloc(64, rounded(floats) * sizeof(float)));
#ifdef XLSTM_POISON  // tests: what is read before it is written shows as NaN
        if (data_ != nullptr) std::memset(data_, 0xff, rounded(floats) * sizeof(float));
#endif
    }
    ~Scratch() { std::free(data_); }
    Scratch(const Scratch &) = delete;
    Scratch &operator=(const Scratch &) = delete;
    bool ok() const { return data_ != nullptr; }
    float *take(size_t floats) {
        float *taken = next_;
        next_ += rounded(floats);
        return taken;
    }
    // What a piece of so many floats takes.
    static size_t rounded(size_t floats) { return (floats + 15) / 16 * 16; }

private:
    float *data_, *next_;
};

}  // namespace
}  // namespace xlstm
