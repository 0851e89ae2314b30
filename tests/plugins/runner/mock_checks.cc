// Checks of how TensorRT and CUDA are called, on the mocks of both.
#include <unistd.h>

#include "checks.h"
#include "mock/mock.h"

namespace checks {
namespace {

int calls(const char *name) { return mock::world().calls[name]; }

// One plain step, then a graph for each of the two directions, then only graphs.
void graphs() {
    mock::world().calls.clear();
    {
        Runner runner;
        Oracle oracle(1);
        for (int64_t i = 0; i < 3; ++i) run_both(runner, oracle, 1, 1, i);
        REQUIRE(calls("capture") == 2 && calls("launch") == 2 && calls("enqueue") == 3);
        for (int64_t i = 0; i < 10; ++i) {
            run_both(runner, oracle, 1, 1, i);
            if (i == 4) run_both(runner, oracle, 1, 4, i);  // an odd number of runs between
            if (i == 7) run_both(runner, oracle, 1, 9, i);
        }
        // 9 positions are pieces of 4, 4 and 1.
        REQUIRE(calls("capture") == 2 && calls("launch") == 13 && calls("enqueue") == 6);
        REQUIRE(calls("context") == 2);
    }
    REQUIRE(mock::world().live == 0);
}

void no_graphs() {
    for (const bool wanted : {false, true}) {
        mock::world().calls.clear();
        Settings settings;
        settings.graph = wanted;
        settings.engine = "longest=4 wrong=capture";  // which is tried once
        Runner runner(settings);
        Oracle oracle(1);
        for (int64_t i = 0; i < 10; ++i) run_both(runner, oracle, 1, 1, i);
        REQUIRE(calls("capture") == (wanted ? 1 : 0) && calls("launch") == 0);
        REQUIRE(cudaGetLastError() == cudaSuccess);  // of the program around the runner
    }
}

void profiles() {
    const struct {
        const char *profiles;
        int64_t longest;              // of a run
        std::vector<int32_t> chosen;  // for a step, for more
    } cases[] = {
        {"1-1x1-4,1-16x1-4", 16, {0, 1}}, {"1-16x1-4,1-1x1-4", 16, {1, 0}},
        {"1-8x2-2", 8, {0, 0}},           {"1-1x1-4", 1, {0}},
        {"2-16x2-2,1-1x1-8", 16, {1, 0}}, {"1-1x2-2,1-32x1-1,1-4x2-8", 4, {0, 2}},
        {"1-4x1-2,1-16x1-2", 16, {0, 1}}, {"1-16x1-2,1-4x1-2,3-32x1-2", 16, {1, 0}},
    };
    for (const auto &one : cases) {
        mock::world() = {};
        Settings settings;
        settings.batch = 2;
        settings.engine = std::string("profiles=") + one.profiles;
        Runner runner(settings);
        REQUIRE(mock::world().profiles == one.chosen);
        Oracle oracle(2);
        for (const int64_t length : {1, 1, 1, 3, 1}) run_both(runner, oracle, 2, length, length);
        const int before = calls("enqueue") + calls("launch") - calls("capture");
        run_both(runner, oracle, 2, 2 * one.longest, 5);
        REQUIRE(calls("enqueue") + calls("launch") - calls("capture") == before + 2);
    }
    REQUIRE(open_fails({"profiles=4-4x1-4,4-16x1-4"}) == XLSTM_BAD_INPUT);
    REQUIRE(error_has("for one position at batch 1: it takes 4 positions at least, and several to a step"));
    REQUIRE(open_fails({"profiles=1-16x2-4"}) == XLSTM_BAD_INPUT && error_has("at batch 1"));
    REQUIRE(!error_has("at least"));
}

void engines_that_do_not_fit() {
    const struct {
        const char *wrong, *words;
        xlstm_status status;
    } cases[] = {
        {"more", "present_1_C comes out and no past_1_C goes in", XLSTM_BAD_INPUT},
        {"less", "past_0_conv goes in and no present_0_conv comes out", XLSTM_BAD_INPUT},
        {"type", "tokens is of a type that no input or output has", XLSTM_BAD_INPUT},
        {"state", "past_0_C, float32 (B, 2) comes out as present_0_C, float16 (B, 2)", XLSTM_BAD_INPUT},
        {"axes",
         "tokens has shape (-1, -1, -1), expected (batch, …) or (batch, length, …): positions on a later "
         "axis are not for the runner",
         XLSTM_BAD_INPUT},
        {"location", "not plain memory", XLSTM_BAD_INPUT},
        {"format", "not plain memory", XLSTM_BAD_INPUT},
        {"shape", "logits has shape (1, 1, 4) for one position and (1, 8, 11) for 8", XLSTM_BAD_INPUT},
        {"batch", "logits has shape (2, 1, 3) for one position", XLSTM_BAD_INPUT},
        {"context", "no execution context", XLSTM_ENVIRONMENT},
    };
    for (const auto &one : cases) {
        REQUIRE(open_fails({std::string("wrong=") + one.wrong}) == one.status && error_has(one.words));
    }
    REQUIRE(open_fails({"garbage"}) == XLSTM_BAD_INPUT &&
            error_has("in TensorRT 10.3.0: magic tag does not match"));
    REQUIRE(!error_has("not an error"));
    REQUIRE(open_fails({""}) == XLSTM_BAD_INPUT && error_has("empty"));
    REQUIRE(mock::world().live == 0);
}

// TensorRT need not know that a size does not change, nor, in an engine for single steps, that one would.
void sizes_that_the_engine_does_not_know() {
    for (const char *engine : {"wrong=unknown", "longest=1", "longest=1 wrong=unknown"}) {
        Runner runner({engine});
        xlstm_tensor tensor;
        REQUIRE(xlstm_describe(runner.handle, XLSTM_OUTPUT, 0, &tensor) == XLSTM_OK && tensor.rank == 3);
        REQUIRE(tensor.dims[1] == XLSTM_SEQUENCE && tensor.dims[2] == model::kLogits);
        REQUIRE(xlstm_describe(runner.handle, XLSTM_OUTPUT, 1, &tensor) == XLSTM_OK);
        REQUIRE(tensor.rank == 2 && tensor.dims[1] == model::kMemory);
        Oracle oracle(1);
        for (const int64_t length : {1, 5, 1}) run_both(runner, oracle, 1, length, length);
    }
}

void plugin_libraries() {
    const std::string library = write("plugin.so", "x");
    Settings settings;
    settings.plugin = library.c_str();
    Runner runner(settings);
    REQUIRE(chdir(library.substr(0, library.rfind('/')).c_str()) == 0);
    settings.plugin = "plugin.so";
    Runner here(settings);
    settings.plugin = "/missing.so";
    REQUIRE(open_fails(settings) == XLSTM_ENVIRONMENT && error_has("/missing.so: cannot open the library"));
}

void environments() {
    mock::World &world = mock::world();
    world.devices = 0;
    REQUIRE(open_fails({}) == XLSTM_ENVIRONMENT && error_has("no GPU: no device"));
    world.devices = 2;
    Settings settings;
    settings.device = 2;
    REQUIRE(open_fails(settings) == XLSTM_ENVIRONMENT && error_has("no GPU 2, there are 2"));
    world.version = 110100;
    REQUIRE(open_fails({}) == XLSTM_ENVIRONMENT && error_has("compiled for TensorRT 10, loaded is 11.1.0"));
    world.version = 0;
    world.memory = 150;  // for some of the buffers
    REQUIRE(open_fails({}) == XLSTM_ENVIRONMENT && error_has("no memory on the GPU: memory"));
    REQUIRE(world.live == 0 && world.memory == 150);
    world.memory = 1 << 30;
    world.devices = 1;
}

void a_run_that_fails() {
    Runner runner({"longest=4 wrong=run"});
    const int64_t token = 1;
    const void *inputs[] = {&token};
    REQUIRE(xlstm_step(runner.handle, inputs, nullptr) == XLSTM_ENVIRONMENT);
    REQUIRE(error_has("TensorRT did not run the engine: the plugin failed"));
}

void a_large_batch() {
    Settings settings;
    settings.batch = 8;
    settings.engine = "longest=64";
    Runner runner(settings);
    Oracle oracle(8);
    for (const int64_t length : {64, 1, 65, 200, 1, 1}) run_both(runner, oracle, 8, length, length);
    mock::world().calls.clear();
    settings.piece = 2;
    Runner pieces(settings);
    Oracle other(8);
    run_both(pieces, other, 8, 64, 1);
    REQUIRE(calls("enqueue") == 32);
    settings.batch = 9;
    REQUIRE(open_fails(settings) == XLSTM_BAD_INPUT && error_has("batch 9"));
}

}  // namespace

const std::vector<Check> kEngineChecks = {
    {"graphs", graphs},
    {"no_graphs", no_graphs},
    {"profiles", profiles},
    {"engines_that_do_not_fit", engines_that_do_not_fit},
    {"sizes_that_the_engine_does_not_know", sizes_that_the_engine_does_not_know},
    {"plugin_libraries", plugin_libraries},
    {"environments", environments},
    {"a_run_that_fails", a_run_that_fails},
    {"a_large_batch", a_large_batch},
};

}  // namespace checks
