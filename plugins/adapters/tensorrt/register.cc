// Registers the plugins when the library is loaded, for programs that only dlopen it (trtexec --staticPlugins,
// ONNX Runtime's TensorRT provider). TensorRT is looked up in the running process and not linked: the library
// can be built without it, serves every version, and does nothing where there is none.
#include <dlfcn.h>

#include <cstdio>
#include <string>

#include "adapters/tensorrt/creator.h"
#include "adapters/tensorrt/interface.h"
#include "adapters/tensorrt/log.h"
#include "adapters/tensorrt/plugin.h"

namespace xlstm::tensorrt {
namespace {

// The registry's own interface lost its IPluginV2 functions in TensorRT 11, so the slot of
// registerCreator(IPluginCreatorInterface&, char const*) in its table of virtual functions depends on the
// version that runs.
constexpr int kRegisterSlot10 = 12;
constexpr int kRegisterSlot11 = 8;

using Register = bool (*)(void *registry, nvinfer1::IPluginCreatorInterface &creator, const char *space);

// Registers with the TensorRT that `library` (a handle of dlopen, or RTLD_DEFAULT) provides, if it does.
// Returns whether it does.
bool register_with(void *library) {
    const auto version = reinterpret_cast<int32_t (*)()>(dlsym(library, "getInferLibVersion"));
    const auto registry = reinterpret_cast<void *(*)()>(dlsym(library, "getPluginRegistry"));
    const auto logger = reinterpret_cast<LoggerSource>(dlsym(library, "getLogger"));
    if (version == nullptr || registry == nullptr) return false;
    set_logger_source(logger);
    constexpr int32_t oldest = 100300, next_layout = 110000;
    if (version() < oldest) {
        log_error("TensorRT " + std::to_string(version()) + " is too old for these plugins: 10.3 at least");
        return true;
    }
    void *found = registry();
    if (found == nullptr) return false;
    void **slots = *static_cast<void ***>(found);
    const auto add =
        reinterpret_cast<Register>(slots[version() < next_layout ? kRegisterSlot10 : kRegisterSlot11]);
    int32_t count = 0;
    nvinfer1::IPluginCreatorInterface *const *all = creators(count);
    for (int32_t i = 0; i < count; ++i) {
        if (!add(found, *all[i], kNamespace)) {
            log_error("TensorRT registers no second set of the xlstm plugins; the first one stays");
            break;
        }
    }
    return true;
}

// The registry keeps pointers into this library: it must outlive every dlclose.
void stay_loaded() {
    Dl_info self{};
    if (dladdr(reinterpret_cast<void *>(&stay_loaded), &self) != 0) {
        dlopen(self.dli_fname, RTLD_NOW | RTLD_NOLOAD | RTLD_NODELETE);
    }
}

[[gnu::constructor]] void register_on_load() noexcept {
    try {
        // Several runtimes can be in one process (full, lean, dispatch), most of them loaded without making
        // their symbols global.
        bool found = false;
        for (const char *name : {"libnvinfer.so.11", "libnvinfer.so.10", "libnvinfer_lean.so.11",
                                 "libnvinfer_lean.so.10", "libnvinfer_dispatch.so.11",
                                 "libnvinfer_dispatch.so.10"}) {
            if (void *library = dlopen(name, RTLD_NOW | RTLD_NOLOAD)) {
                found = register_with(library) || found;
                dlclose(library);
            }
        }
        if (!found) found = register_with(RTLD_DEFAULT);
        if (!found) std::fputs("xlstm: no TensorRT in this process, so no plugin was registered\n", stderr);
        stay_loaded();
    } catch (const std::exception &error) {
        log_error(error.what());
    }
}

}  // namespace
}  // namespace xlstm::tensorrt
