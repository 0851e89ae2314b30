// Reads the attributes of a node. The first that is missing or not allowed stays as the status with which the
// kernel is not created, so that the session does not open.
#pragma once

#include <cstdio>

#include "adapters/onnxruntime/ort_api.h"
#include "common/attributes.h"

namespace xlstm::ort {

class Attributes {
public:
    Attributes(const Api *api, const KernelInfo *info, const char *op) : api_(api), info_(info), op_(op) {}

    float operator()(const Attribute &attribute) {
        float value = attribute.fallback;
        int64_t integer = 0;
        if (found(KernelInfoGetAttribute_float::call(api_, info_, attribute.name, &value))) {
            if (!attribute.allowed(value))
                refuse("%s is %g, expected %s", attribute.name, value, attribute.requirement);
        } else if (found(KernelInfoGetAttribute_int64::call(api_, info_, attribute.name, &integer))) {
            refuse("%s is an integer, expected %s of type float", attribute.name, attribute.requirement);
        } else if (attribute.required) {
            refuse("the attribute %s is missing", attribute.name);
        }
        return value;
    }

    Status *status() const { return status_; }

private:
    bool found(Status *status) {
        if (status != nullptr) ReleaseStatus::call(api_, status);
        return status == nullptr;
    }

    template <typename... Values>
    void refuse(const char *format, Values... values) {
        if (status_ != nullptr) return;
        char reason[120], message[160];
        std::snprintf(reason, sizeof reason, format, values...);
        std::snprintf(message, sizeof message, "%s: %s", op_, reason);
        status_ = CreateStatus::call(api_, kInvalidArgument, message);
    }

    const Api *api_;
    const KernelInfo *info_;
    const char *op_;
    Status *status_ = nullptr;
};

}  // namespace xlstm::ort
