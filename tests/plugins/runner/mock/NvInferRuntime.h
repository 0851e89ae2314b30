// The part of TensorRT's runtime interface that the runner calls, for tests on a CPU: same names and types, no
// more. tensorrt.cc implements it and aborts where the runner breaks a rule of the interface.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "cuda_runtime_api.h"
#include "model.h"

#define NV_TENSORRT_MAJOR 10

extern "C" int32_t getInferLibVersion() noexcept;

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
    kINT64 = 8
};
enum class TensorIOMode : int32_t { kNONE = 0, kINPUT = 1, kOUTPUT = 2 };
enum class TensorLocation : int32_t { kDEVICE = 0, kHOST = 1 };
enum class TensorFormat : int32_t { kLINEAR = 0, kCHW2 = 1 };
enum class OptProfileSelector : int32_t { kMIN = 0, kOPT = 1, kMAX = 2 };
enum class ExecutionContextAllocationStrategy : int32_t { kSTATIC = 0, kON_PROFILE_CHANGE = 1 };

struct Dims {
    static constexpr int32_t MAX_DIMS = 8;
    int32_t nbDims;
    int64_t d[MAX_DIMS];
};

class ILogger {
public:
    enum class Severity : int32_t { kINTERNAL_ERROR = 0, kERROR = 1, kWARNING = 2, kINFO = 3, kVERBOSE = 4 };
    virtual void log(Severity severity, const char *message) noexcept = 0;
    virtual ~ILogger() = default;
};

class IPluginRegistry {
public:
    using PluginLibraryHandle = void *;
    explicit IPluginRegistry(ILogger &logger) : logger_(logger) {}
    PluginLibraryHandle loadLibrary(const char *path) noexcept;

private:
    ILogger &logger_;
};

struct Profile {
    int64_t min_length, max_length, min_batch, max_batch;
};
struct Plan {  // what an engine file of the tests says
    std::vector<Profile> profiles;
    std::string wrong;  // what is wrong with the engine
};

// Counts itself, so that a test sees that all objects are gone.
class Object {
public:
    Object();
    virtual ~Object();
};

class IExecutionContext : public Object {
public:
    IExecutionContext(const Plan &plan, ILogger &logger) : plan_(plan), logger_(logger) {}
    bool setOptimizationProfileAsync(int32_t profile, cudaStream_t stream) noexcept;
    bool setInputShape(const char *name, const Dims &dims) noexcept;
    Dims getTensorShape(const char *name) const noexcept;
    bool setTensorAddress(const char *name, void *address) noexcept;
    bool enqueueV3(cudaStream_t stream) noexcept;

private:
    const Plan &plan_;
    ILogger &logger_;
    int32_t profile_ = -1;
    std::map<std::string, Dims> shapes_;
    std::map<std::string, void *> addresses_;
    bool warm_ = false;  // ran since the shapes changed
};

class ICudaEngine : public Object {
public:
    ICudaEngine(const Plan &plan, ILogger &logger) : plan_(plan), logger_(logger) {}
    int32_t getNbIOTensors() const noexcept;
    const char *getIOTensorName(int32_t index) const noexcept;
    Dims getTensorShape(const char *name) const noexcept;
    TensorIOMode getTensorIOMode(const char *name) const noexcept;
    DataType getTensorDataType(const char *name) const noexcept;
    TensorLocation getTensorLocation(const char *name) const noexcept;
    TensorFormat getTensorFormat(const char *name) const noexcept;
    int32_t getNbOptimizationProfiles() const noexcept;
    Dims getProfileShape(const char *name, int32_t profile, OptProfileSelector select) const noexcept;
    IExecutionContext *createExecutionContext(ExecutionContextAllocationStrategy strategy) noexcept;

private:
    const Plan plan_;
    ILogger &logger_;
};

class IRuntime : public Object {
public:
    explicit IRuntime(ILogger &logger) : logger_(logger), registry_(logger) {}
    ICudaEngine *deserializeCudaEngine(const void *blob, size_t size) noexcept;
    IPluginRegistry &getPluginRegistry() noexcept { return registry_; }

private:
    ILogger &logger_;
    IPluginRegistry registry_;
};

IRuntime *createInferRuntime(ILogger &logger) noexcept;

}  // namespace nvinfer1
