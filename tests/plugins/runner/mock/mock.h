// What the mocks of CUDA and TensorRT share, and what tests ask them.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "cuda_runtime_api.h"
#include "model.h"

namespace mock {

struct World {
    int devices = 1;
    int64_t memory = 1 << 30;  // bytes that cudaMalloc gives
    int version = 0;           // of TensorRT; 0: that of its header
    std::map<std::string, int> calls;
    std::vector<int32_t> profiles;  // in the order of the contexts
    int64_t live = 0;               // allocations, streams, graphs, objects of TensorRT
};
World &world();

// Done when the stream is waited for, or by the graph that is being captured.
void enqueue(cudaStream_t stream, std::function<void()> action);
bool is_capturing(cudaStream_t stream);
void spoil_capture(cudaStream_t stream);
// Whether memory of the device starts there, of at least so many bytes.
bool is_memory(const void *address, size_t bytes);

}  // namespace mock
