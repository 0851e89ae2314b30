#include "adapters/tensorrt/runtime.h"

#include <dlfcn.h>

namespace xlstm::tensorrt {
namespace {

constexpr int32_t kVersion11 = 110000;
constexpr int32_t kError = 1;  // ILogger::Severity::kERROR

template <typename Result, typename... Arguments>
Result call(void *object, int slot, Arguments... arguments) {
    void **slots = *static_cast<void ***>(object);
    return reinterpret_cast<Result (*)(void *, Arguments...)>(slots[slot])(object, arguments...);
}

template <typename Function>
Function symbol(void *library, const char *name) {
    return reinterpret_cast<Function>(dlsym(library, name));
}

// The version of the runtime in a library, by a handle of dlopen; 0: it holds none.
int32_t version_in(void *library) {
    const auto version = symbol<int32_t (*)()>(library, "getInferLibVersion");
    return version == nullptr ? 0 : version();
}

void add_runtime(std::vector<Runtime> &found, void *library) {
    const auto registry = symbol<void *(*)()>(library, "getPluginRegistry");
    const int32_t version = version_in(library);
    if (registry == nullptr || version == 0) return;
    if (void *made = registry()) found.push_back({version, made, symbol<void *(*)()>(library, "getLogger")});
}

}  // namespace

bool Runtime::add(nvinfer1::IPluginCreatorInterface &creator, const char *space) const {
    return call<bool>(registry, version < kVersion11 ? 12 : 8, &creator, space);
}

std::vector<Runtime> runtimes() {
    std::vector<Runtime> found;
    for (const char *name :
         {"libnvinfer.so.11", "libnvinfer.so.10", "libnvinfer_lean.so.11", "libnvinfer_lean.so.10",
          "libnvinfer_dispatch.so.11", "libnvinfer_dispatch.so.10"}) {
        if (void *library = dlopen(name, RTLD_NOW | RTLD_NOLOAD)) {  // most are not global
            add_runtime(found, library);
            dlclose(library);
        }
    }
    if (found.empty()) add_runtime(found, RTLD_DEFAULT);  // linked into the program
    return found;
}

int32_t version_for(void *object) {
    Dl_info where{};
    if (dladdr(*static_cast<void **>(object), &where) != 0) {
        if (void *library = dlopen(where.dli_fname, RTLD_NOW | RTLD_NOLOAD)) {
            const int32_t version = version_in(library);
            dlclose(library);
            if (version != 0) return version;
        }
    }
    const std::vector<Runtime> all = runtimes();  // the object is the program's own
    return all.empty() ? 0 : all.front().version;
}

void *find_logger(void *finder, int32_t version) {
    return call<void *>(finder, version < kVersion11 ? 0 : 4);
}

void log_error(void *logger, int32_t version, const char *message) {
    call<void>(logger, version < kVersion11 ? 0 : 4, kError, message);
}

}  // namespace xlstm::tensorrt
