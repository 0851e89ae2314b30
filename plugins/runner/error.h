// How the runner fails inside; c_api.cc turns it into a status and a text.
#pragma once

#include <stdexcept>
#include <string>

#include "xlstm_runner.h"

namespace xlstm::runner {

struct Error : std::runtime_error {
    Error(xlstm_status status, const std::string &text) : std::runtime_error(text), status(status) {}
    xlstm_status status;
};

}  // namespace xlstm::runner
