// Runs the checks on the engine that the program is linked with. Argument: a folder to write into. Prints
// "name: ok" for each check that passes; the first one that fails ends the program.
#include "checks.h"

#include <cstdio>
#include <cstring>
#include <fstream>

namespace checks {
namespace {

std::string folder;

xlstm_status open_runner(const Settings &settings, xlstm_runner **runner) {
    const std::string engine = write("engine", settings.engine);
    xlstm_options options{};
    options.size = sizeof options;
    options.batch = settings.batch;
    options.engine = engine.c_str();
    options.plugin = settings.plugin;
    options.model_hash = settings.model_hash;
    options.piece = settings.piece;
    options.device = settings.device;
    options.no_graph = settings.graph ? 0 : 1;
    return xlstm_open(&options, runner);
}

}  // namespace

std::string write(const std::string &name, const std::string &text) {
    const std::string path = folder + "/" + name;
    std::ofstream file(path, std::ios::binary | std::ios::trunc);
    file << text;
    REQUIRE(file.good());
    return path;
}

Runner::Runner(const Settings &settings) {
    const xlstm_status status = open_runner(settings, &handle);
    if (status != XLSTM_OK) std::fprintf(stderr, "%d %s\n", status, xlstm_error());
    REQUIRE(status == XLSTM_OK && handle != nullptr);
}

xlstm_status open_fails(const Settings &settings) {
    xlstm_runner *runner = nullptr;
    const xlstm_status status = open_runner(settings, &runner);
    REQUIRE(status != XLSTM_OK && runner == nullptr);
    return status;
}

bool error_has(const char *words) {
    const bool has = std::strstr(xlstm_error(), words) != nullptr;
    if (!has) std::fprintf(stderr, "error without \"%s\": %s\n", words, xlstm_error());
    return has;
}

std::vector<float> Oracle::run(const std::vector<int64_t> &given, int64_t length) {
    std::vector<float> logits;
    for (int64_t row = 0; row < batch_; ++row) {
        float *memory = &C[row * model::kMemory];
        int64_t *window = &conv[row * model::kConv];
        for (int64_t t = 0; t < length; ++t) {
            const int64_t token = given[row * length + t];
            memory[0] = 0.5f * memory[0] + static_cast<float>(token);
            memory[1] = 0.5f * memory[1] + static_cast<float>(2 * token);
            for (int v = 0; v < model::kLogits; ++v) {
                logits.push_back(static_cast<float>(v) * memory[0] + memory[1] -
                                 static_cast<float>(window[0]));
            }
            window[0] = window[1];
            window[1] = window[2];
            window[2] = token;
        }
        last[row * 2] = memory[0];
        last[row * 2 + 1] = memory[1];
    }
    return logits;
}

std::vector<int64_t> tokens(int64_t batch, int64_t length, int64_t seed) {
    std::vector<int64_t> all;
    for (int64_t i = 0; i < batch * length; ++i) all.push_back((seed * 31 + i * i * 7 + i) % 101);
    return all;
}

void run_both(Runner &runner, Oracle &oracle, int64_t batch, int64_t length, int64_t seed) {
    const std::vector<int64_t> given = tokens(batch, length, seed);
    std::vector<float> logits(batch * length * model::kLogits), last(batch * model::kMemory);
    const void *inputs[] = {given.data()};
    void *outputs[] = {logits.data(), last.data()};
    const xlstm_status status = length == 1 ? xlstm_step(runner.handle, inputs, outputs)
                                            : xlstm_prefill(runner.handle, length, inputs, outputs);
    if (status != XLSTM_OK) std::fprintf(stderr, "%s\n", xlstm_error());
    REQUIRE(status == XLSTM_OK);
    REQUIRE(logits == oracle.run(given, length));
    REQUIRE(last == oracle.last);
}

}  // namespace checks

int main(int count, char **arguments) {
    REQUIRE(count == 2);
    checks::folder = arguments[1];
    for (const std::vector<checks::Check> &list : {checks::kCommonChecks, checks::kEngineChecks}) {
        for (const checks::Check &check : list) {
            check.run();
            std::printf("%s: ok\n", check.name);
            std::fflush(stdout);
        }
    }
    return 0;
}
