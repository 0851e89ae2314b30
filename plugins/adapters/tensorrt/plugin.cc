#include "adapters/tensorrt/plugin.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <stdexcept>

#include "adapters/tensorrt/log.h"

namespace xlstm::tensorrt {
namespace {

using nvinfer1::DataType;
using nvinfer1::Dims;
using nvinfer1::DimsExprs;
using nvinfer1::DynamicPluginTensorDesc;
using nvinfer1::IPluginV3;
using nvinfer1::PluginCapabilityType;
using nvinfer1::PluginField;
using nvinfer1::PluginFieldType;
using nvinfer1::PluginTensorDesc;
using nvinfer1::TensorFormat;

constexpr int32_t kFailed = 1;

// What a caller did wrong; ends in a log message and a status, never crosses the interface.
struct Refusal : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// The result of `work`, or `failed` with a message in the log.
template <typename Result, typename Work>
Result guarded(const Op &op, const std::string &layer, Result failed, Work work) noexcept {
    try {
        return work();
    } catch (const std::exception &error) {
        try {
            log_error(std::string(op.name) + " \"" + layer + "\": " + error.what());
        } catch (const std::bad_alloc &) {
            log_error("out of memory");
        }
    }
    return failed;
}

bool is_float(DataType type) {
    return type == DataType::kFLOAT || type == DataType::kHALF || type == DataType::kBF16;
}

// Whether tensors of a kind can have a type. `quantized`: the weight's scale is given.
bool is_possible(Kind kind, DataType type, bool quantized) {
    if (kind == Kind::f32) return type == DataType::kFLOAT;
    if (kind == Kind::weight && quantized) return type == DataType::kINT8;
    return is_float(type);
}

const char *types_of(Kind kind, bool quantized) {
    if (kind == Kind::f32) return "FP32";
    if (kind == Kind::weight) {
        return quantized ? "INT8, as R_scale is given"
                         : "FP32, FP16 or BF16 (INT8 with R_scale as 8th input)";
    }
    return "FP32, FP16 or BF16";
}

Dtype dtype_of(DataType type) {
    switch (type) {
        case DataType::kHALF: return Dtype::f16;
        case DataType::kBF16: return Dtype::bf16;
        case DataType::kINT8: return Dtype::i8;
        default: return Dtype::f32;
    }
}

// The first input of a kind: the others have its type.
size_t leader_of(const Op &op, Kind kind) {
    const auto same = [kind](const Tensor &tensor) { return tensor.kind == kind; };
    return std::find_if(op.inputs.begin(), op.inputs.end(), same) - op.inputs.begin();
}

}  // namespace

Plugin::Plugin(const Op &op, const char *version, std::string layer, std::vector<float> attributes,
               bool aliased, int32_t processors)
    : op_(op),
      version_(version),
      layer_(std::move(layer)),
      attributes_(std::move(attributes)),
      aliased_(aliased ? 1 : 0),
      processors_(processors) {
    for (size_t i = 0; i < attributes_.size(); ++i) {
        if (std::isnan(attributes_[i])) continue;
        fields_.emplace_back(op_.attributes[i].name, &attributes_[i], PluginFieldType::kFLOAT32, 1);
    }
    fields_.emplace_back("aliased", &aliased_, PluginFieldType::kINT32, 1);
    fields_.emplace_back("processors", &processors_, PluginFieldType::kINT32, 1);
    field_collection_ = {static_cast<int32_t>(fields_.size()), fields_.data()};
}

Plugin::Plugin(const Plugin &other)
    : Plugin(other.op_, other.version_, other.layer_, other.attributes_, other.aliased_ != 0,
             other.processors_) {}

nvinfer1::IPluginCapability *Plugin::getCapabilityInterface(PluginCapabilityType type) noexcept {
    switch (type) {
        case PluginCapabilityType::kCORE: return static_cast<nvinfer1::IPluginV3OneCore *>(this);
        case PluginCapabilityType::kBUILD: return static_cast<nvinfer1::IPluginV3OneBuildV2 *>(this);
        case PluginCapabilityType::kRUNTIME: return static_cast<nvinfer1::IPluginV3OneRuntime *>(this);
    }
    return nullptr;
}

IPluginV3 *Plugin::clone() noexcept {
    return guarded<IPluginV3 *>(op_, layer_, nullptr, [this] { return new Plugin(*this); });
}

const char *Plugin::getPluginName() const noexcept { return op_.name; }
const char *Plugin::getPluginVersion() const noexcept { return version_; }
const char *Plugin::getPluginNamespace() const noexcept { return kNamespace; }
int32_t Plugin::getNbOutputs() const noexcept { return static_cast<int32_t>(op_.outputs.size()); }
const char *Plugin::getTimingCacheID() noexcept { return op_.timing_id; }

int32_t Plugin::getAliasedInput(int32_t output) noexcept {
    if (aliased_ == 0 || output < 0 || output >= getNbOutputs()) return -1;
    return op_.outputs[output].past;
}

int32_t Plugin::configurePlugin(const DynamicPluginTensorDesc *inputs, int32_t nbInputs,
                                const DynamicPluginTensorDesc *outputs, int32_t nbOutputs) noexcept {
    return guarded<int32_t>(op_, layer_, kFailed, [&] {
        require_counts(nbInputs, nbOutputs);
        require_kernel(largest_request(inputs, nbInputs, outputs));
        return 0;
    });
}

int32_t Plugin::getOutputDataTypes(DataType *outputs, int32_t nbOutputs, const DataType *inputs,
                                   int32_t nbInputs) const noexcept {
    return guarded<int32_t>(op_, layer_, kFailed, [&] {
        require_counts(nbInputs, nbOutputs);
        Request request;
        const bool quantized = static_cast<size_t>(nbInputs) > op_.required_inputs;
        for (int32_t i = 0; i < nbInputs; ++i) take_type(request, op_.inputs[i], inputs[i], quantized);
        for (int32_t i = 0; i < nbOutputs; ++i) outputs[i] = inputs[leader_of(op_, op_.outputs[i].kind)];
        return 0;
    });
}

int32_t Plugin::getOutputShapes(const DimsExprs *inputs, int32_t nbInputs, const DimsExprs *, int32_t,
                                DimsExprs *outputs, int32_t nbOutputs, nvinfer1::IExprBuilder &) noexcept {
    return guarded<int32_t>(op_, layer_, kFailed, [&] {
        require_counts(nbInputs, nbOutputs);
        Sizes sizes;
        std::array<const nvinfer1::IDimensionExpr *, 26> expressions{};
        for (int32_t i = 0; i < nbInputs; ++i) {
            const Tensor &tensor = op_.inputs[i];
            Dims known{};
            known.nbDims = inputs[i].nbDims;
            for (int32_t j = 0; j < std::min(known.nbDims, Dims::MAX_DIMS); ++j) {
                const nvinfer1::IDimensionExpr *size = inputs[i].d[j];
                if (size == nullptr) throw Refusal(std::string(tensor.name) + " has no size for an axis");
                known.d[j] = size->isConstant() ? size->getConstantValue() : -1;
            }
            if (const std::string misfit = sizes.take(tensor, known); !misfit.empty()) throw Refusal(misfit);
            for (int32_t j = 0; j < known.nbDims; ++j) {  // the rank is right from here on
                if (tensor.axes[j] < 'A') continue;
                auto &expression = expressions[tensor.axes[j] - 'A'];
                if (expression == nullptr || inputs[i].d[j]->isConstant()) expression = inputs[i].d[j];
            }
        }
        for (int32_t i = 0; i < nbOutputs; ++i) {
            outputs[i].nbDims = 0;
            for (const char *axis = op_.outputs[i].axes; *axis != '\0'; ++axis) {
                outputs[i].d[outputs[i].nbDims++] = expressions[*axis - 'A'];
            }
        }
        return 0;
    });
}

bool Plugin::supportsFormatCombination(int32_t position, const DynamicPluginTensorDesc *tensors,
                                       int32_t nbInputs, int32_t nbOutputs) noexcept {
    return guarded(op_, layer_, false, [&] {
        require_counts(nbInputs, nbOutputs);
        if (position < 0 || position >= nbInputs + nbOutputs) {
            throw Refusal("there is no tensor " + std::to_string(position));
        }
        const PluginTensorDesc &desc = tensors[position].desc;
        if (desc.format != TensorFormat::kLINEAR) return false;
        const Tensor &tensor = position < nbInputs ? op_.inputs[position] : op_.outputs[position - nbInputs];
        const bool quantized = static_cast<size_t>(nbInputs) > op_.required_inputs;
        if (!is_possible(tensor.kind, desc.type, quantized)) return false;
        return tensor.kind == Kind::f32 || desc.type == tensors[leader_of(op_, tensor.kind)].desc.type;
    });
}

size_t Plugin::getWorkspaceSize(const DynamicPluginTensorDesc *inputs, int32_t nbInputs,
                                const DynamicPluginTensorDesc *outputs, int32_t nbOutputs) const noexcept {
    return guarded<size_t>(op_, layer_, 0, [&] {
        require_counts(nbInputs, nbOutputs);
        const Request largest = largest_request(inputs, nbInputs, outputs);
        require_kernel(largest);
        // Kernels share few sequences out over more blocks than many, so a smaller batch can want more; a
        // single position is another kernel than a sequence.
        size_t bytes = 0;
        Request request = largest;
        for (int32_t batch = 1; batch <= largest.sizes['B']; ++batch) {
            for (const int32_t length : {1, largest.sizes['S']}) {
                request.sizes['B'] = batch;
                request.sizes['S'] = length;
                bytes = std::max(bytes, op_.workspace(request));
            }
        }
        return bytes;
    });
}

int32_t Plugin::onShapeChange(const PluginTensorDesc *inputs, int32_t nbInputs,
                              const PluginTensorDesc *outputs, int32_t nbOutputs) noexcept {
    return guarded<int32_t>(op_, layer_, kFailed, [&] {
        require_counts(nbInputs, nbOutputs);
        require_kernel(request_of(inputs, nbInputs, outputs));
        return 0;
    });
}

int32_t Plugin::enqueue(const PluginTensorDesc *inputDesc, const PluginTensorDesc *outputDesc,
                        const void *const *inputs, void *const *outputs, void *workspace,
                        cudaStream_t stream) noexcept {
    return guarded<int32_t>(op_, layer_, kFailed, [&] {
        if (inputDesc == nullptr || outputDesc == nullptr || inputs == nullptr || outputs == nullptr) {
            throw Refusal("enqueue without tensors");
        }
        const size_t given = count_inputs(inputDesc);
        Request request = request_of(inputDesc, given, outputDesc);
        for (size_t i = 0; i < given; ++i) {
            if (inputs[i] == nullptr) throw Refusal(std::string(op_.inputs[i].name) + " has no address");
        }
        for (size_t i = 0; i < op_.outputs.size(); ++i) {
            if (outputs[i] == nullptr) throw Refusal(std::string(op_.outputs[i].name) + " has no address");
        }
        require_kernel(request);
        request.inputs = inputs;
        request.outputs = outputs;
        if (const size_t bytes = op_.workspace(request); bytes > 0 && workspace == nullptr) {
            throw Refusal("no workspace, where " + std::to_string(bytes) + " bytes are needed");
        }
        const int status = op_.run(request, workspace, stream);
        if (status != 0) {
            throw Refusal("the kernel failed with CUDA error " + std::to_string(status) + " at batch " +
                          std::to_string(request.sizes['B']) + ", length " +
                          std::to_string(request.sizes['S']));
        }
        return 0;
    });
}

IPluginV3 *Plugin::attachToContext(nvinfer1::IPluginResourceContext *) noexcept { return clone(); }

const nvinfer1::PluginFieldCollection *Plugin::getFieldsToSerialize() noexcept { return &field_collection_; }

// How many inputs there are, which enqueue is not told: the scale is there where the weight is INT8.
size_t Plugin::count_inputs(const PluginTensorDesc *inputs) const {
    const size_t weight = leader_of(op_, Kind::weight);
    const bool quantized = weight < op_.required_inputs && inputs[weight].type == DataType::kINT8;
    return quantized ? op_.inputs.size() : op_.required_inputs;
}

void Plugin::require_counts(int32_t nbInputs, int32_t nbOutputs) const {
    const int32_t fewest = static_cast<int32_t>(op_.required_inputs);
    const int32_t most = static_cast<int32_t>(op_.inputs.size());
    if (nbInputs < fewest || nbInputs > most) {
        throw Refusal(std::to_string(nbInputs) + " inputs, expected " + std::to_string(fewest) +
                      (most > fewest ? " or " + std::to_string(most) : ""));
    }
    if (nbOutputs != getNbOutputs()) {
        throw Refusal(std::to_string(nbOutputs) + " outputs, expected " + std::to_string(getNbOutputs()));
    }
}

// The call for shapes that are all known.
Request Plugin::request_of(const PluginTensorDesc *inputs, size_t nbInputs,
                           const PluginTensorDesc *outputs) const {
    Request request;
    request.attributes = attributes_.data();
    request.processors = processors_;
    const auto take = [&](const Tensor &tensor, const PluginTensorDesc &desc, bool quantized) {
        take_type(request, tensor, desc.type, quantized);
        if (const std::string misfit = request.sizes.take(tensor, desc.dims); !misfit.empty()) {
            throw Refusal(misfit);
        }
        if (std::any_of(desc.dims.d, desc.dims.d + desc.dims.nbDims, [](int64_t size) { return size < 0; })) {
            throw Refusal(std::string(tensor.name) + " has shape " + to_string(desc.dims) + ", not known");
        }
    };
    const bool quantized = nbInputs > op_.required_inputs;
    for (size_t i = 0; i < nbInputs; ++i) take(op_.inputs[i], inputs[i], quantized);
    for (size_t i = 0; i < op_.outputs.size(); ++i) take(op_.outputs[i], outputs[i], quantized);
    return request;
}

// The call for the largest sizes of a profile. Bounds of tensors need not agree, as TensorRT's are not always
// tight; sizes that are known must.
Request Plugin::largest_request(const DynamicPluginTensorDesc *inputs, int32_t nbInputs,
                                const DynamicPluginTensorDesc *outputs) const {
    Request request;
    request.attributes = attributes_.data();
    request.processors = processors_;
    Sizes known;
    const bool quantized = static_cast<size_t>(nbInputs) > op_.required_inputs;
    const auto take = [&](const Tensor &tensor, const PluginTensorDesc &desc) {
        take_type(request, tensor, desc.type, quantized);
        if (const std::string misfit = known.take(tensor, desc.dims); !misfit.empty()) throw Refusal(misfit);
    };
    for (int32_t i = 0; i < nbInputs; ++i) {
        take(op_.inputs[i], inputs[i].desc);
        request.sizes.raise(op_.inputs[i], inputs[i].desc.dims);
        request.sizes.raise(op_.inputs[i], inputs[i].max);
    }
    for (size_t i = 0; i < op_.outputs.size(); ++i) take(op_.outputs[i], outputs[i].desc);
    return request;
}

// Notes the type that a tensor gives its kind.
void Plugin::take_type(Request &request, const Tensor &tensor, DataType type, bool quantized) const {
    if (!is_possible(tensor.kind, type, quantized)) {
        throw Refusal(std::string(tensor.name) + " is " + to_string(type) + ", expected " +
                      types_of(tensor.kind, quantized));
    }
    if (tensor.kind == Kind::f32) return;
    Dtype &noted = tensor.kind == Kind::io      ? request.io
                   : tensor.kind == Kind::state ? request.state
                                                : request.weight;
    const Tensor &leader = op_.inputs[leader_of(op_, tensor.kind)];
    if (&tensor != &leader && noted != dtype_of(type)) {
        throw Refusal(std::string(tensor.name) + " is " + to_string(type) + ", unlike " + leader.name);
    }
    noted = dtype_of(type);
}

void Plugin::require_kernel(const Request &request) const {
    if (const char *refusal = op_.check(request)) throw Refusal(refusal);
}

}  // namespace xlstm::tensorrt
