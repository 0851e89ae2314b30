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
        struct stat status{};
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

xlstm_type type_of(DataType type, const std::string &name) {
    switch (type) {
        case DataType::kFLOAT: return XLSTM_FLOAT32;
        case DataType::kHALF: return XLSTM_FLOAT16;
        case DataType::kBF16: return XLSTM_BFLOAT16;
        case DataType::kINT8: return XLSTM_INT8;
        case DataType::kINT32: return XLSTM_INT32;
        case DataType::kINT64: return XLSTM_INT64;
        case DataType::kBOOL: return XLSTM_BOOL;
        case DataType::kUINT8: return XLSTM_UINT8;
        default:
            throw Error(XLSTM_BAD_INPUT,
                        "the engine's " + name + " is of a type that no input or output has");
    }
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
    explicit TensorRtEngine(const EngineOptions &options)
        : batch_(options.batch), device_(options.device), graph_wanted_(options.graph) {
        try {
            open(options);
        } catch (...) {
            release();
            throw;
        }
    }
    ~TensorRtEngine() override { release(); }

    const IoSpec &io() const override { return io_; }

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
        const bool warm =
            lane.length == length;  // TensorRT wants a run after shapes were set, then a capture
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
            throw Error(XLSTM_ENVIRONMENT,
                        "no GPU " + std::to_string(device_) + ", there are " + std::to_string(devices));
        }
        use_device();
        check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "no CUDA stream");
        load(options);
        read_tensors();
        make_lanes(options.piece);
        for (Tensor &tensor : outputs_) tensor.dims = output_dims(tensor.name);
        io_ = make_io(inputs_, outputs_);
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

    // All but the dimensions of outputs, which are seen when there are contexts.
    void read_tensors() {
        for (int32_t i = 0; i < engine_->getNbIOTensors(); ++i) {
            const std::string name = engine_->getIOTensorName(i);
            if (engine_->getTensorLocation(name.c_str()) != nvinfer1::TensorLocation::kDEVICE ||
                engine_->getTensorFormat(name.c_str()) != nvinfer1::TensorFormat::kLINEAR) {
                throw Error(XLSTM_BAD_INPUT, "the engine's " + name + " is not plain memory of the GPU");
            }
            const xlstm_type type = type_of(engine_->getTensorDataType(name.c_str()), name);
            if (engine_->getTensorIOMode(name.c_str()) == nvinfer1::TensorIOMode::kINPUT) {
                inputs_.push_back({name, type, input_dims(name)});
            } else {
                outputs_.push_back({name, type, {}});
            }
        }
    }

    // An input's free axes are the batch and the length.
    std::vector<int64_t> input_dims(const std::string &name) const {
        const Dims dims = engine_->getTensorShape(name.c_str());
        std::vector<int64_t> all;
        for (int32_t axis = 0; axis < dims.nbDims; ++axis) {
            const int64_t dim = dims.d[axis];
            if (dim < 0 && axis > 1) {
                throw Error(XLSTM_BAD_INPUT, "the engine's " + name + " has shape " + text_of(dims) +
                                                 ", expected (batch, …) or (batch, length, …): positions "
                                                 "on a later axis are not for the runner");
            }
            all.push_back(dim >= 0 ? dim : axis == 0 ? kBatch : kSequence);
        }
        return all;
    }

    // What an output's shape is at one position and, where a run can be longer, at the most: the engine need not
    // know which sizes do not change.
    std::vector<int64_t> output_dims(const std::string &name) const {
        const Dims one = step_.context->getTensorShape(name.c_str());
        const Dims most = longest_ > 1 ? long_.context->getTensorShape(name.c_str()) : one;
        std::vector<int64_t> all;
        bool fits = one.nbDims == most.nbDims;
        for (int32_t axis = 0; fits && axis < one.nbDims; ++axis) {
            const bool grows = one.d[axis] == 1 && most.d[axis] == longest_ &&
                               (longest_ > 1 || engine_->getTensorShape(name.c_str()).d[axis] < 0);
            fits = axis == 0 ? one.d[0] == batch_ && most.d[0] == batch_
                             : (axis == 1 && grows) || one.d[axis] == most.d[axis];
            all.push_back(axis == 0 ? kBatch : axis == 1 && grows ? kSequence : one.d[axis]);
        }
        if (fits) return all;
        throw Error(XLSTM_BAD_INPUT, "the engine's " + name + " has shape " + text_of(one) +
                                         " for one position and " + text_of(most) + " for " +
                                         std::to_string(longest_));
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
        int64_t fewest = 0;  // positions, of all profiles for this batch
        for (int32_t profile = 0; profile < engine_->getNbOptimizationProfiles(); ++profile) {
            const Range range = range_of(profile);
            const auto takes = [&](int64_t length) { return range.min <= length && length <= range.max; };
            if (takes(1) && (step.profile < 0 || range.max < step.max)) step = range;
            if (takes(2) && (most.profile < 0 || range.max > most.max)) most = range;
            if (range.min <= range.max && (fewest == 0 || range.min < fewest)) fewest = range.min;
        }
        if (step.profile < 0) {
            const std::string several =
                fewest < 2 ? ""
                           : ": it takes " + std::to_string(fewest) +
                                 " positions at least, and several to a step are not for the runner";
            throw Error(XLSTM_BAD_INPUT, "the engine has no optimization profile for one position at batch " +
                                             std::to_string(batch_) + several);
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
    IoSpec io_;
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

std::unique_ptr<Engine> open_engine(const EngineOptions &options) {
    return std::make_unique<TensorRtEngine>(options);
}

}  // namespace xlstm::runner
