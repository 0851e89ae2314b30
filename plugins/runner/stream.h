// The bookkeeping of streams on any engine: two buffers for each state that change roles from run to run,
// prefill in pieces, rows that start afresh, saved states.
#pragma once

#include <memory>
#include <vector>

#include "engine.h"
#include "io_spec.h"
#include "state_file.h"

namespace xlstm::runner {

class Stream {
public:
    Stream(std::unique_ptr<Engine> engine, int64_t batch, const ModelHash &hash);

    const IoSpec &io() const { return io_; }
    int64_t batch() const { return batch_; }
    size_t state_bytes() const { return format_.bytes(); }

    void run(int64_t length, const void *const *inputs, void *const *outputs);
    void reset();
    void reset(const int32_t *rows, int32_t count);
    void get_state(uint8_t *buffer);
    void set_state(const uint8_t *buffer, size_t bytes);

private:
    void run_piece(int64_t start, int64_t length, int64_t whole, const void *const *inputs,
                   void *const *outputs);
    void settle() noexcept;
    std::vector<Binding> bindings(int parity) const;
    size_t total_bytes(const Tensor &tensor) const {
        return static_cast<size_t>(batch_) * tensor.row_bytes();
    }

    IoSpec io_;
    std::unique_ptr<Engine> engine_;
    int64_t batch_, piece_;
    StateFormat format_;
    std::vector<void *> inputs_, outputs_;
    std::vector<void *> states_[2];
    int now_ = 0;  // which of states_ holds the state; the next run writes the other one
    bool known_ = true;
};

}  // namespace xlstm::runner
