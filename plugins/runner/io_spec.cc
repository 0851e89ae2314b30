#include "io_spec.h"

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <memory>
#include <set>

#include "error.h"
#include "json.h"

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

[[noreturn]] void fail(const std::string &what) { throw Error(XLSTM_BAD_INPUT, "io.json: " + what); }

const Json &member(const Json &object, const char *name, Json::Kind kind, const std::string &where) {
    const Json *found = object.find(name);
    if (found == nullptr) fail(where + " has no \"" + name + "\"");
    if (found->kind != kind) fail(where + ": \"" + name + "\" is of another type than expected");
    return *found;
}

int64_t parse_dim(const Json &item, size_t axis, bool sequence_allowed, const std::string &where) {
    if (item.kind == Json::kString && axis == 0 && item.text == "B") return kBatch;
    if (axis == 0) fail(where + ": the first axis must be \"B\"");
    if (item.kind == Json::kString && axis == 1 && item.text == "S" && sequence_allowed) return kSequence;
    if (item.kind != Json::kInteger || item.integer < 1) {
        fail(where + ": axis " + std::to_string(axis) + " is neither a size nor \"S\" where that may be");
    }
    return item.integer;
}

Tensor parse_tensor(const Json &entry, const char *name_key, bool is_state, const std::string &where) {
    if (entry.kind != Json::kObject) fail(where + " is not an object");
    Tensor tensor{member(entry, name_key, Json::kString, where).text, XLSTM_FLOAT32, {}};
    const std::string named = where + " \"" + tensor.name + "\"";
    const std::string &type = member(entry, "dtype", Json::kString, named).text;
    const TypeEntry *found = nullptr;
    for (const TypeEntry &known : kTypes) found = type == known.name ? &known : found;
    if (found == nullptr) fail(named + ": unknown dtype " + type);
    tensor.type = found->type;
    const Json &shape = member(entry, "shape", Json::kArray, named);
    if (shape.items.empty() || shape.items.size() > XLSTM_MAX_RANK) {
        fail(named + " has " + std::to_string(shape.items.size()) + " axes, expected 1 … 8");
    }
    int64_t elements = 1;
    for (size_t axis = 0; axis < shape.items.size(); ++axis) {
        const int64_t dim = parse_dim(shape.items[axis], axis, !is_state, named);
        tensor.dims.push_back(dim);
        if (dim > 0 && (dim > kMostElements / elements)) fail(named + " is too large");
        elements *= dim > 0 ? dim : 1;
    }
    return tensor;
}

void take_name(std::set<std::string> &names, const std::string &name) {
    if (name.empty() || name.find('\0') != std::string::npos) fail("a tensor's name is empty or holds a zero");
    if (!names.insert(name).second) fail("two tensors are named \"" + name + "\"");
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

IoSpec parse_io(const std::string &json) {
    const Json root = parse_json(json);
    if (root.kind != Json::kObject) fail("not an object");
    const int64_t schema = member(root, "schema", Json::kInteger, "the file").integer;
    if (schema != 1) fail("schema " + std::to_string(schema) + ", this runner reads 1");
    IoSpec spec;
    std::set<std::string> names;
    for (const Json &entry : member(root, "inputs", Json::kArray, "the file").items) {
        spec.inputs.push_back(parse_tensor(entry, "name", false, "input"));
        take_name(names, spec.inputs.back().name);
    }
    for (const Json &entry : member(root, "outputs", Json::kArray, "the file").items) {
        spec.outputs.push_back(parse_tensor(entry, "name", false, "output"));
        take_name(names, spec.outputs.back().name);
    }
    for (const Json &entry : member(root, "states", Json::kArray, "the file").items) {
        State state{parse_tensor(entry, "past", true, "state"), ""};
        state.present = member(entry, "present", Json::kString, "state \"" + state.past.name + "\"").text;
        take_name(names, state.past.name);
        take_name(names, state.present);
        spec.states.push_back(std::move(state));
    }
    if (spec.inputs.empty() || spec.outputs.empty()) fail("no inputs or no outputs");
    return spec;
}

std::string read_file(const std::string &path) {
    const std::unique_ptr<std::FILE, int (*)(std::FILE *)> file(std::fopen(path.c_str(), "rb"), std::fclose);
    if (file == nullptr) throw Error(XLSTM_BAD_INPUT, path + ": " + std::strerror(errno));
    std::string text;
    std::vector<char> block(1 << 20);
    while (const size_t got = std::fread(block.data(), 1, block.size(), file.get())) {
        text.append(block.data(), got);
    }
    if (std::ferror(file.get()) != 0) throw Error(XLSTM_ENVIRONMENT, path + ": " + std::strerror(errno));
    return text;
}

}  // namespace xlstm::runner
