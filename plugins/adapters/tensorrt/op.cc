#include "adapters/tensorrt/op.h"

#include <algorithm>
#include <cctype>
#include <cstring>
#include <limits>

namespace xlstm::tensorrt {

std::string Sizes::take(const Tensor &tensor, const nvinfer1::Dims &dims) {
    const auto misfit = [&](const std::string &why) {
        std::string axes;
        for (const char *axis = tensor.axes; *axis != '\0'; ++axis) {
            axes += (axes.empty() ? "" : ", ") + std::string(1, *axis);
        }
        return std::string(tensor.name) + " has shape " + to_string(dims) + ", expected (" + axes + ")" + why;
    };
    const int32_t rank = static_cast<int32_t>(std::strlen(tensor.axes));
    if (dims.nbDims != rank) return misfit("");
    for (int32_t i = 0; i < rank; ++i) {
        const char axis = tensor.axes[i];
        const int64_t size = dims.d[i];
        if (size < 0) continue;
        if (std::isdigit(static_cast<unsigned char>(axis)) != 0) {
            if (size != axis - '0') return misfit("");
            continue;
        }
        if (size < 1 || size > std::numeric_limits<int32_t>::max()) {
            return misfit(" with sizes from 1 to 2147483647");
        }
        int32_t &known = (*this)[axis];
        if (known != 0 && known != size) {
            return misfit(" with " + std::string(1, axis) + " = " + std::to_string(known));
        }
        known = static_cast<int32_t>(size);
    }
    return "";
}

void Sizes::raise(const Tensor &tensor, const nvinfer1::Dims &largest) {
    const int32_t rank = std::min<int32_t>(largest.nbDims, static_cast<int32_t>(std::strlen(tensor.axes)));
    for (int32_t i = 0; i < rank; ++i) {
        if (std::isdigit(static_cast<unsigned char>(tensor.axes[i])) != 0) continue;
        int32_t &known = (*this)[tensor.axes[i]];
        const int64_t size = std::min<int64_t>(largest.d[i], std::numeric_limits<int32_t>::max());
        known = std::max(known, static_cast<int32_t>(std::max<int64_t>(size, 0)));
    }
}

std::string to_string(const nvinfer1::Dims &dims) {
    if (dims.nbDims < 0 || dims.nbDims > nvinfer1::Dims::MAX_DIMS) {
        return "of " + std::to_string(dims.nbDims) + " axes";
    }
    std::string text;
    for (int32_t i = 0; i < dims.nbDims; ++i) {
        text += (i == 0 ? "" : ", ") + std::to_string(dims.d[i]);
    }
    return "(" + text + ")";
}

std::string to_string(nvinfer1::DataType type) {
    static const char *const names[] = {"FP32",  "FP16", "INT8", "INT32", "BOOL",
                                        "UINT8", "FP8",  "BF16", "INT64"};
    const int32_t value = static_cast<int32_t>(type);
    if (value < 0 || value >= static_cast<int32_t>(std::size(names))) {
        return "type " + std::to_string(value);
    }
    return names[value];
}

}  // namespace xlstm::tensorrt
