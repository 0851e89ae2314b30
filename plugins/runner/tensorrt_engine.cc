// The engine of TensorRT 10.3 … 11.x. Compiled against the headers of the version it runs with, as tables of
// virtual functions differ between major versions; see README.md.
#include <NvInferRuntime.h>
#include <cuda_runtime_api.h>

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <mutex>
#include <utility>

#include "engine.h"
#include "error.h"

namespace xlstm::runner {
namespace {

using nvinfer1::DataType;
using nvinfer1::Dims;
using nvinfer1::OptProfileSelector;

void check(cudaError_t status, const char *what) {
    if (status == cudaSuccess) return;
    throw Error(XLSTM_ENVIRONMENT, std::string(what) + ": " + cudaGetErrorString(status));
}

// Keeps the last errors, which say more than the null pointers that TensorRT returns.
class Logger : public nvinfer1::ILogger {
public:
    void log(Severity severity, const char *message) noexcept override {
        if (severity > Severity::kERROR) return;
        try {
            const std::lock_guard<std::mutex> lock(mutex_);
            if (text_.size() < 1000) text_ += std::string(": ") + message;
        } catch (...) {  // out of memory: the message is lost
        }
    }

    std::string take() {
        const std::lock_guard<std::mutex> lock(mutex_);
        return std::exchange(text_, "");
    }

private:
    std::mutex mutex_;
    std::string text_;
};

// A file in memory without a copy: an engine can be as large as what is free on a board.
class MappedFile {
public:
    explicit MappedFile(const std::string &path) {
        const int file = open(path.c_str(), O_RDONLY | O_CLOEXEC);
        struct stat status {};
        const bool usable = file >= 0 && fstat(file, &status) == 0 && S_ISREG(status.st_mode);
        if (usable && status.st_size > 0) {
            size_ = static_cast<size_t>(status.st_size);
            data_ = mmap(nullptr, size_, PROT_READ, MAP_PRIVATE, file, 0);
        }
        const int reason = errno;
        if (file >= 0) close(file);
        if (file < 0) throw Error(XLSTM_BAD_INPUT, path + ": " + std::strerror(reason));
        if (!usable || size_ == 0) throw Error(XLSTM_BAD_INPUT, path + " is not a file, or empty");
        if (data_ == MAP_FAILED) throw Error(XLSTM_ENVIRONMENT, path + ": " + std::strerror(reason));
    }
    ~MappedFile() { munmap(data_, size_); }
    MappedFile(const MappedFile &) = delete;
    MappedFile &operator=(const MappedFile &) = delete;

    const void *data() const { return data_; }
    size_t size() const { return size_; }

private:
    void *data_ = MAP_FAILED;
    size_t size_ = 0;
};

DataType type_in_engine(xlstm_type type) {
    switch (type) {
        case XLSTM_FLOAT32: return DataType::kFLOAT;
        case XLSTM_FLOAT16: return DataType::kHALF;
        case XLSTM_BFLOAT16: return DataType::kBF16;
        case XLSTM_INT8: return DataType::kINT8;
        case XLSTM_INT32: return DataType::kINT32;
        case XLSTM_INT64: return DataType::kINT64;
        case XLSTM_BOOL: return DataType::kBOOL;
        case XLSTM_UINT8: return DataType::kUINT8;
    }
    throw Error(XLSTM_BAD_INPUT, "an element type that TensorRT does not have");
}

Dims dims_of(const Tensor &tensor, int64_t batch, int64_t length) {
    Dims dims{};
    dims.nbDims = static_cast<int32_t>(tensor.dims.size());
    for (size_t axis = 0; axis < tensor.dims.size(); ++axis) {
        const int64_t dim = tensor.dims[axis];
        dims.d[axis] = dim == kBatch ? batch : dim == kSequence ? length : dim;
    }
    return dims;
}

std::string text_of_version(int32_t version) {
    return std::to_string(version / 10000) + "." + std::to_string(version / 100 % 100) + "." +
           std::to_string(version % 100);
}

std::string text_of(const Dims &dims) {
    std::string text;
    for (int32_t axis = 0; axis < dims.nbDims; ++axis) {
        text += (axis == 0 ? "(" : ", ") + std::to_string(dims.d[axis]);
    }
    return text + ")";
}

bool same(const Dims &a, const Dims &b) {
    return a.nbDims == b.nbDims && std::equal(a.d, a.d + std::max(a.nbDims, 0), b.d);
}

// Lengths that a profile takes at the batch; none if min > max.
struct Range {
    int32_t profile;
    int64_t min, max;
};

// A context for one profile.
struct Lane {
    std::unique_ptr<nvinfer1::IExecutionContext> context;
    int64_t length = 0;  // of the shapes set
    int parity = -1;     // of the addresses set
};

class TensorRtEngine : public Engine {
public:
    TensorRtEngine(const EngineOptions &options, const IoSpec &io)
        : batch_(options.batch), device_(options.device), graph_wanted_(options.graph), inputs_(io.inputs),
          outputs_(io.outputs) {
        for (const State &state : io.states) {
            inputs_.push_back(state.past);
            outputs_.push_back(state.past);
            outputs_.back().name = state.present;
        }
        try {
            open(options);
        } catch (...) {
            release();
            throw;
        }
    }
    ~TensorRtEngine() override { release(); }

