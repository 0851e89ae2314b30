// A recurrence operator as a TensorRT plugin. One object is all capabilities at once; TensorRT owns it by its
// IPluginV3. Nothing throws: what goes wrong is logged and returned.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "adapters/tensorrt/interface.h"
#include "adapters/tensorrt/op.h"

namespace xlstm::tensorrt {

// A node with an attribute that version 1 did not have asks for version 2: a library of then, which would leave
// the attribute out, has no such plugin. Here both are the same.
constexpr const char *kVersions[] = {"1", "2"};
constexpr const char *kNamespace = "xlstm";

class Plugin final : public nvinfer1::IPluginV3,
                     public nvinfer1::IPluginV3OneCore,
                     public nvinfer1::IPluginV3OneBuildV2,
                     public nvinfer1::IPluginV3OneRuntime {
public:
    // `attributes` in the order of op.attributes. `aliased`: present states are written over the past ones.
    // `processors`: those of the GPU when the engine was built. TensorRT asks for the workspace then, and a
    // Jetson in another power mode has another number, so it is stored in the engine.
    // `version`: one of kVersions, by which an engine finds the plugin again.
    Plugin(const Op &op, const char *version, std::string layer, std::vector<float> attributes, bool aliased,
           int32_t processors);
    Plugin(const Plugin &other);
    Plugin &operator=(const Plugin &) = delete;

    nvinfer1::IPluginCapability *getCapabilityInterface(
        nvinfer1::PluginCapabilityType type) noexcept override;
    nvinfer1::IPluginV3 *clone() noexcept override;

    const char *getPluginName() const noexcept override;
    const char *getPluginVersion() const noexcept override;
    const char *getPluginNamespace() const noexcept override;

    int32_t configurePlugin(const nvinfer1::DynamicPluginTensorDesc *inputs, int32_t nbInputs,
                            const nvinfer1::DynamicPluginTensorDesc *outputs,
                            int32_t nbOutputs) noexcept override;
    int32_t getOutputDataTypes(nvinfer1::DataType *outputs, int32_t nbOutputs,
                               const nvinfer1::DataType *inputs, int32_t nbInputs) const noexcept override;
    int32_t getOutputShapes(const nvinfer1::DimsExprs *inputs, int32_t nbInputs,
                            const nvinfer1::DimsExprs *shapeInputs, int32_t nbShapeInputs,
                            nvinfer1::DimsExprs *outputs, int32_t nbOutputs,
                            nvinfer1::IExprBuilder &builder) noexcept override;
    bool supportsFormatCombination(int32_t position, const nvinfer1::DynamicPluginTensorDesc *tensors,
                                   int32_t nbInputs, int32_t nbOutputs) noexcept override;
    int32_t getNbOutputs() const noexcept override;
    size_t getWorkspaceSize(const nvinfer1::DynamicPluginTensorDesc *inputs, int32_t nbInputs,
                            const nvinfer1::DynamicPluginTensorDesc *outputs,
                            int32_t nbOutputs) const noexcept override;
    const char *getTimingCacheID() noexcept override;
    int32_t getAliasedInput(int32_t output) noexcept override;

    int32_t onShapeChange(const nvinfer1::PluginTensorDesc *inputs, int32_t nbInputs,
                          const nvinfer1::PluginTensorDesc *outputs, int32_t nbOutputs) noexcept override;
    int32_t enqueue(const nvinfer1::PluginTensorDesc *inputDesc, const nvinfer1::PluginTensorDesc *outputDesc,
                    const void *const *inputs, void *const *outputs, void *workspace,
                    cudaStream_t stream) noexcept override;
    nvinfer1::IPluginV3 *attachToContext(nvinfer1::IPluginResourceContext *context) noexcept override;
    const nvinfer1::PluginFieldCollection *getFieldsToSerialize() noexcept override;

private:
    size_t count_inputs(const nvinfer1::PluginTensorDesc *inputs) const;
    void require_counts(int32_t nbInputs, int32_t nbOutputs) const;
    Request request_of(const nvinfer1::PluginTensorDesc *inputs, size_t nbInputs,
                       const nvinfer1::PluginTensorDesc *outputs) const;
    Request largest_request(const nvinfer1::DynamicPluginTensorDesc *inputs, int32_t nbInputs,
                            const nvinfer1::DynamicPluginTensorDesc *outputs) const;
    void take_type(Request &request, const Tensor &tensor, nvinfer1::DataType type, bool quantized) const;
    void require_kernel(const Request &request) const;

    const Op &op_;
    const char *const version_;
    const std::string layer_;              // as the network calls it, for messages
    const std::vector<float> attributes_;  // NaN: not given, worked out by the operator
    const int32_t aliased_, processors_;
    std::vector<nvinfer1::PluginField> fields_;
    nvinfer1::PluginFieldCollection field_collection_;
};

}  // namespace xlstm::tensorrt
