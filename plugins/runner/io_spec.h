// What io.json says: the tensors of an exported graph and which of them carry the state.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "xlstm_runner.h"

namespace xlstm::runner {

constexpr int64_t kBatch = -2;                  // "B", the first axis of every tensor
constexpr int64_t kSequence = XLSTM_SEQUENCE;  // "S", the second axis of some

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

// Both throw Error(XLSTM_BAD_INPUT): what is wrong, and where. read_file also throws XLSTM_ENVIRONMENT.
IoSpec parse_io(const std::string &json);
std::string read_file(const std::string &path);

}  // namespace xlstm::runner
