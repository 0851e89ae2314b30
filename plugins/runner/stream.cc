#include "stream.h"

#include <algorithm>
#include <utility>

#include "error.h"

namespace xlstm::runner {
namespace {

bool any_sequence(const IoSpec &io) {
    return std::any_of(io.inputs.begin(), io.inputs.end(), [](const Tensor &t) { return t.is_sequence(); });
}

}  // namespace

Stream::Stream(std::unique_ptr<Engine> engine, int64_t batch, const ModelHash &hash)
    : io_(engine->io()), engine_(std::move(engine)), batch_(batch), format_(io_, batch, hash) {
    piece_ = any_sequence(io_) ? engine_->longest() : 1;
    const auto allocate = [&](const Tensor &tensor) {
        const size_t positions = tensor.is_sequence() ? static_cast<size_t>(piece_) : 1;
        return engine_->allocate(positions * total_bytes(tensor));
    };
    for (const Tensor &input : io_.inputs) inputs_.push_back(allocate(input));
    for (const Tensor &output : io_.outputs) outputs_.push_back(allocate(output));
    for (std::vector<void *> &side : states_) {
        for (const State &state : io_.states) side.push_back(allocate(state.past));
    }
    for (const int parity : {0, 1}) engine_->bind(parity, bindings(parity));
}

std::vector<Binding> Stream::bindings(int parity) const {
    std::vector<Binding> all;
    for (size_t i = 0; i < inputs_.size(); ++i) all.push_back({io_.inputs[i].name, inputs_[i]});
    for (size_t i = 0; i < outputs_.size(); ++i) all.push_back({io_.outputs[i].name, outputs_[i]});
    for (size_t i = 0; i < io_.states.size(); ++i) {
        all.push_back({io_.states[i].past.name, states_[parity][i]});
        all.push_back({io_.states[i].present, states_[1 - parity][i]});
    }
    return all;
}

void Stream::run(int64_t length, const void *const *inputs, void *const *outputs) {
    if (length < 1) throw Error(XLSTM_USAGE, "length is " + std::to_string(length) + ", at least 1");
    if (length > 1 && !any_sequence(io_)) throw Error(XLSTM_USAGE, "the model has no sequence: length is 1");
    if (length > piece_ && io_.states.empty()) {
        throw Error(XLSTM_USAGE, "length is " + std::to_string(length) + ", at most " +
                                     std::to_string(piece_) + ": without a state there are no pieces");
    }
    for (size_t i = 0; i < io_.inputs.size(); ++i) {
        if (inputs[i] == nullptr) throw Error(XLSTM_USAGE, "no buffer for input " + io_.inputs[i].name);
    }
    if (!known_) {
        throw Error(XLSTM_USAGE, "the state is unknown since a call failed: reset all rows or set a state");
    }
    known_ = false;
    try {
        for (int64_t start = 0; start < length; start += piece_) {
            run_piece(start, std::min(piece_, length - start), length, inputs, outputs);
        }
    } catch (...) {
        settle();
        throw;
    }
    engine_->wait();
    known_ = true;
}

// After a failure: nothing still reads or writes the caller's buffers when it learns of it.
void Stream::settle() noexcept {
    try {
        engine_->wait();
    } catch (...) {  // the first error is the one to report
    }
}

void Stream::run_piece(int64_t start, int64_t length, int64_t whole, const void *const *inputs,
                       void *const *outputs) {
    const auto rows_of = [&](const Tensor &tensor) {
        const size_t position = tensor.row_bytes();
        const auto rows = static_cast<size_t>(batch_);
        if (!tensor.is_sequence()) return Rows{position, rows, position};
        return Rows{static_cast<size_t>(length) * position, rows, static_cast<size_t>(whole) * position};
    };
    const auto offset_of = [&](const Tensor &tensor) {
        return tensor.is_sequence() ? static_cast<size_t>(start) * tensor.row_bytes() : 0;
    };
    for (size_t i = 0; i < inputs_.size(); ++i) {
        const auto *from = static_cast<const uint8_t *>(inputs[i]) + offset_of(io_.inputs[i]);
        engine_->copy_in(inputs_[i], from, rows_of(io_.inputs[i]));
    }
    engine_->run(now_, length);
    now_ = 1 - now_;
    for (size_t i = 0; i < outputs_.size(); ++i) {
        if (outputs == nullptr || outputs[i] == nullptr) continue;
        auto *to = static_cast<uint8_t *>(outputs[i]) + offset_of(io_.outputs[i]);
        engine_->copy_out(to, outputs_[i], rows_of(io_.outputs[i]));
    }
}

void Stream::reset() {
    known_ = false;
    for (size_t i = 0; i < io_.states.size(); ++i) {
        engine_->clear(states_[now_][i], total_bytes(io_.states[i].past));
    }
    engine_->wait();
    known_ = true;
}

void Stream::reset(const int32_t *rows, int32_t count) {
    for (int32_t i = 0; i < count; ++i) {
        if (rows[i] < 0 || rows[i] >= batch_) {
            throw Error(XLSTM_USAGE,
                        "no row " + std::to_string(rows[i]) + " in a batch of " + std::to_string(batch_));
        }
    }
    const bool known = std::exchange(known_, false);
    for (size_t i = 0; i < io_.states.size(); ++i) {
        const size_t bytes = io_.states[i].past.row_bytes();
        for (int32_t r = 0; r < count; ++r) {
            auto *state = static_cast<uint8_t *>(states_[now_][i]);
            engine_->clear(state + static_cast<size_t>(rows[r]) * bytes, bytes);
        }
    }
    engine_->wait();
    known_ = known;
}

void Stream::get_state(uint8_t *buffer) {
    if (!known_) throw Error(XLSTM_USAGE, "the state is unknown since a call failed: nothing to save");
    format_.write_frame(buffer);
    for (size_t i = 0; i < io_.states.size(); ++i) {
        const size_t bytes = total_bytes(io_.states[i].past);
        engine_->copy_out(buffer + format_.offset(i), states_[now_][i], {bytes, 1, bytes});
    }
    engine_->wait();
    format_.seal(buffer);
}

// The new state goes into the buffers that hold none, so that a failure leaves the old one.
void Stream::set_state(const uint8_t *buffer, size_t bytes) {
    const std::vector<size_t> offsets = format_.find(buffer, bytes);
    for (size_t i = 0; i < io_.states.size(); ++i) {
        const size_t size = total_bytes(io_.states[i].past);
        engine_->copy_in(states_[1 - now_][i], buffer + offsets[i], {size, 1, size});
    }
    engine_->wait();
    now_ = 1 - now_;
    known_ = true;
}

}  // namespace xlstm::runner
