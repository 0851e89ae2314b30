#include "adapters/tensorrt/creator.h"

#include <dlfcn.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "adapters/tensorrt/log.h"
#include "adapters/tensorrt/plugin.h"

namespace xlstm::tensorrt {
namespace {

using nvinfer1::PluginField;
using nvinfer1::PluginFieldType;

struct BadField : std::runtime_error {
    using std::runtime_error::runtime_error;
};

class Creator final : public nvinfer1::IPluginCreatorV3One {
public:
    Creator(const Op &op, const char *version) : op_(op), version_(version) {
        for (const Attribute &attribute : op.attributes) {
            fields_.emplace_back(attribute.name, nullptr, PluginFieldType::kFLOAT32, 1);
        }
        fields_.emplace_back("aliased", nullptr, PluginFieldType::kINT32, 1);
        fields_.emplace_back("processors", nullptr, PluginFieldType::kINT32, 1);
        field_names_ = {static_cast<int32_t>(fields_.size()), fields_.data()};
    }

    nvinfer1::IPluginV3 *createPlugin(const char *name, const nvinfer1::PluginFieldCollection *fields,
                                      nvinfer1::TensorRTPhase) noexcept override;
    const nvinfer1::PluginFieldCollection *getFieldNames() noexcept override { return &field_names_; }
    const char *getPluginName() const noexcept override { return op_.name; }
    const char *getPluginVersion() const noexcept override { return version_; }
    const char *getPluginNamespace() const noexcept override { return kNamespace; }

private:
    nvinfer1::IPluginV3 *create(const std::string &layer,
                                const nvinfer1::PluginFieldCollection *fields) const;

    const Op &op_;
    const char *const version_;
    std::vector<PluginField> fields_;
    nvinfer1::PluginFieldCollection field_names_;
};

// The value of a field that must be a single FP32 or INT32.
template <typename Value>
Value value_of(const PluginField &field, PluginFieldType type) {
    const std::string name = field.name;
    if (field.type != type) {
        const char *expected = type == PluginFieldType::kFLOAT32 ? "FP32 (1)" : "INT32 (5)";
        throw BadField(name + " is a field of type " + std::to_string(static_cast<int32_t>(field.type)) +
                       ", expected " + expected);
    }
    if (field.length != 1) {
        throw BadField(name + " has " + std::to_string(field.length) + " values, expected 1");
    }
    if (field.data == nullptr) throw BadField(name + " has no value");
    return *static_cast<const Value *>(field.data);
}

nvinfer1::IPluginV3 *Creator::create(const std::string &layer,
                                     const nvinfer1::PluginFieldCollection *fields) const {
    if (fields == nullptr || fields->nbFields < 0 || (fields->nbFields > 0 && fields->fields == nullptr)) {
        throw BadField("no fields");
    }
    std::vector<float> values;
    std::vector<bool> given(op_.attributes.size());
    for (const Attribute &attribute : op_.attributes) values.push_back(attribute.fallback);
    int32_t aliased = 0, processors = 0;
    for (int32_t i = 0; i < fields->nbFields; ++i) {
        const PluginField &field = fields->fields[i];
        const std::string name = field.name == nullptr ? "" : field.name;
        if (name == "aliased") {
            aliased = value_of<int32_t>(field, PluginFieldType::kINT32);
            if (aliased != 0 && aliased != 1) {
                throw BadField("aliased is " + std::to_string(aliased) + ", expected 0 or 1");
            }
            continue;
        }
        if (name == "processors") {
            processors = value_of<int32_t>(field, PluginFieldType::kINT32);
            if (processors < 1) {
                throw BadField("processors is " + std::to_string(processors) + ", expected 1 or more");
            }
            continue;
        }
        size_t index = 0;
        while (index < op_.attributes.size() && name != op_.attributes[index].name) ++index;
        if (index == op_.attributes.size()) {
            std::string known;
            for (const Attribute &attribute : op_.attributes) known += std::string(attribute.name) + ", ";
            throw BadField("there is no field \"" + name + "\"; there are " + known + "aliased, processors");
        }
        const float value = value_of<float>(field, PluginFieldType::kFLOAT32);
        if (!op_.attributes[index].allowed(value)) {
            throw BadField(name + " is " + std::to_string(value) + ", expected " +
                           op_.attributes[index].requirement);
        }
        values[index] = value;
        given[index] = true;
    }
    for (size_t i = 0; i < given.size(); ++i) {
        if (op_.attributes[i].required && !given[i]) {
            throw BadField("the field " + std::string(op_.attributes[i].name) + " is missing");
        }
    }
    if (processors == 0) processors = xlstm_processors();
    return new Plugin(op_, version_, layer, std::move(values), aliased != 0, processors);
}

nvinfer1::IPluginV3 *Creator::createPlugin(const char *name, const nvinfer1::PluginFieldCollection *fields,
                                           nvinfer1::TensorRTPhase) noexcept {
    try {
        const std::string layer = name == nullptr ? "" : name;
        try {
            return create(layer, fields);
        } catch (const BadField &error) {
            log_error(std::string(op_.name) + " \"" + layer + "\": " + error.what());
        }
    } catch (const std::exception &error) {
        log_error(error.what());
    }
    return nullptr;
}

// The registry keeps pointers into this library, which therefore outlives every dlclose: plugins that register
// themselves are never forgotten, and of those that were loaded deregisterLibrary forgets one version alone.
void stay_loaded() {
    Dl_info self{};
    if (dladdr(reinterpret_cast<void *>(&stay_loaded), &self) != 0) {
        dlopen(self.dli_fname, RTLD_NOW | RTLD_NOLOAD | RTLD_NODELETE);
    }
}

}  // namespace

nvinfer1::IPluginCreatorInterface *const *creators(int32_t &count) noexcept {
    static Creator one[] = {{mlstm_op(), kVersions[0]}, {slstm_op(), kVersions[0]}};
    static Creator two[] = {{mlstm_op(), kVersions[1]}, {slstm_op(), kVersions[1]}};
    static nvinfer1::IPluginCreatorInterface *const all[] = {&two[0], &two[1], &one[0], &one[1]};
    count = 4;
    stay_loaded();
    return all;
}

}  // namespace xlstm::tensorrt

// TensorRT calls this when it loads the library.
extern "C" __attribute__((visibility("default"))) nvinfer1::IPluginCreatorInterface *const *getCreators(
    int32_t &count) {
    return xlstm::tensorrt::creators(count);
}
