// Messages through TensorRT's logger.
#pragma once

#include <string>

#include "adapters/tensorrt/interface.h"

namespace xlstm::tensorrt {

// Where loggers come from when TensorRT has given no finder: the self-registering library sets this.
using LoggerSource = nvinfer1::ILogger *(*)();
void set_logger_source(LoggerSource source) noexcept;

// To TensorRT's logger; to stderr while there is none.
void log_error(const std::string &message) noexcept;

}  // namespace xlstm::tensorrt
