// What the check programs share: a list of named checks, a runner opened on files written for it, and streams
// computed by hand beside it.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "model.h"
#include "xlstm_runner.h"

namespace checks {

struct Check {
    const char *name;
    void (*run)();
};
extern const std::vector<Check> kCommonChecks, kEngineChecks;

// Write a file into the folder of this run; its path.
std::string write(const std::string &name, const std::string &text);

struct Settings {
    std::string engine = "longest=4";
    int32_t batch = 1;
    int64_t piece = 0;
    const char *model_hash = nullptr;
    const char *plugin = nullptr;
    int32_t device = 0;
    bool graph = true;
};

class Runner {
public:
    explicit Runner(const Settings &settings = {});
    ~Runner() { xlstm_close(handle); }
    Runner(const Runner &) = delete;
    Runner &operator=(const Runner &) = delete;
    xlstm_runner *handle = nullptr;
};

// Status of opening, where it fails; xlstm_error() has the text.
xlstm_status open_fails(const Settings &settings);

// Whether the text of the last error has these words.
bool error_has(const char *words);

// The same streams without a runner: one position at a time.
class Oracle {
public:
    explicit Oracle(int64_t batch)
        : C(batch * model::kMemory),
          conv(batch * model::kConv),
          last(batch * model::kMemory),
          batch_(batch) {}
    std::vector<float> run(const std::vector<int64_t> &tokens, int64_t length);  // logits
    std::vector<float> C;
    std::vector<int64_t> conv;
    std::vector<float> last;

private:
    int64_t batch_;
};

// Tokens (batch, length) that differ everywhere.
std::vector<int64_t> tokens(int64_t batch, int64_t length, int64_t seed);

// Run both over `length` positions and require equal outputs.
void run_both(Runner &runner, Oracle &oracle, int64_t batch, int64_t length, int64_t seed);

}  // namespace checks
