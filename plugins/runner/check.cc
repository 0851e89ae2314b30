// xlstm-runner-check: tries the core on this machine, without TensorRT or a GPU. Its engine computes a running
// sum on the CPU, sum' = sum + x, so that every way of calling the runner has a known answer.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "engine.h"
#include "xlstm_runner.h"

namespace xlstm::runner {
namespace {

class SumEngine : public Engine {
public:
    SumEngine(int64_t batch, int64_t longest) : batch_(batch), longest_(longest) {
        io_ = make_io(
            {{"x", XLSTM_FLOAT32, {kBatch, kSequence}}, {"past_0_sum", XLSTM_FLOAT32, {kBatch, 1}}},
            {{"y", XLSTM_FLOAT32, {kBatch, kSequence}}, {"present_0_sum", XLSTM_FLOAT32, {kBatch, 1}}});
    }

    const IoSpec &io() const override { return io_; }
    int64_t longest() const override { return longest_; }

    void *allocate(size_t bytes) override {
        memory_.emplace_back(std::calloc(1, bytes), std::free);
        return memory_.back().get();
    }
    void copy_in(void *device, const void *host, const Rows &rows) override {
        copy(device, rows.bytes, host, rows.pitch, rows);
    }
    void copy_out(void *host, const void *device, const Rows &rows) override {
        copy(host, rows.pitch, device, rows.bytes, rows);
    }
    void clear(void *device, size_t bytes) override { std::memset(device, 0, bytes); }

    void bind(int parity, const std::vector<Binding> &bindings) override {
        for (const Binding &binding : bindings) {
            tensors_[parity][binding.name] = static_cast<float *>(binding.address);
        }
    }
    void run(int parity, int64_t length) override {
        auto &at = tensors_[parity];
        for (int64_t row = 0; row < batch_; ++row) {
            float sum = at["past_0_sum"][row];
            for (int64_t i = row * length; i < (row + 1) * length; ++i) at["y"][i] = sum += at["x"][i];
            at["present_0_sum"][row] = sum;
        }
    }
    void wait() override {}

private:
    static void copy(void *to, size_t to_pitch, const void *from, size_t from_pitch, const Rows &rows) {
        for (size_t row = 0; row < rows.count; ++row) {
            std::memcpy(static_cast<char *>(to) + row * to_pitch,
                        static_cast<const char *>(from) + row * from_pitch, rows.bytes);
        }
    }

    IoSpec io_;
    int64_t batch_, longest_;
    std::vector<std::unique_ptr<void, decltype(&std::free)>> memory_;
    std::map<std::string, float *> tensors_[2];
};

}  // namespace

std::unique_ptr<Engine> open_engine(const EngineOptions &options) {
    return std::make_unique<SumEngine>(options.batch, options.piece > 0 ? options.piece : 8);
}

}  // namespace xlstm::runner

namespace {

constexpr int kBatch = 2, kLength = 21;

void require(bool met, const char *what) {
    if (met) return;
    std::fprintf(stderr, "%s: %s\n", what, xlstm_error());
    std::exit(1);
}

void ok(xlstm_status status, const char *what) { require(status == XLSTM_OK, what); }

class Runner {
public:
    Runner() {
        xlstm_options options{};
        options.size = sizeof options;
        options.batch = kBatch;
        options.engine = "sum";
        ok(xlstm_open(&options, &runner_), "open");
    }
    ~Runner() { xlstm_close(runner_); }
    Runner(const Runner &) = delete;
    Runner &operator=(const Runner &) = delete;
    operator xlstm_runner *() const { return runner_; }

    // Sums after positions start … start + length - 1 of the numbers 1, 2, 3, … in row 0 and their tenfold in row 1.
    std::vector<float> run(int start, int length) {
        std::vector<float> x, y(static_cast<size_t>(kBatch) * length);
        for (int row = 0; row < kBatch; ++row) {
            for (int i = 0; i < length; ++i)
                x.push_back(static_cast<float>((start + i + 1) * (row ? 10 : 1)));
        }
        const void *inputs[] = {x.data()};
        void *outputs[] = {y.data()};
        ok(length == 1 ? xlstm_step(runner_, inputs, outputs)
                       : xlstm_prefill(runner_, length, inputs, outputs),
           "run");
        return y;
    }

private:
    xlstm_runner *runner_ = nullptr;
};

float sum(int until, int row) { return static_cast<float>(until * (until + 1) / 2 * (row ? 10 : 1)); }

}  // namespace

int main(int count, char **words) {
    const std::string file = std::string(count > 1 ? words[1] : ".") + "/xlstm-runner-check.state";
    Runner runner, steps, resumed;
    std::vector<float> y = runner.run(0, kLength);  // longer than the engine takes: in pieces
    for (int row = 0; row < kBatch; ++row) {
        for (int i = 0; i < kLength; ++i)
            require(y[row * kLength + i] == sum(i + 1, row), "prefill in pieces");
    }
    for (int i = 0; i < 5; ++i) {
        y = steps.run(i, 1);
        for (int row = 0; row < kBatch; ++row) require(y[row] == sum(i + 1, row), "steps");
    }
    ok(xlstm_save_state(steps, file.c_str()), "save");
    ok(xlstm_load_state(resumed, file.c_str()), "load");
    y = resumed.run(5, 3);
    for (int row = 0; row < kBatch; ++row) require(y[row * 3 + 2] == sum(8, row), "a saved state goes on");
    const int32_t second = 1;
    ok(xlstm_reset_rows(resumed, &second, 1), "reset of a row");
    y = resumed.run(8, 1);
    require(y[0] == sum(9, 0) && y[1] == 90, "one row starts afresh");
    require(xlstm_prefill(runner, 0, nullptr, nullptr) == XLSTM_USAGE, "a wrong call is refused");
    std::remove(file.c_str());
    std::puts("core: ok");
    return 0;
}
