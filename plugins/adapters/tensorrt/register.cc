// Registers the plugins when the library is loaded, for programs that only dlopen it: trtexec with
// --staticPlugins, ONNX Runtime's TensorRT provider. Does nothing where there is no TensorRT.
#include <cstdio>
#include <exception>
#include <string>

#include "adapters/tensorrt/creator.h"
#include "adapters/tensorrt/log.h"
#include "adapters/tensorrt/plugin.h"
#include "adapters/tensorrt/runtime.h"

namespace xlstm::tensorrt {
namespace {

constexpr int32_t kOldest = 100300;

void register_with(const Runtime &runtime) {
    set_logger_of(runtime);
    if (runtime.version < kOldest) {
        log_error("these plugins need TensorRT 10.3; this one is " + std::to_string(runtime.version));
        return;
    }
    int32_t count = 0;
    nvinfer1::IPluginCreatorInterface *const *all = creators(count);
    for (int32_t i = 0; i < count; ++i) {
        if (!runtime.add(*all[i], kNamespace)) {
            log_error("TensorRT has plugins of these names already; they stay");
            return;
        }
    }
}

[[gnu::constructor]] void register_on_load() noexcept {
    try {
        const std::vector<Runtime> all = runtimes();
        for (const Runtime &runtime : all) register_with(runtime);
        if (all.empty()) {
            std::fputs("xlstm: no TensorRT in this process, so no plugin was registered\n", stderr);
        }
    } catch (const std::exception &error) {
        log_error(error.what());
    }
}

}  // namespace
}  // namespace xlstm::tensorrt