    int64_t longest() const override { return longest_; }

    void *allocate(size_t bytes) override {
        use_device();
        void *memory = nullptr;
        check(cudaMalloc(&memory, bytes), "no memory on the GPU");
        memory_.push_back(memory);
        check(cudaMemsetAsync(memory, 0, bytes, stream_), "clearing memory");
        return memory;
    }

    void copy_in(void *device, const void *host, const Rows &rows) override {
        copy(device, rows.bytes, host, rows.pitch, rows, cudaMemcpyHostToDevice);
    }

    void copy_out(void *host, const void *device, const Rows &rows) override {
        copy(host, rows.pitch, device, rows.bytes, rows, cudaMemcpyDeviceToHost);
    }

    void clear(void *device, size_t bytes) override {
        use_device();
        check(cudaMemsetAsync(device, 0, bytes, stream_), "clearing memory");
    }

    void bind(int parity, const std::vector<Binding> &bindings) override { bindings_[parity] = bindings; }

    void run(int parity, int64_t length) override {
        use_device();
        if (length == 1 && graphs_[parity] != nullptr) {
            check(cudaGraphLaunch(graphs_[parity], stream_), "launching a step");
            return;
        }
        Lane &lane = length == 1 ? step_ : long_;
        const bool warm = lane.length == length;  // TensorRT wants a run after shapes were set, then a capture
        if (!warm) set_shapes(lane, length);
        set_addresses(lane, parity);
        if (length == 1 && warm && graph_wanted_ && capture(parity)) {
            check(cudaGraphLaunch(graphs_[parity], stream_), "launching a step");
        } else if (!lane.context->enqueueV3(stream_)) {
            throw Error(XLSTM_ENVIRONMENT, "TensorRT did not run the engine" + logger_.take());
        }
    }

    void wait() override {
        use_device();
        check(cudaStreamSynchronize(stream_), "running the engine");
    }

private:
    void open(const EngineOptions &options) {
        int devices = 0;
        check(cudaGetDeviceCount(&devices), "no GPU");  // before TensorRT, which may crash without one
        if (device_ >= devices) {
            throw Error(XLSTM_ENVIRONMENT, "no GPU " + std::to_string(device_) + ", there are " +
                                               std::to_string(devices));
        }
        use_device();
        check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "no CUDA stream");
        load(options);
        for (const Tensor &tensor : inputs_) check_tensor(tensor, nvinfer1::TensorIOMode::kINPUT);
        for (const Tensor &tensor : outputs_) check_tensor(tensor, nvinfer1::TensorIOMode::kOUTPUT);
        const int32_t known = static_cast<int32_t>(inputs_.size() + outputs_.size());
        if (engine_->getNbIOTensors() != known) {
            throw Error(XLSTM_BAD_INPUT, "the engine has " + std::to_string(engine_->getNbIOTensors()) +
                                             " inputs and outputs, io.json " + std::to_string(known));
        }
        make_lanes(options.piece);
    }

