// TensorRT's runtime on the CPU. An engine file holds settings: profiles=1-1x1-4,1-8x1-4 (lengths x batches) or
// longest, and wrong=… for what is wrong with it.
#include <sstream>

#include "NvInferRuntime.h"
#include "mock.h"

namespace nvinfer1 {
namespace {

struct Known {
    const char *name;
    TensorIOMode mode;
    DataType type;
    std::vector<int64_t> dims;  // -1 batch, -2 length
};
const std::vector<Known> kTensors = {
    {"tokens", TensorIOMode::kINPUT, DataType::kINT64, {-1, -2}},
    {"past_0_C", TensorIOMode::kINPUT, DataType::kFLOAT, {-1, model::kMemory}},
    {"past_0_conv", TensorIOMode::kINPUT, DataType::kINT64, {-1, model::kConv}},
    {"logits", TensorIOMode::kOUTPUT, DataType::kFLOAT, {-1, -2, model::kLogits}},
    {"last", TensorIOMode::kOUTPUT, DataType::kFLOAT, {-1, model::kMemory}},
    {"present_0_C", TensorIOMode::kOUTPUT, DataType::kFLOAT, {-1, model::kMemory}},
    {"present_0_conv", TensorIOMode::kOUTPUT, DataType::kINT64, {-1, model::kConv}},
    {"present_1_C", TensorIOMode::kOUTPUT, DataType::kFLOAT, {-1, model::kMemory}},  // not of a right engine
};
constexpr size_t kRight = 7;

const Known *find(const std::string &name) {
    for (const Known &known : kTensors) {
        if (name == known.name) return &known;
    }
    return nullptr;
}

Dims dims_of(const Known &known, int64_t batch, int64_t length) {
    Dims dims{};
    for (const int64_t dim : known.dims) {
        dims.d[dims.nbDims++] = dim == -1 ? batch : dim == -2 ? length : dim;
    }
    return dims;
}

size_t bytes_of(const Known &known, int64_t batch, int64_t length) {
    const Dims dims = dims_of(known, batch, length);
    size_t bytes = known.type == DataType::kINT64 ? 8 : 4;
    for (int32_t axis = 0; axis < dims.nbDims; ++axis) bytes *= static_cast<size_t>(dims.d[axis]);
    return bytes;
}

Plan parse(const std::string &text) {
    std::istringstream words(text);
    const model::Settings settings(words);
    Plan plan;
    plan.wrong = settings.text("wrong");
    const long long longest = settings.number("longest", 8);
    std::string profiles = settings.text("profiles");
    if (profiles.empty()) profiles = "1-1x1-8,1-" + std::to_string(longest) + "x1-8";
    std::istringstream list(profiles);
    for (std::string one; std::getline(list, one, ',');) {
        long long a, b, c, d;
        REQUIRE(std::sscanf(one.c_str(), "%lld-%lldx%lld-%lld", &a, &b, &c, &d) == 4);
        plan.profiles.push_back({a, b, c, d});
    }
    return plan;
}

}  // namespace

Object::Object() { ++mock::world().live; }
Object::~Object() { --mock::world().live; }

void *IPluginRegistry::loadLibrary(const char *path) noexcept {
    if (std::strchr(path, '/') != nullptr && std::ifstream(path).good()) return this;  // as dlopen does
    logger_.log(ILogger::Severity::kERROR, "cannot open the library");
    return nullptr;
}

IRuntime *createInferRuntime(ILogger &logger) noexcept {
    REQUIRE(mock::world().devices > 0);  // the real one may crash
    return new IRuntime(logger);
}

ICudaEngine *IRuntime::deserializeCudaEngine(const void *blob, size_t size) noexcept {
    const std::string text(static_cast<const char *>(blob), size);
    logger_.log(ILogger::Severity::kINFO, "not an error");
    if (text.find('=') == std::string::npos) {
        logger_.log(ILogger::Severity::kERROR, "magic tag does not match");
        return nullptr;
    }
    return new ICudaEngine(parse(text), logger_);
}

int32_t ICudaEngine::getNbIOTensors() const noexcept {
    const int32_t count = static_cast<int32_t>(kTensors.size());
    return count + (plan_.wrong == "more" ? 0 : plan_.wrong == "less" ? -2 : -1);
}

const char *ICudaEngine::getIOTensorName(int32_t index) const noexcept {
    REQUIRE(index >= 0 && index < getNbIOTensors());
    return kTensors[static_cast<size_t>(index)].name;
}

TensorIOMode ICudaEngine::getTensorIOMode(const char *name) const noexcept {
    const Known *known = find(name);
    return known == nullptr ? TensorIOMode::kNONE : known->mode;
}

DataType ICudaEngine::getTensorDataType(const char *name) const noexcept {
    if (plan_.wrong == "type") return DataType::kFP8;
    return plan_.wrong == "state" && std::string(name) == "present_0_C" ? DataType::kHALF : find(name)->type;
}

// Of an output, what does not follow from the inputs' shapes at once may be unknown.
Dims ICudaEngine::getTensorShape(const char *name) const noexcept {
    const Known *known = find(name);
    Dims dims = dims_of(*known, -1, -1);
    if (plan_.wrong == "axes") dims.d[dims.nbDims++] = -1;
    if (plan_.wrong == "unknown" && known->mode == TensorIOMode::kOUTPUT) {
        for (int32_t axis = 0; axis < dims.nbDims; ++axis) dims.d[axis] = -1;
    }
    return dims;
}

TensorLocation ICudaEngine::getTensorLocation(const char *) const noexcept {
    return plan_.wrong == "location" ? TensorLocation::kHOST : TensorLocation::kDEVICE;
}

TensorFormat ICudaEngine::getTensorFormat(const char *) const noexcept {
    return plan_.wrong == "format" ? TensorFormat::kCHW2 : TensorFormat::kLINEAR;
}

int32_t ICudaEngine::getNbOptimizationProfiles() const noexcept {
    return static_cast<int32_t>(plan_.profiles.size());
}

Dims ICudaEngine::getProfileShape(const char *name, int32_t index, OptProfileSelector select) const noexcept {
    const Known *known = find(name);
    REQUIRE(known != nullptr && known->mode == TensorIOMode::kINPUT);
    const Profile &profile = plan_.profiles.at(static_cast<size_t>(index));
    return select == OptProfileSelector::kMIN ? dims_of(*known, profile.min_batch, profile.min_length)
                                              : dims_of(*known, profile.max_batch, profile.max_length);
}

IExecutionContext *ICudaEngine::createExecutionContext(ExecutionContextAllocationStrategy) noexcept {
    ++mock::world().calls["context"];
    return plan_.wrong == "context" ? nullptr : new IExecutionContext(plan_, logger_);
}

bool IExecutionContext::setOptimizationProfileAsync(int32_t profile, cudaStream_t stream) noexcept {
    REQUIRE(stream != nullptr && profile >= 0 && profile < static_cast<int32_t>(plan_.profiles.size()));
    profile_ = profile;
    mock::world().profiles.push_back(profile);
    warm_ = false;
    return true;
}

bool IExecutionContext::setInputShape(const char *name, const Dims &dims) noexcept {
    const Known *known = find(name);
    REQUIRE(profile_ >= 0 && known != nullptr && known->mode == TensorIOMode::kINPUT);
    const Profile &profile = plan_.profiles[static_cast<size_t>(profile_)];
    const Dims min = dims_of(*known, profile.min_batch, profile.min_length);
    const Dims max = dims_of(*known, profile.max_batch, profile.max_length);
    bool fits = dims.nbDims == min.nbDims;
    for (int32_t axis = 0; fits && axis < dims.nbDims; ++axis) {
        fits = min.d[axis] <= dims.d[axis] && dims.d[axis] <= max.d[axis];
    }
    if (!fits) {
        logger_.log(ILogger::Severity::kERROR, "outside of the profile");
        return false;
    }
    shapes_[name] = dims;
    warm_ = false;
    return true;
}

Dims IExecutionContext::getTensorShape(const char *name) const noexcept {
    const Known *known = find(name);
    REQUIRE(shapes_.count("tokens") == 1 && known != nullptr);
    const Dims &tokens = shapes_.at("tokens");
    Dims dims = dims_of(*known, tokens.d[0], tokens.d[1]);
    if (plan_.wrong == "shape") dims.d[dims.nbDims - 1] += tokens.d[1];
    if (plan_.wrong == "batch") ++dims.d[0];
    return dims;
}

bool IExecutionContext::setTensorAddress(const char *name, void *address) noexcept {
    REQUIRE(find(name) != nullptr && mock::is_memory(address, 1));
    addresses_[name] = address;
    return true;
}

bool IExecutionContext::enqueueV3(cudaStream_t stream) noexcept {
    ++mock::world().calls["enqueue"];
    REQUIRE(shapes_.size() == 3 && addresses_.size() == kRight);
    const int64_t batch = shapes_["tokens"].d[0], length = shapes_["tokens"].d[1];
    for (const Known &known : kTensors) {
        if (addresses_.count(known.name) == 0) continue;
        REQUIRE(mock::is_memory(addresses_[known.name], bytes_of(known, batch, length)));
    }
    if (mock::is_capturing(stream)) {
        REQUIRE(warm_);
        if (plan_.wrong == "capture") {
            mock::spoil_capture(stream);
            logger_.log(ILogger::Severity::kERROR, "not permitted while capturing");
            return false;
        }
    }
    if (plan_.wrong == "run") {
        logger_.log(ILogger::Severity::kERROR, "the plugin failed");
        return false;
    }
    warm_ = true;
    mock::enqueue(stream, [batch, length, tensors = model::Tensors(addresses_)] {
        model::run(tensors, batch, length);
    });
    return true;
}

}  // namespace nvinfer1

int32_t getInferLibVersion() noexcept {
    return mock::world().version != 0 ? mock::world().version : NV_TENSORRT_MAJOR * 10000 + 300;
}
