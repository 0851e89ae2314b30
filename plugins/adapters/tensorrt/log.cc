#include "adapters/tensorrt/log.h"

#include <cstdio>
#include <mutex>

namespace xlstm::tensorrt {
namespace {

// Where a logger comes from: a finder (ILoggerFinder) or a function.
struct Source {
    void *finder = nullptr;
    void *(*function)() = nullptr;
    int32_t version = 0;  // of TensorRT; 0: not known, so that nothing can be called

    void *logger() const {
        if (version == 0) return nullptr;
        if (finder != nullptr) return find_logger(finder, version);
        return function == nullptr ? nullptr : function();
    }
};

std::mutex mutex;
Source given, fallback;

// Whether TensorRT took the message.
bool pass_on(const std::string &message) {
    Source sources[2];
    {
        const std::lock_guard<std::mutex> lock(mutex);
        sources[0] = given, sources[1] = fallback;
    }
    for (const Source &source : sources) {
        if (void *logger = source.logger()) {
            log_error(logger, source.version, message.c_str());
            return true;
        }
    }
    return false;
}

}  // namespace

void set_logger_of(const Runtime &runtime) {
    const std::lock_guard<std::mutex> lock(mutex);
    fallback = {nullptr, runtime.logger, runtime.version};
}

void log_error(const std::string &message) noexcept {
    try {
        if (pass_on(message)) return;
    } catch (...) {  // of a logger that throws
    }
    std::fprintf(stderr, "xlstm: %s\n", message.c_str());
}

}  // namespace xlstm::tensorrt

// TensorRT calls this with an ILoggerFinder when it loads the library.
extern "C" __attribute__((visibility("default"))) void setLoggerFinder(void *finder) {
    using namespace xlstm::tensorrt;
    try {
        const int32_t version = finder == nullptr ? 0 : version_for(finder);
        const std::lock_guard<std::mutex> lock(mutex);
        given = {finder, nullptr, version};
    } catch (...) {  // messages go to stderr then
    }
}