    void load(const EngineOptions &options) {
        const int32_t running = getInferLibVersion();
        if (running / 10000 != NV_TENSORRT_MAJOR) {
            throw Error(XLSTM_ENVIRONMENT, "compiled for TensorRT " + std::to_string(NV_TENSORRT_MAJOR) +
                                               ", loaded is " + text_of_version(running));
        }
        runtime_.reset(nvinfer1::createInferRuntime(logger_));
        if (runtime_ == nullptr) throw Error(XLSTM_ENVIRONMENT, "TensorRT does not start" + logger_.take());
        if (!options.plugin.empty()) load_plugins(options.plugin);
        const MappedFile file(options.path);
        engine_.reset(runtime_->deserializeCudaEngine(file.data(), file.size()));
        if (engine_ == nullptr) {
            throw Error(XLSTM_BAD_INPUT, options.path + " does not load in TensorRT " +
                                             text_of_version(running) + logger_.take());
        }
    }

    void load_plugins(const std::string &path) {
        // A name without a folder would be looked for where the system's libraries are.
        const std::string file = path.find('/') == std::string::npos ? "./" + path : path;
        if (runtime_->getPluginRegistry().loadLibrary(file.c_str()) == nullptr) {
            throw Error(XLSTM_ENVIRONMENT, "TensorRT does not load " + path + logger_.take());
        }
    }

    void check_tensor(const Tensor &tensor, nvinfer1::TensorIOMode mode) const {
        const char *name = tensor.name.c_str();
        if (engine_->getTensorIOMode(name) != mode) {
            throw Error(XLSTM_BAD_INPUT, "the engine lacks " + describe(tensor) + " of io.json");
        }
        if (engine_->getTensorDataType(name) != type_in_engine(tensor.type)) {
            throw Error(XLSTM_BAD_INPUT, "the engine has another element type for " + describe(tensor));
        }
        if (engine_->getTensorLocation(name) != nvinfer1::TensorLocation::kDEVICE ||
            engine_->getTensorFormat(name) != nvinfer1::TensorFormat::kLINEAR) {
            throw Error(XLSTM_BAD_INPUT, "the engine's " + tensor.name + " is not plain memory of the GPU");
        }
    }

    Range range_of(int32_t profile) const {
        Range range{profile, 1, 1};
        for (const Tensor &tensor : inputs_) {
            const char *name = tensor.name.c_str();
            const Dims min = engine_->getProfileShape(name, profile, OptProfileSelector::kMIN);
            const Dims max = engine_->getProfileShape(name, profile, OptProfileSelector::kMAX);
            const int32_t rank = static_cast<int32_t>(tensor.dims.size());
            const bool same_rank = min.nbDims == rank && max.nbDims == rank;
            if (!same_rank || batch_ < min.d[0] || batch_ > max.d[0]) return {profile, 1, 0};
            if (tensor.is_sequence()) range = {profile, min.d[1], max.d[1]};
        }
        return range;
    }

    // The step gets the profile of the shortest lengths, which is tuned for it; the rest that of the longest.
    void make_lanes(int64_t piece) {
        Range step{-1, 1, 0}, most{-1, 1, 0};
        for (int32_t profile = 0; profile < engine_->getNbOptimizationProfiles(); ++profile) {
            const Range range = range_of(profile);
            const auto takes = [&](int64_t length) { return range.min <= length && length <= range.max; };
            if (takes(1) && (step.profile < 0 || range.max < step.max)) step = range;
            if (takes(2) && (most.profile < 0 || range.max > most.max)) most = range;
        }
        if (step.profile < 0) {
            throw Error(XLSTM_BAD_INPUT, "the engine has no optimization profile for one position at batch " +
                                             std::to_string(batch_));
        }
        longest_ = std::max<int64_t>(most.max, 1);
        if (piece > 0) longest_ = std::min(longest_, piece);
        make_lane(step_, step.profile, 1);
        if (longest_ > 1) make_lane(long_, most.profile, longest_);
    }

    void make_lane(Lane &lane, int32_t profile, int64_t length) {
        // Memory for this profile only.
        lane.context.reset(engine_->createExecutionContext(
            nvinfer1::ExecutionContextAllocationStrategy::kON_PROFILE_CHANGE));
        if (lane.context == nullptr || !lane.context->setOptimizationProfileAsync(profile, stream_)) {
            throw Error(XLSTM_ENVIRONMENT, "TensorRT makes no execution context" + logger_.take());
        }
        wait();
        set_shapes(lane, length);
        for (const Tensor &tensor : outputs_) {
            const Dims wanted = dims_of(tensor, batch_, length);
            const Dims found = lane.context->getTensorShape(tensor.name.c_str());
            if (!same(wanted, found)) {
                throw Error(XLSTM_BAD_INPUT, "the engine's " + tensor.name + " has shape " + text_of(found) +
                                                 ", io.json says " + text_of(wanted));
            }
        }
        lane.length = 0;  // set again at the first run, which may be shorter
    }

