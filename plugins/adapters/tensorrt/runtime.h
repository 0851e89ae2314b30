// The TensorRT that runs in this process, found by name and not linked. What differs between versions is
// called by its slot in the table of virtual functions, so that one binary serves them all:
//
//                                                                     10.x  11.x
//   IPluginRegistry::registerCreator(IPluginCreatorInterface &, ...)    12     8  (IPluginV2 is gone)
//   ILoggerFinder::findLogger, ILogger::log                              0     4  (an IVersionedInterface)
#pragma once

#include <cstdint>
#include <vector>

#include "adapters/tensorrt/interface.h"

namespace xlstm::tensorrt {

struct Runtime {
    int32_t version;    // 10000 major + 100 minor + patch
    void *registry;     // IPluginRegistry
    void *(*logger)();  // ILogger, or null while TensorRT has none

    // Whether the registry took it: it refuses a second one of the same name.
    bool add(nvinfer1::IPluginCreatorInterface &creator, const char *space) const;
};

// All there are: full, lean and dispatch runtime can be loaded at once.
std::vector<Runtime> runtimes();

// The version of the runtime that an object with virtual functions is meant for; 0: there is no runtime.
int32_t version_for(void *object);

// Calls of ILoggerFinder and ILogger as `version` has them.
void *find_logger(void *finder, int32_t version);
void log_error(void *logger, int32_t version, const char *message);

}  // namespace xlstm::tensorrt
