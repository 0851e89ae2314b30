// Messages through TensorRT's logger.
#pragma once

#include <string>

#include "adapters/tensorrt/runtime.h"

namespace xlstm::tensorrt {

// Whose logger to use when TensorRT has given no finder of loggers: the self-registering library sets this.
void set_logger_of(const Runtime &runtime);

// To TensorRT's logger; to stderr while there is none.
void log_error(const std::string &message) noexcept;

}  // namespace xlstm::tensorrt
