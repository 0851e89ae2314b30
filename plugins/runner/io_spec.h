// The tensors of an engine, and which of them carry the state: what goes in as past_<block>_<kind> comes out as
// present_<block>_<kind>.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "xlstm_runner.h"

namespace xlstm::runner {

constexpr int64_t kBatch = -2;                 // the first axis of every tensor
constexpr int64_t kSequence = XLSTM_SEQUENCE;  // the second axis of some

struct Tensor {
    std::string name;
    xlstm_type type;
    std::vector<int64_t> dims;

    bool is_sequence() const { return dims.size() > 1 && dims[1] == kSequence; }
    // Bytes of one row, and where there is a sequence axis, of one position of it.
    size_t row_bytes() const;
};

struct State {
    Tensor past;  // its name is that of the input
    std::string present;
};

struct IoSpec {
    std::vector<Tensor> inputs, outputs;
    std::vector<State> states;
};

size_t size_of(xlstm_type type);
const char *name_of(xlstm_type type);
std::string describe(const Tensor &tensor);  // such as: past_0_C, float32 (B, 4, 64, 64)

// Tells states from inputs and outputs, by their names; all keep the engine's order. Throws
// Error(XLSTM_BAD_INPUT): what cannot be used, or a state that goes in and does not come out.
IoSpec make_io(const std::vector<Tensor> &inputs, const std::vector<Tensor> &outputs);

}  // namespace xlstm::runner
