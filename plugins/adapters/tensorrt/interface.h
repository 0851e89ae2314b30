// TensorRT's plugin interface (IPluginV3): the installed headers where there are any, else a declaration of
// what a plugin needs. A plugin is only ever called by TensorRT, so what counts is the binary interface: the
// order of the virtual functions (destructors included), the layout of the structures, the enumerators'
// values. All that is declared here is the same from TensorRT 10.3 to 11.4, so one binary serves them all.
// What differs is in runtime.h.
#pragma once

#if !defined(XLSTM_OWN_TENSORRT_INTERFACE) && defined(__has_include)
#if __has_include(<NvInferRuntime.h>) && __has_include(<NvInferVersion.h>) && \
    __has_include(<cuda_runtime_api.h>)
#include <NvInferVersion.h>
#if NV_TENSORRT_MAJOR * 100 + NV_TENSORRT_MINOR >= 1003  // older ones lack IPluginV3OneBuildV2
#define XLSTM_INSTALLED_TENSORRT_INTERFACE
#endif
#endif
#endif

#ifdef XLSTM_INSTALLED_TENSORRT_INTERFACE

#include <NvInferRuntime.h>

#else

#include <cstddef>
#include <cstdint>

using cudaStream_t = struct CUstream_st *;

namespace nvinfer1 {

enum class DataType : int32_t {
    kFLOAT = 0,
    kHALF = 1,
    kINT8 = 2,
    kINT32 = 3,
    kBOOL = 4,
    kUINT8 = 5,
    kFP8 = 6,
    kBF16 = 7,
    kINT64 = 8,
};
enum class TensorFormat : int32_t { kLINEAR = 0, kCHW2 = 1, kHWC8 = 2, kCHW4 = 3, kCHW16 = 4, kCHW32 = 5 };
enum class PluginFieldType : int32_t {
    kFLOAT16 = 0,
    kFLOAT32 = 1,
    kFLOAT64 = 2,
    kINT8 = 3,
    kINT16 = 4,
    kINT32 = 5,
    kCHAR = 6,
    kDIMS = 7,
    kUNKNOWN = 8,
};
enum class PluginCapabilityType : int32_t { kCORE = 0, kBUILD = 1, kRUNTIME = 2 };
enum class TensorRTPhase : int32_t { kBUILD = 0, kRUNTIME = 1 };
enum class APILanguage : int32_t { kCPP = 0, kPYTHON = 1 };
enum class DimensionOperation : int32_t;

struct Dims {
    static constexpr int32_t MAX_DIMS = 8;
    int32_t nbDims;
    int64_t d[MAX_DIMS];
};
struct PluginTensorDesc {
    Dims dims;
    DataType type;
    TensorFormat format;
    float scale;
};
struct DynamicPluginTensorDesc {
    PluginTensorDesc desc;
    Dims min, max, opt;
};
struct PluginField {
    PluginField(const char *name = nullptr, const void *data = nullptr,
                PluginFieldType type = PluginFieldType::kUNKNOWN, int32_t length = 0) noexcept
        : name(name), data(data), type(type), length(length) {}
    const char *name;
    const void *data;
    PluginFieldType type;
    int32_t length;
};
struct PluginFieldCollection {
    int32_t nbFields;
    const PluginField *fields;
};
struct InterfaceInfo {  // returned by value, in registers
    const char *kind;
    int32_t major, minor;
};

// Expressions of sizes: handles around an implementation of TensorRT's.
class IDimensionExpr;
namespace apiv {
class VRoot {
public:
    virtual ~VRoot() noexcept = default;
};
class VDimensionExpr : public VRoot {
public:
    virtual bool isConstant() const = 0;
    virtual int64_t getConstantValue() const = 0;
    virtual bool isSizeTensor() const = 0;
};
class VExprBuilder : public VRoot {
public:
    virtual const IDimensionExpr *constant(int64_t value) = 0;
    virtual const IDimensionExpr *operation(DimensionOperation op, const IDimensionExpr &first,
                                            const IDimensionExpr &second) = 0;
    virtual const IDimensionExpr *declareSizeTensor(int32_t output, const IDimensionExpr &opt,
                                                    const IDimensionExpr &upper) = 0;
};
}  // namespace apiv
class IDimensionExpr {
public:
    bool isConstant() const noexcept { return mImpl->isConstant(); }
    int64_t getConstantValue() const noexcept { return mImpl->getConstantValue(); }

protected:
    virtual ~IDimensionExpr() noexcept = default;
    apiv::VDimensionExpr *mImpl;
};
class IExprBuilder {
public:
    const IDimensionExpr *constant(int64_t value) noexcept { return mImpl->constant(value); }

protected:
    virtual ~IExprBuilder() noexcept = default;
    apiv::VExprBuilder *mImpl;
};
struct DimsExprs {
    int32_t nbDims;
    const IDimensionExpr *d[Dims::MAX_DIMS];
};

class IVersionedInterface {
public:
    virtual APILanguage getAPILanguage() const noexcept { return APILanguage::kCPP; }
    virtual InterfaceInfo getInterfaceInfo() const noexcept = 0;
    virtual ~IVersionedInterface() noexcept = default;
};

class IPluginCapability : public IVersionedInterface {};
class IPluginResourceContext;

class IPluginV3 : public IVersionedInterface {
public:
    InterfaceInfo getInterfaceInfo() const noexcept override { return {"PLUGIN", 1, 0}; }
    virtual IPluginCapability *getCapabilityInterface(PluginCapabilityType type) noexcept = 0;
    virtual IPluginV3 *clone() noexcept = 0;
};

class IPluginV3OneCore : public IPluginCapability {
public:
    InterfaceInfo getInterfaceInfo() const noexcept override { return {"PLUGIN_V3ONE_CORE", 1, 0}; }
    virtual const char *getPluginName() const noexcept = 0;
    virtual const char *getPluginVersion() const noexcept = 0;
    virtual const char *getPluginNamespace() const noexcept = 0;
};

class IPluginV3OneBuildV2 : public IPluginCapability {
public:
    InterfaceInfo getInterfaceInfo() const noexcept override { return {"PLUGIN_V3ONE_BUILD", 2, 0}; }
    virtual int32_t configurePlugin(const DynamicPluginTensorDesc *inputs, int32_t nbInputs,
                                    const DynamicPluginTensorDesc *outputs, int32_t nbOutputs) noexcept = 0;
    virtual int32_t getOutputDataTypes(DataType *outputs, int32_t nbOutputs, const DataType *inputs,
                                       int32_t nbInputs) const noexcept = 0;
    virtual int32_t getOutputShapes(const DimsExprs *inputs, int32_t nbInputs, const DimsExprs *shapeInputs,
                                    int32_t nbShapeInputs, DimsExprs *outputs, int32_t nbOutputs,
                                    IExprBuilder &builder) noexcept = 0;
    virtual bool supportsFormatCombination(int32_t position, const DynamicPluginTensorDesc *tensors,
                                           int32_t nbInputs, int32_t nbOutputs) noexcept = 0;
    virtual int32_t getNbOutputs() const noexcept = 0;
    virtual size_t getWorkspaceSize(const DynamicPluginTensorDesc *inputs, int32_t nbInputs,
                                    const DynamicPluginTensorDesc *outputs,
                                    int32_t nbOutputs) const noexcept = 0;
    virtual int32_t getValidTactics(int32_t *, int32_t) noexcept { return 0; }
    virtual int32_t getNbTactics() noexcept { return 0; }
    virtual const char *getTimingCacheID() noexcept { return nullptr; }
    virtual int32_t getFormatCombinationLimit() noexcept { return 100; }
    virtual const char *getMetadataString() noexcept { return nullptr; }
    virtual int32_t getAliasedInput(int32_t output) noexcept = 0;
};

class IPluginV3OneRuntime : public IPluginCapability {
public:
    InterfaceInfo getInterfaceInfo() const noexcept override { return {"PLUGIN_V3ONE_RUNTIME", 1, 0}; }
    virtual int32_t setTactic(int32_t) noexcept { return 0; }
    virtual int32_t onShapeChange(const PluginTensorDesc *inputs, int32_t nbInputs,
                                  const PluginTensorDesc *outputs, int32_t nbOutputs) noexcept = 0;
    virtual int32_t enqueue(const PluginTensorDesc *inputDesc, const PluginTensorDesc *outputDesc,
                            const void *const *inputs, void *const *outputs, void *workspace,
                            cudaStream_t stream) noexcept = 0;
    virtual IPluginV3 *attachToContext(IPluginResourceContext *context) noexcept = 0;
    virtual const PluginFieldCollection *getFieldsToSerialize() noexcept = 0;
};

class IPluginCreatorInterface : public IVersionedInterface {};
class IPluginCreatorV3One : public IPluginCreatorInterface {
public:
    InterfaceInfo getInterfaceInfo() const noexcept override { return {"PLUGIN CREATOR_V3ONE", 1, 0}; }
    virtual IPluginV3 *createPlugin(const char *name, const PluginFieldCollection *fields,
                                    TensorRTPhase phase) noexcept = 0;
    virtual const PluginFieldCollection *getFieldNames() noexcept = 0;
    virtual const char *getPluginName() const noexcept = 0;
    virtual const char *getPluginVersion() const noexcept = 0;
    virtual const char *getPluginNamespace() const noexcept = 0;
};

}  // namespace nvinfer1

#endif
