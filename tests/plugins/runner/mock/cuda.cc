// CUDA's runtime on the CPU: streams are queues that run when they are waited for.
#include <memory>
#include <utility>
#include <vector>

#include "mock.h"

using Actions = std::vector<std::function<void()>>;

struct CUgraph_st {
    Actions actions;
};
struct CUgraphExec_st {
    Actions actions;
};
struct CUstream_st {
    Actions waiting;
    CUgraph_st *captured = nullptr;
    bool spoiled = false;
};

namespace {

std::map<const char *, size_t> blocks;
cudaError_t last_error = cudaSuccess;

cudaError_t failed(cudaError_t error) {
    last_error = error;
    return error;
}

// Objects must all be destroyed.
template <typename Object>
void made(Object *object) {
    ++mock::world().live;
    REQUIRE(object != nullptr);
}

template <typename Object>
cudaError_t destroyed(Object *object) {
    --mock::world().live;
    delete object;
    return cudaSuccess;
}

// Device memory must lie within one allocation.
bool inside(const void *address, size_t bytes) {
    const auto *at = static_cast<const char *>(address);
    auto block = blocks.upper_bound(at);
    if (block == blocks.begin()) return false;
    --block;
    return at + bytes <= block->first + block->second;
}

}  // namespace

namespace mock {

World &world() {
    static World one;
    return one;
}

void enqueue(cudaStream_t stream, std::function<void()> action) {
    (stream->captured != nullptr ? stream->captured->actions : stream->waiting).push_back(std::move(action));
}

bool is_capturing(cudaStream_t stream) { return stream->captured != nullptr; }

void spoil_capture(cudaStream_t stream) { stream->spoiled = true; }

bool is_memory(const void *address, size_t bytes) { return inside(address, bytes); }

}  // namespace mock

cudaError_t cudaGetDeviceCount(int *count) {
    *count = mock::world().devices;
    return *count == 0 ? cudaErrorNoDevice : cudaSuccess;  // the driver's own way to say so
}

cudaError_t cudaSetDevice(int device) {
    return device < mock::world().devices ? cudaSuccess : failed(cudaErrorInvalidValue);
}

cudaError_t cudaGetLastError() { return std::exchange(last_error, cudaSuccess); }

const char *cudaGetErrorString(cudaError_t error) {
    return error == cudaErrorNoDevice           ? "no device"
           : error == cudaErrorMemoryAllocation ? "memory"
                                                : "invalid";
}

cudaError_t cudaMalloc(void **memory, size_t bytes) {
    REQUIRE(bytes > 0);
    if (static_cast<int64_t>(bytes) > mock::world().memory) return failed(cudaErrorMemoryAllocation);
    mock::world().memory -= static_cast<int64_t>(bytes);
    *memory = std::malloc(bytes);
    std::memset(*memory, 0xa5, bytes);
    blocks[static_cast<char *>(*memory)] = bytes;
    ++mock::world().live;
    return cudaSuccess;
}

cudaError_t cudaFree(void *memory) {
    REQUIRE(blocks.count(static_cast<char *>(memory)) == 1);
    mock::world().memory += static_cast<int64_t>(blocks[static_cast<char *>(memory)]);
    blocks.erase(static_cast<char *>(memory));
    std::free(memory);
    --mock::world().live;
    return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void *memory, int value, size_t bytes, cudaStream_t stream) {
    REQUIRE(inside(memory, bytes) && !mock::is_capturing(stream));
    mock::enqueue(stream, [=] { std::memset(memory, value, bytes); });
    return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, cudaMemcpyKind kind,
                            cudaStream_t stream) {
    REQUIRE(inside(kind == cudaMemcpyHostToDevice ? to : from, bytes) && !mock::is_capturing(stream));
    mock::enqueue(stream, [=] { std::memcpy(to, from, bytes); });
    return cudaSuccess;
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned flags) {
    REQUIRE(flags == cudaStreamNonBlocking);
    made(*stream = new CUstream_st);
    return cudaSuccess;
}

cudaError_t cudaStreamDestroy(cudaStream_t stream) {
    REQUIRE(stream->waiting.empty());
    return destroyed(stream);
}

cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
    REQUIRE(!mock::is_capturing(stream));
    for (const auto &action : std::exchange(stream->waiting, {})) action();
    return cudaSuccess;
}

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode mode) {
    REQUIRE(!mock::is_capturing(stream) && mode == cudaStreamCaptureModeThreadLocal);
    ++mock::world().calls["capture"];
    made(stream->captured = new CUgraph_st);
    stream->spoiled = false;
    return cudaSuccess;
}

cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *graph) {
    REQUIRE(mock::is_capturing(stream));
    *graph = std::exchange(stream->captured, nullptr);
    if (!stream->spoiled) return cudaSuccess;
    destroyed(std::exchange(*graph, nullptr));
    return failed(cudaErrorInvalidValue);
}

cudaError_t cudaGraphInstantiate(cudaGraphExec_t *exec, cudaGraph_t graph, unsigned long long flags) {
    REQUIRE(flags == 0 && !graph->actions.empty());
    made(*exec = new CUgraphExec_st{graph->actions});
    return cudaSuccess;
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t stream) {
    ++mock::world().calls["launch"];
    for (const auto &action : exec->actions) mock::enqueue(stream, action);
    return cudaSuccess;
}

cudaError_t cudaGraphDestroy(cudaGraph_t graph) { return destroyed(graph); }
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec) { return destroyed(exec); }
