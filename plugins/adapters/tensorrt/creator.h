// The creators of both plugins, in both versions.
#pragma once

#include "adapters/tensorrt/interface.h"

namespace xlstm::tensorrt {

// `count` is set to their number. They live as long as the library.
nvinfer1::IPluginCreatorInterface *const *creators(int32_t &count) noexcept;

}  // namespace xlstm::tensorrt
