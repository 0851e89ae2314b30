#include "io_spec.h"

#include <algorithm>
#include <set>

#include "error.h"

namespace xlstm::runner {
namespace {

struct TypeEntry {
    xlstm_type type;
    const char *name;
    size_t bytes;
};
constexpr TypeEntry kTypes[] = {
    {XLSTM_FLOAT32, "float32", 4}, {XLSTM_FLOAT16, "float16", 2}, {XLSTM_BFLOAT16, "bfloat16", 2},
    {XLSTM_INT8, "int8", 1},       {XLSTM_INT32, "int32", 4},     {XLSTM_INT64, "int64", 8},
    {XLSTM_BOOL, "bool", 1},       {XLSTM_UINT8, "uint8", 1},
};
constexpr int64_t kMostElements = int64_t{1} << 40;  // of one row: far beyond any memory, far from overflow

[[noreturn]] void fail(const std::string &what) { throw Error(XLSTM_BAD_INPUT, "the engine: " + what); }

// What follows "past" or "present" in the name of a state, such as _0_C; empty for other names.
std::string state_of(const std::string &name, const std::string &prefix) {
    if (name.compare(0, prefix.size(), prefix) != 0) return "";
    const std::string rest = name.substr(prefix.size());
    const size_t kind = rest.find('_', 1);
    if (rest.size() < 4 || rest[0] != '_' || kind == std::string::npos || kind + 1 == rest.size()) return "";
    const bool block = kind > 1 && rest.find_first_not_of("0123456789", 1) == kind;
    return block ? rest : "";
}

void check(const Tensor &tensor) {
    const std::string text = describe(tensor);
    if (tensor.dims.empty() || tensor.dims.size() > XLSTM_MAX_RANK) {
        fail(text + " has " + std::to_string(tensor.dims.size()) + " axes, expected 1 … 8");
    }
    if (tensor.dims[0] != kBatch) fail(text + ": its first axis is not the batch");
    int64_t elements = 1;
    for (size_t axis = 1; axis < tensor.dims.size(); ++axis) {
        const int64_t dim = tensor.dims[axis];
        if (axis == 1 && dim == kSequence) continue;
        if (dim < 1) fail(text + ": axis " + std::to_string(axis) + " is neither a size nor the length");
        if (dim > kMostElements / elements) fail(text + " is too large");
        elements *= dim;
    }
}

void check_state(const Tensor &past, const Tensor &present) {
    if (past.is_sequence()) fail(describe(past) + " has a sequence axis, which a state has not");
    if (past.type != present.type || past.dims != present.dims) {
        fail(describe(past) + " comes out as " + describe(present));
    }
}

}  // namespace

size_t size_of(xlstm_type type) {
    for (const TypeEntry &known : kTypes) {
        if (known.type == type) return known.bytes;
    }
    return 0;
}

const char *name_of(xlstm_type type) {
    for (const TypeEntry &known : kTypes) {
        if (known.type == type) return known.name;
    }
    return "unknown";
}

size_t Tensor::row_bytes() const {
    size_t bytes = size_of(type);
    for (const int64_t dim : dims) bytes *= dim > 0 ? static_cast<size_t>(dim) : 1;
    return bytes;
}

std::string describe(const Tensor &tensor) {
    std::string text = tensor.name + ", " + name_of(tensor.type) + " (";
    for (size_t axis = 0; axis < tensor.dims.size(); ++axis) {
        const int64_t dim = tensor.dims[axis];
        text += axis == 0 ? "" : ", ";
        text += dim == kBatch ? "B" : dim == kSequence ? "S" : std::to_string(dim);
    }
    return text + ")";
}

IoSpec make_io(const std::vector<Tensor> &inputs, const std::vector<Tensor> &outputs) {
    std::set<std::string> names;
    for (const std::vector<Tensor> *list : {&inputs, &outputs}) {
        for (const Tensor &tensor : *list) {
            check(tensor);
            if (!names.insert(tensor.name).second) fail("two tensors are named " + tensor.name);
        }
    }
    IoSpec spec;
    for (const Tensor &input : inputs) {
        const std::string state = state_of(input.name, "past");
        if (state.empty()) {
            spec.inputs.push_back(input);
            continue;
        }
        const auto present = std::find_if(outputs.begin(), outputs.end(), [&](const Tensor &output) {
            return output.name == "present" + state;
        });
        if (present == outputs.end()) fail(input.name + " goes in and no present" + state + " comes out");
        check_state(input, *present);
        spec.states.push_back({input, present->name});
    }
    for (const Tensor &output : outputs) {
        const std::string state = state_of(output.name, "present");
        if (state.empty()) {
            spec.outputs.push_back(output);
        } else if (names.count("past" + state) == 0) {
            fail(output.name + " comes out and no past" + state + " goes in");
        }
    }
    if (spec.inputs.empty() || spec.outputs.empty()) fail("no inputs or no outputs");
    return spec;
}

}  // namespace xlstm::runner
