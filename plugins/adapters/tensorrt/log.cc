#include "adapters/tensorrt/log.h"

#include <atomic>
#include <cstdio>

namespace xlstm::tensorrt {
namespace {

std::atomic<nvinfer1::ILoggerFinder *> finder{nullptr};
std::atomic<LoggerSource> fallback{nullptr};

nvinfer1::ILogger *logger() {
    if (nvinfer1::ILoggerFinder *given = finder) {
        if (nvinfer1::ILogger *found = given->findLogger()) return found;
    }
    const LoggerSource source = fallback;
    return source == nullptr ? nullptr : source();
}

}  // namespace

void set_logger_source(LoggerSource source) noexcept { fallback = source; }

void log_error(const std::string &message) noexcept {
    try {
        if (nvinfer1::ILogger *found = logger()) {
            found->log(nvinfer1::ILogger::Severity::kERROR, message.c_str());
            return;
        }
    } catch (...) {  // a logger of the user's that throws
    }
    std::fprintf(stderr, "xlstm: %s\n", message.c_str());
}

}  // namespace xlstm::tensorrt

// TensorRT calls this when it loads the library.
extern "C" __attribute__((visibility("default"))) void setLoggerFinder(nvinfer1::ILoggerFinder *finder) {
    xlstm::tensorrt::finder = finder;
}
