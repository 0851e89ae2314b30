// What a stream needs of a device. tensorrt_engine.cc has the real one.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "io_spec.h"

namespace xlstm::runner {

struct Binding {
    std::string name;
    void *address;
};

// Rows of `bytes` each: dense on the device, `pitch` bytes apart on the host.
struct Rows {
    size_t bytes, count, pitch;
};

// Calls are done in their order. What they take from or put into the host's memory is complete after wait().
class Engine {
public:
    virtual ~Engine() = default;

    virtual const IoSpec &io() const = 0;
    // The most positions of one run; no more than EngineOptions::piece.
    virtual int64_t longest() const = 0;
    // Memory of the device, all zero, which lives as long as the engine.
    virtual void *allocate(size_t bytes) = 0;
    virtual void copy_in(void *device, const void *host, const Rows &rows) = 0;
    virtual void copy_out(void *host, const void *device, const Rows &rows) = 0;
    virtual void clear(void *device, size_t bytes) = 0;
    // Where all tensors lie in runs of that parity, 0 or 1; once for each, before the first run.
    virtual void bind(int parity, const std::vector<Binding> &bindings) = 0;
    virtual void run(int parity, int64_t length) = 0;
    virtual void wait() = 0;
};

struct EngineOptions {
    std::string path, plugin;  // plugin: empty for none
    int64_t batch;
    int64_t piece;  // longest run wanted; 0: any
    int device;
    bool graph;
};

// Throws Error: the engine cannot be loaded, or is none of an exported model.
std::unique_ptr<Engine> open_engine(const EngineOptions &options);

}  // namespace xlstm::runner
