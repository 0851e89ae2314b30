// Checks of what needs an engine that fails when it is told to.
#include <memory>
#include <thread>

#include "checks.h"

namespace checks {
namespace {

xlstm_status step(Runner &runner) {
    const int64_t token = 3;
    const void *inputs[] = {&token};
    return xlstm_step(runner.handle, inputs, nullptr);
}

// Neither runs nor state until the state is known again, whatever failed.
void failures() {
    for (const char *engine : {"longest=4 fail_run=3", "longest=4 fail_wait=3"}) {
        Runner runner({engine});
        REQUIRE(step(runner) == XLSTM_OK && step(runner) == XLSTM_OK);
        REQUIRE(step(runner) == XLSTM_ENVIRONMENT && error_has("that fails"));
        REQUIRE(step(runner) == XLSTM_USAGE && error_has("the state is unknown"));
        std::vector<char> bytes(xlstm_state_bytes(runner.handle));
        REQUIRE(xlstm_get_state(runner.handle, bytes.data(), bytes.size()) == XLSTM_USAGE);
        const int32_t row = 0;
        REQUIRE(xlstm_reset_rows(runner.handle, &row, 1) == XLSTM_OK && step(runner) == XLSTM_USAGE);
        REQUIRE(xlstm_reset(runner.handle) == XLSTM_OK);
        Oracle oracle(1);
        run_both(runner, oracle, 1, 7, 1);
    }
}

void failure_in_a_prefill() {
    Runner runner({"longest=4 fail_run=3"}), other;
    const std::vector<int64_t> given = tokens(1, 12, 1);
    std::vector<float> logits(12 * model::kLogits);
    const void *inputs[] = {given.data()};
    void *outputs[] = {logits.data(), nullptr};
    REQUIRE(xlstm_prefill(runner.handle, 12, inputs, outputs) == XLSTM_ENVIRONMENT);
    Oracle oracle(1), half(1);
    // What had run is complete: nothing writes into the caller's memory later.
    const std::vector<float> whole = oracle.run(given, 12);
    REQUIRE(std::vector<float>(logits.begin(), logits.begin() + 8 * model::kLogits) ==
            std::vector<float>(whole.begin(), whole.begin() + 8 * model::kLogits));
    run_both(other, half, 1, 6, 2);
    std::vector<char> bytes(xlstm_state_bytes(other.handle));
    REQUIRE(xlstm_get_state(other.handle, bytes.data(), bytes.size()) == XLSTM_OK);
    REQUIRE(xlstm_set_state(runner.handle, bytes.data(), bytes.size()) == XLSTM_OK);
    run_both(runner, half, 1, 5, 3);
}

void failure_of_a_new_state() {
    Runner runner({"longest=4 fail_wait=3"});
    Oracle oracle(1);
    run_both(runner, oracle, 1, 5, 1);
    std::vector<char> bytes(xlstm_state_bytes(runner.handle));
    REQUIRE(xlstm_get_state(runner.handle, bytes.data(), bytes.size()) == XLSTM_OK);
    REQUIRE(xlstm_set_state(runner.handle, bytes.data(), bytes.size()) == XLSTM_ENVIRONMENT);
    run_both(runner, oracle, 1, 2, 2);  // the old one is still there
}

void threads() {
    std::vector<std::thread> all;
    Runner quiet;
    REQUIRE(xlstm_step(nullptr, nullptr, nullptr) == XLSTM_USAGE && error_has("runner is null"));
    for (int64_t i = 0; i < 4; ++i) {
        all.emplace_back([i, runner = std::make_shared<Runner>(Settings{})] {
            Oracle oracle(1);
            for (int64_t length = 1; length < 40; ++length) {
                run_both(*runner, oracle, 1, length, i);
                const int32_t row = static_cast<int32_t>(100 + i);
                REQUIRE(xlstm_reset_rows(runner->handle, &row, 1) == XLSTM_USAGE);
                REQUIRE(error_has(std::to_string(100 + i).c_str()));
            }
        });
    }
    for (std::thread &thread : all) thread.join();
    REQUIRE(error_has("runner is null"));  // the text is this thread's
}

}  // namespace

const std::vector<Check> kEngineChecks = {
    {"failures", failures},
    {"failure_in_a_prefill", failure_in_a_prefill},
    {"failure_of_a_new_state", failure_of_a_new_state},
    {"threads", threads},
};

}  // namespace checks
