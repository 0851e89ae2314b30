// An engine on the CPU. As on a GPU, nothing happens before wait(): whoever forgets that call sees old memory.
// Settings: longest, fail_run, fail_wait (the number of the call that fails), last=no for a model without that output.
#include <functional>
#include <memory>

#include "engine.h"
#include "error.h"
#include "model.h"

namespace xlstm::runner {
namespace {

class FakeEngine : public Engine {
public:
    FakeEngine(const model::Settings &settings, int64_t batch, int64_t piece)
        : batch_(batch),
          longest_(settings.number("longest", 8)),
          fail_run_(settings.number("fail_run", 0)),
          fail_wait_(settings.number("fail_wait", 0)) {
        std::vector<Tensor> outputs = {
            {"logits", XLSTM_FLOAT32, {kBatch, kSequence, model::kLogits}},
            {"last", XLSTM_FLOAT32, {kBatch, model::kMemory}},
            {"present_0_C", XLSTM_FLOAT32, {kBatch, model::kMemory}},
            {"present_0_conv", XLSTM_INT64, {kBatch, model::kConv}},
        };
        if (settings.text("last") == "no") outputs.erase(outputs.begin() + 1);
        io_ = make_io({{"tokens", XLSTM_INT64, {kBatch, kSequence}},
                       {"past_0_C", XLSTM_FLOAT32, {kBatch, model::kMemory}},
                       {"past_0_conv", XLSTM_INT64, {kBatch, model::kConv}}},
                      outputs);
        if (piece > 0 && piece < longest_) longest_ = piece;
    }
    ~FakeEngine() override {
        for (void *memory : memory_) std::free(memory);
    }

    const IoSpec &io() const override { return io_; }

    int64_t longest() const override { return longest_; }

    void *allocate(size_t bytes) override {
        REQUIRE(bytes > 0 && !ran_);
        memory_.push_back(std::calloc(1, bytes));
        return memory_.back();
    }

    void copy_in(void *device, const void *host, const Rows &rows) override {
        later([=] { copy(device, rows.bytes, host, rows.pitch, rows); });
    }

    void copy_out(void *host, const void *device, const Rows &rows) override {
        later([=] { copy(host, rows.pitch, device, rows.bytes, rows); });
    }

    void clear(void *device, size_t bytes) override {
        later([=] { std::memset(device, 0, bytes); });
    }

    void bind(int parity, const std::vector<Binding> &bindings) override {
        std::map<std::string, void *> by_name;
        for (const Binding &binding : bindings) by_name[binding.name] = binding.address;
        tensors_[parity] = std::make_unique<model::Tensors>(by_name);
    }

    void run(int parity, int64_t length) override {
        REQUIRE(length >= 1 && length <= longest_);
        ran_ = true;
        if (++runs_ == fail_run_) throw Error(XLSTM_ENVIRONMENT, "the run that fails");
        later([=] { model::run(*tensors_[parity], batch_, length); });
    }

    void wait() override {
        if (++waits_ == fail_wait_) throw Error(XLSTM_ENVIRONMENT, "the wait that fails");
        for (const auto &action : queue_) action();
        queue_.clear();
    }

private:
    static void copy(void *to, size_t to_pitch, const void *from, size_t from_pitch, const Rows &rows) {
        for (size_t row = 0; row < rows.count; ++row) {
            std::memcpy(static_cast<char *>(to) + row * to_pitch,
                        static_cast<const char *>(from) + row * from_pitch, rows.bytes);
        }
    }

    void later(std::function<void()> action) { queue_.push_back(std::move(action)); }

    IoSpec io_;
    int64_t batch_, longest_, fail_run_, fail_wait_, runs_ = 0, waits_ = 0;
    bool ran_ = false;
    std::vector<void *> memory_;
    std::unique_ptr<model::Tensors> tensors_[2];
    std::vector<std::function<void()>> queue_;
};

}  // namespace

std::unique_ptr<Engine> open_engine(const EngineOptions &options) {
    std::ifstream file(options.path);
    if (!file) throw Error(XLSTM_BAD_INPUT, options.path + ": no such file");
    return std::make_unique<FakeEngine>(model::Settings(file), options.batch, options.piece);
}

}  // namespace xlstm::runner
