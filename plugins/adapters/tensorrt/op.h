// What the adapter knows of a recurrence operator: its tensors, its attributes and its kernels. plugin.cc
// makes a TensorRT plugin of that; mlstm.cc and slstm.cc hold the two tables.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "adapters/tensorrt/interface.h"
#include "common/attributes.h"
#include "common/call.h"

namespace xlstm::tensorrt {

// Tensors of one kind have one type: io and state are f32, f16 or bf16; weight these, or int8 where its scale
// is an input too.
enum class Kind { f32, io, state, weight };

struct Tensor {
    const char *name;
    const char *axes;  // a letter for each size, a digit for a fixed one
    Kind kind;
    int past = -1;  // of an output: the input that it may overwrite
};

// Sizes by the letters of the axes; 0: not known.
class Sizes {
public:
    // Takes the sizes of a tensor, skipping negative ones (not known yet). Returns what does not fit with the
    // tensor's axes or with the sizes taken before, or an empty string.
    std::string take(const Tensor &tensor, const nvinfer1::Dims &dims);
    // Raises sizes to those of a tensor's largest shape.
    void raise(const Tensor &tensor, const nvinfer1::Dims &largest);

    int32_t operator[](char axis) const { return sizes_[axis - 'A']; }
    int32_t &operator[](char axis) { return sizes_[axis - 'A']; }

private:
    std::array<int32_t, 26> sizes_{};
};

// One call, before it takes the form of common/call.h.
struct Request {
    Sizes sizes;
    Dtype io = Dtype::f32, state = Dtype::f32, weight = Dtype::f32;
    int32_t processors = 0;               // that the workspace is planned for
    const float *attributes = nullptr;    // in the order of Op::attributes
    const void *const *inputs = nullptr;  // in the order of Op::inputs; null where only sizes matter
    void *const *outputs = nullptr;
};

struct Op {
    const char *name;
    const char *timing_id;       // plugins with the same id, shapes and types take the same time
    std::vector<Tensor> inputs;  // the last one is given only where the weight is int8
    size_t required_inputs;
    std::vector<Tensor> outputs;
    std::vector<Attribute> attributes;

    const char *(*check)(const Request &);
    size_t (*workspace)(const Request &);
    int (*run)(const Request &, void *workspace, cudaStream_t stream);
};

const Op &mlstm_op();
const Op &slstm_op();

// Readable forms for messages.
std::string to_string(const nvinfer1::Dims &dims);
std::string to_string(nvinfer1::DataType type);

}  // namespace xlstm::tensorrt