    void set_shapes(Lane &lane, int64_t length) {
        lane.length = 0;
        for (const Tensor &tensor : inputs_) {
            const Dims dims = dims_of(tensor, batch_, length);
            if (!lane.context->setInputShape(tensor.name.c_str(), dims)) {
                throw Error(XLSTM_BAD_INPUT, "the engine does not take " + tensor.name + " of shape " +
                                                 text_of(dims) + logger_.take());
            }
        }
        lane.length = length;
    }

    void set_addresses(Lane &lane, int parity) {
        if (lane.parity == parity) return;
        lane.parity = -1;
        for (const Binding &binding : bindings_[parity]) {
            if (!lane.context->setTensorAddress(binding.name.c_str(), binding.address)) {
                throw Error(XLSTM_ENVIRONMENT,
                            "TensorRT takes no memory for " + binding.name + logger_.take());
            }
        }
        lane.parity = parity;
    }

    // Whether there is a graph now. An engine that cannot be captured runs without one from here on.
    bool capture(int parity) {
        if (cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal) != cudaSuccess) {
            return no_graph();
        }
        const bool recorded = step_.context->enqueueV3(stream_);
        cudaGraph_t graph = nullptr;
        const cudaError_t ended = cudaStreamEndCapture(stream_, &graph);
        const bool made = recorded && ended == cudaSuccess &&
                          cudaGraphInstantiate(&graphs_[parity], graph, 0) == cudaSuccess;
        if (graph != nullptr) cudaGraphDestroy(graph);
        if (made) return true;
        graphs_[parity] = nullptr;
        return no_graph();
    }

    bool no_graph() {
        graph_wanted_ = false;
        cudaGetLastError();  // not to be found by the next check
        logger_.take();
        return false;
    }

    void copy(void *to, size_t to_pitch, const void *from, size_t from_pitch, const Rows &rows,
              cudaMemcpyKind kind) {
        use_device();
        const bool dense = rows.pitch == rows.bytes;
        const size_t bytes = dense ? rows.bytes * rows.count : rows.bytes;
        for (size_t row = 0; row < (dense ? 1 : rows.count); ++row) {
            void *target = static_cast<char *>(to) + row * to_pitch;
            const void *source = static_cast<const char *>(from) + row * from_pitch;
            check(cudaMemcpyAsync(target, source, bytes, kind, stream_), "copying");
        }
    }

    void use_device() const { check(cudaSetDevice(device_), "selecting the GPU"); }

    void release() noexcept {
        cudaSetDevice(device_);
        if (stream_ != nullptr) cudaStreamSynchronize(stream_);
        for (cudaGraphExec_t graph : graphs_) {
            if (graph != nullptr) cudaGraphExecDestroy(graph);
        }
        step_.context.reset();
        long_.context.reset();
        engine_.reset();
        runtime_.reset();
        for (void *memory : memory_) cudaFree(memory);
        if (stream_ != nullptr) cudaStreamDestroy(stream_);
    }

    const int64_t batch_;
    const int device_;
    bool graph_wanted_;
    std::vector<Tensor> inputs_, outputs_;  // states included
    Logger logger_;
    cudaStream_t stream_ = nullptr;
    std::unique_ptr<nvinfer1::IRuntime> runtime_;
    std::unique_ptr<nvinfer1::ICudaEngine> engine_;
    Lane step_, long_;
    int64_t longest_ = 1;
    std::vector<void *> memory_;
    std::vector<Binding> bindings_[2];
    cudaGraphExec_t graphs_[2] = {nullptr, nullptr};
};

}  // namespace

std::unique_ptr<Engine> open_engine(const EngineOptions &options, const IoSpec &io) {
    return std::make_unique<TensorRtEngine>(options, io);
}

}  // namespace xlstm::runner
