// The C interface: checks pointers, calls Stream, turns what it throws into a status and a text.
#include <algorithm>
#include <cstring>
#include <new>

#include "error.h"
#include "stream.h"
#include "xlstm_runner.h"

using xlstm::runner::Error;
using xlstm::runner::Stream;
using xlstm::runner::Tensor;

struct xlstm_runner {
    Stream stream;
};

namespace {

constexpr size_t kErrorBytes = 2048;
thread_local char error_text[kErrorBytes] = "";  // of fixed size, so that an error can always be kept

xlstm_status failed(xlstm_status status, const char *text) noexcept {
    std::strncpy(error_text, text, kErrorBytes - 1);
    return status;
}

template <typename Function>
xlstm_status guarded(Function &&function) noexcept {
    try {
        function();
        return XLSTM_OK;
    } catch (const Error &error) {
        return failed(error.status, error.what());
    } catch (const std::bad_alloc &) {
        return failed(XLSTM_ENVIRONMENT, "out of memory");
    } catch (const std::exception &error) {
        return failed(XLSTM_ENVIRONMENT, error.what());
    } catch (...) {
        return failed(XLSTM_ENVIRONMENT, "an unknown error");
    }
}

void require(bool given, const char *what) {
    if (!given) throw Error(XLSTM_USAGE, std::string(what) + " is null");
}

// What a caller compiled against an older interface does not know is zero.
xlstm_options read_options(const xlstm_options *given) {
    require(given != nullptr, "options");
    constexpr size_t kSmallest = offsetof(xlstm_options, no_graph) + sizeof(int32_t);  // of version 1
    if (given->size < kSmallest) throw Error(XLSTM_USAGE, "options.size must be sizeof(xlstm_options)");
    xlstm_options options{};
    std::memcpy(&options, given, std::min<size_t>(given->size, sizeof options));
    require(options.engine != nullptr, "options.engine");
    if (options.batch < 0 || options.piece < 0 || options.device < 0) {
        throw Error(XLSTM_USAGE, "options: batch, piece and device must not be negative");
    }
    return options;
}

xlstm_runner *open_runner(const xlstm_options &options) {
    using namespace xlstm::runner;
    const ModelHash hash = parse_hash(options.model_hash);
    const int64_t batch = options.batch == 0 ? 1 : options.batch;
    const EngineOptions engine_options{options.engine, options.plugin == nullptr ? "" : options.plugin,
                                       batch,          options.piece,
                                       options.device, options.no_graph == 0};
    std::unique_ptr<Engine> engine = open_engine(engine_options);
    return new xlstm_runner{Stream(std::move(engine), batch, hash)};
}

const std::vector<Tensor> *tensors(const Stream &stream, xlstm_role role) {
    if (role == XLSTM_INPUT) return &stream.io().inputs;
    return role == XLSTM_OUTPUT ? &stream.io().outputs : nullptr;
}

}  // namespace

extern "C" {

xlstm_status xlstm_open(const xlstm_options *options, xlstm_runner **runner) {
    if (runner != nullptr) *runner = nullptr;
    return guarded([&] {
        require(runner != nullptr, "runner");
        *runner = open_runner(read_options(options));
    });
}

void xlstm_close(xlstm_runner *runner) { delete runner; }

const char *xlstm_error(void) { return error_text; }

int32_t xlstm_version(void) { return XLSTM_RUNNER_VERSION; }

int32_t xlstm_count(const xlstm_runner *runner, xlstm_role role) {
    if (runner == nullptr) return 0;
    if (role == XLSTM_STATE) return static_cast<int32_t>(runner->stream.io().states.size());
    const std::vector<Tensor> *list = tensors(runner->stream, role);
    return list == nullptr ? 0 : static_cast<int32_t>(list->size());
}

xlstm_status xlstm_describe(const xlstm_runner *runner, xlstm_role role, int32_t index,
                            xlstm_tensor *tensor) {
    return guarded([&] {
        require(runner != nullptr, "runner");
        require(tensor != nullptr, "tensor");
        if (index < 0 || index >= xlstm_count(runner, role)) {
            throw Error(XLSTM_USAGE, "no tensor " + std::to_string(index) + " of that role");
        }
        const Tensor &found = role == XLSTM_STATE ? runner->stream.io().states[index].past
                                                  : (*tensors(runner->stream, role))[index];
        *tensor = {found.name.c_str(), found.type, static_cast<int32_t>(found.dims.size()), {}};
        for (size_t axis = 0; axis < found.dims.size(); ++axis) {
            const int64_t dim = found.dims[axis];
            tensor->dims[axis] = dim == xlstm::runner::kBatch ? runner->stream.batch() : dim;
        }
    });
}

xlstm_status xlstm_prefill(xlstm_runner *runner, int64_t length, const void *const *inputs,
                           void *const *outputs) {
    return guarded([&] {
        require(runner != nullptr, "runner");
        require(inputs != nullptr, "inputs");
        runner->stream.run(length, inputs, outputs);
    });
}

xlstm_status xlstm_step(xlstm_runner *runner, const void *const *inputs, void *const *outputs) {
    return xlstm_prefill(runner, 1, inputs, outputs);
}

xlstm_status xlstm_reset(xlstm_runner *runner) {
    return guarded([&] {
        require(runner != nullptr, "runner");
        runner->stream.reset();
    });
}

xlstm_status xlstm_reset_rows(xlstm_runner *runner, const int32_t *rows, int32_t count) {
    return guarded([&] {
        require(runner != nullptr, "runner");
        if (count < 0) throw Error(XLSTM_USAGE, "count is negative");
        require(rows != nullptr || count == 0, "rows");
        runner->stream.reset(rows, count);
    });
}

size_t xlstm_state_bytes(const xlstm_runner *runner) {
    return runner == nullptr ? 0 : runner->stream.state_bytes();
}

xlstm_status xlstm_get_state(xlstm_runner *runner, void *buffer, size_t bytes) {
    return guarded([&] {
        require(runner != nullptr, "runner");
        require(buffer != nullptr, "buffer");
        const size_t needed = runner->stream.state_bytes();
        if (bytes != needed) throw Error(XLSTM_USAGE, "a state is " + std::to_string(needed) + " bytes");
        runner->stream.get_state(static_cast<uint8_t *>(buffer));
    });
}

xlstm_status xlstm_set_state(xlstm_runner *runner, const void *buffer, size_t bytes) {
    return guarded([&] {
        require(runner != nullptr, "runner");
        require(buffer != nullptr, "buffer");
        runner->stream.set_state(static_cast<const uint8_t *>(buffer), bytes);
    });
}

xlstm_status xlstm_save_state(xlstm_runner *runner, const char *path) {
    return guarded([&] {
        require(runner != nullptr, "runner");
        require(path != nullptr, "path");
        std::vector<uint8_t> buffer(runner->stream.state_bytes());
        runner->stream.get_state(buffer.data());
        xlstm::runner::write_file(path, buffer.data(), buffer.size());
    });
}

xlstm_status xlstm_load_state(xlstm_runner *runner, const char *path) {
    return guarded([&] {
        require(runner != nullptr, "runner");
        require(path != nullptr, "path");
        const std::string bytes = xlstm::runner::read_file(path);
        runner->stream.set_state(reinterpret_cast<const uint8_t *>(bytes.data()), bytes.size());
    });
}

}  // extern "C"
