// Checks that every engine must pass.
#include <algorithm>
#include <cstdio>
#include <cstring>

#include "checks.h"
#include "error.h"
#include "io_spec.h"
#include "state_file.h"

namespace checks {
namespace {

template <typename Function>
bool refused(Function &&function, xlstm_status status, const char *words) {
    try {
        function();
    } catch (const xlstm::runner::Error &error) {
        const bool meant = error.status == status && std::strstr(error.what(), words) != nullptr;
        if (!meant) std::fprintf(stderr, "another error: %d %s\n", error.status, error.what());
        return meant;
    }
    return false;
}

using xlstm::runner::IoSpec;
using xlstm::runner::kBatch;
using xlstm::runner::kSequence;
using xlstm::runner::make_io;
using xlstm::runner::Tensor;

// The tensors of model.h, in an order of no help.
const std::vector<Tensor> kInputs = {{"past_0_C", XLSTM_FLOAT32, {kBatch, 2}},
                                     {"tokens", XLSTM_INT64, {kBatch, kSequence}},
                                     {"past_12_conv", XLSTM_INT64, {kBatch, 3}}};
const std::vector<Tensor> kOutputs = {{"present_12_conv", XLSTM_INT64, {kBatch, 3}},
                                      {"logits", XLSTM_FLOAT32, {kBatch, kSequence, 3}},
                                      {"present_0_C", XLSTM_FLOAT32, {kBatch, 2}},
                                      {"last", XLSTM_FLOAT32, {kBatch, 2}}};

void states_are_found_by_name() {
    const IoSpec io = make_io(kInputs, kOutputs);
    REQUIRE(io.inputs.size() == 1 && io.outputs.size() == 2 && io.states.size() == 2);
    REQUIRE(xlstm::runner::describe(io.outputs[0]) == "logits, float32 (B, S, 3)");
    REQUIRE(io.outputs[0].is_sequence() && !io.outputs[1].is_sequence());
    REQUIRE(io.states[0].past.name == "past_0_C" && io.states[0].present == "present_0_C");
    REQUIRE(io.states[1].past.row_bytes() == 24 && io.states[1].present == "present_12_conv");
}

// Names that only look like those of states: plain inputs and outputs.
void other_names_are_no_states() {
    for (const char *name : {"past", "past_", "past_0", "past_0_", "past_x_C", "past__C", "past_0x_C",
                             "past_values", "xpast_0_C", "past0_C", "past_-1_C", "Past_0_C"}) {
        std::vector<Tensor> inputs = kInputs, outputs = kOutputs;
        inputs.push_back({name, XLSTM_FLOAT32, {kBatch, kSequence}});
        outputs.push_back({"present" + std::string(name), XLSTM_FLOAT32, {kBatch, kSequence}});
        const IoSpec io = make_io(inputs, outputs);
        REQUIRE(io.inputs.size() == 2 && io.outputs.size() == 3 && io.states.size() == 2);
    }
    for (const char *name : {"past_0_a_b", "past_123456789012345678901234567890_C", "past_0__"}) {
        std::vector<Tensor> inputs = kInputs;
        inputs.push_back({name, XLSTM_FLOAT32, {kBatch, 2}});
        REQUIRE(refused([&] { make_io(inputs, kOutputs); }, XLSTM_BAD_INPUT, "goes in and no present_"));
    }
}

void tensors_that_do_not_fit() {
    using Dims = std::vector<int64_t>;
    const struct {
        const char *name;  // of the input or output that is replaced
        Tensor by;
        const char *words;
    } cases[] = {
        {"tokens", {"tokens", XLSTM_INT64, Dims{kSequence, kBatch}}, "first axis is not the batch"},
        {"tokens", {"tokens", XLSTM_INT64, Dims{1, kSequence}}, "tokens, int64 (1, S): its first axis"},
        {"tokens", {"tokens", XLSTM_INT64, Dims{}}, "0 axes"},
        {"tokens", {"tokens", XLSTM_INT64, Dims{kBatch, 1, 1, 1, 1, 1, 1, 1, 1}}, "9 axes"},
        {"logits", {"logits", XLSTM_FLOAT32, Dims{kBatch, kSequence, 0}}, "axis 2"},
        {"logits", {"logits", XLSTM_FLOAT32, Dims{kBatch, 3, kSequence}}, "axis 2"},
        {"logits", {"logits", XLSTM_FLOAT32, Dims{kBatch, kBatch, 3}}, "axis 1"},
        {"logits", {"logits", XLSTM_FLOAT32, Dims{kBatch, kSequence, 9000000000000000000}}, "too large"},
        {"logits", {"logits", XLSTM_FLOAT32, Dims{kBatch, 2097152, 2097152}}, "too large"},
        {"logits", {"last", XLSTM_FLOAT32, Dims{kBatch, 3}}, "two tensors are named last"},
        {"logits", {"tokens", XLSTM_FLOAT32, Dims{kBatch, 3}}, "two tensors are named tokens"},
        {"present_0_C",
         {"present_0_n", XLSTM_FLOAT32, Dims{kBatch, 2}},
         "past_0_C goes in and no present_0_C"},
        {"past_0_C", {"past_0_n", XLSTM_FLOAT32, Dims{kBatch, 2}}, "past_0_n goes in and no present_0_n"},
        {"past_0_C", {"x", XLSTM_FLOAT32, Dims{kBatch, 2}}, "present_0_C comes out and no past_0_C goes in"},
        {"present_0_C", {"present_0_C", XLSTM_FLOAT32, Dims{kBatch, 3}}, "(B, 2) comes out as present_0_C"},
        {"present_0_C", {"present_0_C", XLSTM_FLOAT16, Dims{kBatch, 2}}, "as present_0_C, float16"},
        {"past_0_C", {"past_0_C", XLSTM_FLOAT32, Dims{kBatch, kSequence}}, "has a sequence axis"},
    };
    for (const auto &one : cases) {
        std::vector<Tensor> inputs = kInputs, outputs = kOutputs;
        for (std::vector<Tensor> *list : {&inputs, &outputs}) {
            for (Tensor &tensor : *list) {
                if (tensor.name == one.name) tensor = one.by;
            }
        }
        REQUIRE(refused([&] { make_io(inputs, outputs); }, XLSTM_BAD_INPUT, one.words));
    }
    REQUIRE(refused([] { make_io({}, kOutputs); }, XLSTM_BAD_INPUT, "comes out and no past_12_conv goes in"));
    REQUIRE(refused([] { make_io({}, {kOutputs[1]}); }, XLSTM_BAD_INPUT, "no inputs or no outputs"));
    REQUIRE(refused([] { make_io(kInputs, {kOutputs[0], kOutputs[2]}); }, XLSTM_BAD_INPUT, "no outputs"));
}

void checksum() {
    const char *text = "123456789";  // the check value that every description of this CRC has
    REQUIRE(xlstm::runner::crc32(reinterpret_cast<const uint8_t *>(text), 9) == 0xcbf43926u);
    REQUIRE(xlstm::runner::crc32(nullptr, 0) == 0);
}

// Every length, with pieces of every size, three rows, after what ran before.
void every_length() {
    for (int64_t piece = 0; piece <= 5; ++piece) {
        Settings settings;
        settings.batch = 3;
        settings.piece = piece;
        Runner runner(settings);
        Oracle oracle(3);
        for (const int64_t length : {1, 1, 1, 2, 3, 1, 4, 5, 7, 8, 9, 13, 1, 1}) {
            run_both(runner, oracle, 3, length, length);
        }
    }
}

void steps() {
    Settings settings;
    settings.engine = "longest=1";
    settings.batch = 2;
    Runner runner(settings);
    Oracle oracle(2);
    for (int64_t i = 0; i < 20; ++i) run_both(runner, oracle, 2, 1, i);
    run_both(runner, oracle, 2, 6, 99);  // a prefill of single steps
}

void rows_start_afresh() {
    Settings settings;
    settings.batch = 4;
    Runner runner(settings);
    Oracle oracle(4);
    const auto reset = [&](std::vector<int32_t> rows) {
        REQUIRE(xlstm_reset_rows(runner.handle, rows.data(), static_cast<int32_t>(rows.size())) == XLSTM_OK);
        for (const int32_t row : rows) {
            for (int i = 0; i < model::kMemory; ++i) oracle.C[row * model::kMemory + i] = 0;
            for (int i = 0; i < model::kConv; ++i) oracle.conv[row * model::kConv + i] = 0;
        }
    };
    for (const int64_t length : {5, 1, 1, 3}) {
        run_both(runner, oracle, 4, length, length);
        reset({2});
        run_both(runner, oracle, 4, length, length + 1);
        reset({0, 3});
        run_both(runner, oracle, 4, 1, 7);
        reset({});
    }
    REQUIRE(xlstm_reset(runner.handle) == XLSTM_OK);
    Oracle fresh(4);
    run_both(runner, fresh, 4, 5, 1);
    const int32_t outside[] = {1, 4}, negative[] = {-1};
    REQUIRE(xlstm_reset_rows(runner.handle, outside, 2) == XLSTM_USAGE &&
            error_has("no row 4 in a batch of 4"));
    REQUIRE(xlstm_reset_rows(runner.handle, negative, 1) == XLSTM_USAGE);
    run_both(runner, fresh, 4, 1, 2);  // row 1 was not reset either
}

std::vector<uint8_t> state_of(Runner &runner) {
    std::vector<uint8_t> bytes(xlstm_state_bytes(runner.handle));
    REQUIRE(xlstm_get_state(runner.handle, bytes.data(), bytes.size()) == XLSTM_OK);
    return bytes;
}

xlstm_status set_state(Runner &runner, const std::vector<uint8_t> &bytes) {
    return xlstm_set_state(runner.handle, bytes.data(), bytes.size());
}

void states_resume() {
    Settings settings;
    settings.batch = 2;
    Runner first(settings), second(settings);
    Oracle oracle(2);
    for (int64_t i = 0; i < 5; ++i) {
        run_both(first, oracle, 2, 2 * i + 1, i);
        const std::vector<uint8_t> saved = state_of(first);
        Oracle later = oracle;
        run_both(first, oracle, 2, 4, i);
        REQUIRE(set_state(second, saved) == XLSTM_OK && state_of(second) == saved);
        run_both(second, later, 2, 4, i);
        REQUIRE(state_of(first) == state_of(second));
    }
    const std::string path = write("stream.state", "old");
    REQUIRE(xlstm_save_state(first.handle, path.c_str()) == XLSTM_OK);
    REQUIRE(xlstm_reset(second.handle) == XLSTM_OK);
    REQUIRE(xlstm_load_state(second.handle, path.c_str()) == XLSTM_OK);
    run_both(second, oracle, 2, 3, 1);
    REQUIRE(xlstm_save_state(first.handle, (path + "/no/folder").c_str()) == XLSTM_ENVIRONMENT);
    REQUIRE(xlstm_load_state(first.handle, (write("a.state", "") + ".missing").c_str()) == XLSTM_BAD_INPUT);
}

void damaged_states() {
    Runner runner;
    Oracle oracle(1);
    run_both(runner, oracle, 1, 5, 1);
    const std::vector<uint8_t> saved = state_of(runner);
    run_both(runner, oracle, 1, 1, 2);
    for (size_t i = 0; i < saved.size(); ++i) {
        for (const uint8_t bit : {1, 128}) {
            std::vector<uint8_t> bytes = saved;
            bytes[i] ^= bit;
            REQUIRE(set_state(runner, bytes) == XLSTM_BAD_INPUT);
        }
        REQUIRE(xlstm_set_state(runner.handle, saved.data(), i) == XLSTM_BAD_INPUT);
    }
    std::vector<uint8_t> longer = saved;
    longer.push_back(0);
    REQUIRE(set_state(runner, longer) == XLSTM_BAD_INPUT);
    run_both(runner, oracle, 1, 2, 3);  // the state is as it was
}

// Whole files of something else: the checksum is right.
void states_of_others() {
    const std::string zeros(64, '0'), digits = "0123456789abcdefABCDEF" + std::string(42, '7');
    Settings settings;
    Runner runner(settings);
    settings.model_hash = zeros.c_str();
    Runner same(settings);
    REQUIRE(set_state(runner, state_of(same)) == XLSTM_OK);
    settings.model_hash = digits.c_str();
    Runner other(settings);
    REQUIRE(set_state(runner, state_of(other)) == XLSTM_BAD_INPUT && error_has("another model"));
    settings.batch = 2;
    Runner wider(settings);
    REQUIRE(set_state(other, state_of(wider)) == XLSTM_BAD_INPUT && error_has("past_0_C, float32 (B, 2)"));
    REQUIRE(set_state(wider, state_of(other)) == XLSTM_BAD_INPUT);

    std::vector<uint8_t> bytes = state_of(runner);
    const auto seal = [&] {
        const uint32_t sum = xlstm::runner::crc32(bytes.data(), bytes.size() - 4);
        std::memcpy(bytes.data() + bytes.size() - 4, &sum, 4);
    };
    const struct {
        size_t offset;
        uint8_t value;
        const char *words;
    } cases[] = {
        {8, 2, "version 2"}, {12, 1, "number of states"}, {52, 'q', "past_0_C"}, {60, 2, "past_0_C"}};
    for (const auto &one : cases) {
        bytes = state_of(runner);
        bytes[one.offset] = one.value;
        seal();
        REQUIRE(set_state(runner, bytes) == XLSTM_BAD_INPUT && error_has(one.words));
    }
    const std::vector<uint8_t> whole = state_of(runner);
    for (size_t size = 52; size < whole.size() + 20; size += 4) {  // cut or longer, and sealed again
        if (size == whole.size()) continue;
        bytes = std::vector<uint8_t>(size);  // of that capacity, for AddressSanitizer
        std::copy_n(whole.begin(), std::min(size, whole.size()), bytes.begin());
        seal();
        REQUIRE(set_state(runner, bytes) == XLSTM_BAD_INPUT);
    }
}

// As of an engine whose states come in another order.
void states_in_another_order() {
    Runner first, second;
    Oracle oracle(1);
    run_both(first, oracle, 1, 5, 1);
    const std::vector<uint8_t> saved = state_of(first);
    constexpr size_t kHead = 48, kC = 4 + 8 + 4 + 4 + 2 * 8 + 2 * 4;  // bytes of past_0_C and its description
    std::vector<uint8_t> turned(saved.begin(), saved.begin() + kHead);
    turned.insert(turned.end(), saved.begin() + kHead + kC, saved.end() - 4);
    turned.insert(turned.end(), saved.begin() + kHead, saved.begin() + kHead + kC);
    const auto seal = [&] {
        const uint32_t sum = xlstm::runner::crc32(turned.data(), turned.size());
        turned.insert(turned.end(), reinterpret_cast<const uint8_t *>(&sum),
                      reinterpret_cast<const uint8_t *>(&sum + 1));
    };
    seal();
    REQUIRE(set_state(second, turned) == XLSTM_OK && state_of(second) == saved);
    run_both(second, oracle, 1, 3, 2);
    turned.assign(saved.begin(), saved.begin() + kHead + kC);  // one twice, the other one not
    turned.insert(turned.end(), saved.begin() + kHead, saved.begin() + kHead + kC);
    seal();
    REQUIRE(set_state(second, turned) == XLSTM_BAD_INPUT && error_has("no past_0_conv"));
}

void outputs_not_wanted() {
    Settings settings;
    settings.batch = 2;
    Runner runner(settings);
    Oracle oracle(2);
    const std::vector<int64_t> given = tokens(2, 9, 3);
    const void *inputs[] = {given.data()};
    REQUIRE(xlstm_prefill(runner.handle, 9, inputs, nullptr) == XLSTM_OK);
    oracle.run(given, 9);
    std::vector<float> last(2 * model::kMemory);
    void *outputs[] = {nullptr, last.data()};
    REQUIRE(xlstm_prefill(runner.handle, 9, inputs, outputs) == XLSTM_OK);
    oracle.run(given, 9);
    REQUIRE(last == oracle.last);
    run_both(runner, oracle, 2, 1, 4);
}

void descriptions() {
    Settings settings;
    settings.batch = 3;
    Runner runner(settings);
    REQUIRE(xlstm_version() == XLSTM_RUNNER_VERSION);
    REQUIRE(xlstm_count(runner.handle, XLSTM_INPUT) == 1 && xlstm_count(runner.handle, XLSTM_OUTPUT) == 2);
    REQUIRE(xlstm_count(runner.handle, XLSTM_STATE) == 2);
    xlstm_tensor tensor;
    REQUIRE(xlstm_describe(runner.handle, XLSTM_OUTPUT, 0, &tensor) == XLSTM_OK);
    REQUIRE(std::string(tensor.name) == "logits" && tensor.type == XLSTM_FLOAT32 && tensor.rank == 3);
    REQUIRE(tensor.dims[0] == 3 && tensor.dims[1] == XLSTM_SEQUENCE && tensor.dims[2] == 3);
    REQUIRE(xlstm_describe(runner.handle, XLSTM_STATE, 1, &tensor) == XLSTM_OK);
    REQUIRE(std::string(tensor.name) == "past_0_conv" && tensor.type == XLSTM_INT64 && tensor.dims[1] == 3);
    REQUIRE(xlstm_describe(runner.handle, XLSTM_STATE, 2, &tensor) == XLSTM_USAGE);
    REQUIRE(xlstm_describe(runner.handle, XLSTM_INPUT, -1, &tensor) == XLSTM_USAGE);
    REQUIRE(xlstm_count(runner.handle, static_cast<xlstm_role>(7)) == 0);
}

void wrong_arguments() {
    Runner runner;
    const int64_t token = 1;
    const void *inputs[] = {&token}, *nothing[] = {nullptr};
    REQUIRE(xlstm_prefill(runner.handle, 0, inputs, nullptr) == XLSTM_USAGE && error_has("at least 1"));
    REQUIRE(xlstm_prefill(runner.handle, -5, inputs, nullptr) == XLSTM_USAGE);
    REQUIRE(xlstm_step(runner.handle, nullptr, nullptr) == XLSTM_USAGE && error_has("inputs is null"));
    REQUIRE(xlstm_step(runner.handle, nothing, nullptr) == XLSTM_USAGE && error_has("input tokens"));
    REQUIRE(xlstm_step(nullptr, inputs, nullptr) == XLSTM_USAGE && error_has("runner is null"));
    REQUIRE(xlstm_reset(nullptr) == XLSTM_USAGE);
    const int32_t row = 0;
    REQUIRE(xlstm_reset_rows(runner.handle, &row, -1) == XLSTM_USAGE);
    REQUIRE(xlstm_reset_rows(runner.handle, nullptr, 1) == XLSTM_USAGE && error_has("rows is null"));
    char small[8];
    REQUIRE(xlstm_get_state(runner.handle, small, sizeof small) == XLSTM_USAGE && error_has("a state is"));
    REQUIRE(xlstm_get_state(runner.handle, nullptr, 0) == XLSTM_USAGE);
    REQUIRE(xlstm_set_state(runner.handle, nullptr, 0) == XLSTM_USAGE);
    REQUIRE(xlstm_save_state(runner.handle, nullptr) == XLSTM_USAGE);
    REQUIRE(xlstm_load_state(nullptr, "x") == XLSTM_USAGE);
    REQUIRE(xlstm_describe(runner.handle, XLSTM_INPUT, 0, nullptr) == XLSTM_USAGE);
    REQUIRE(xlstm_state_bytes(nullptr) == 0 && xlstm_count(nullptr, XLSTM_INPUT) == 0);
    REQUIRE(xlstm_open(nullptr, nullptr) == XLSTM_USAGE);
    xlstm_close(nullptr);
    Oracle oracle(1);
    run_both(runner, oracle, 1, 3, 1);  // nothing had run
}

void wrong_options() {
    REQUIRE(open_fails({"longest=4", -1}) == XLSTM_USAGE && error_has("negative"));
    REQUIRE(open_fails({"longest=4", 1, -1}) == XLSTM_USAGE);
    REQUIRE(open_fails({"longest=4", 1, 0, "12"}) == XLSTM_USAGE && error_has("64 hexadecimal digits"));
    const std::string letters(64, 'g');
    REQUIRE(open_fails({"longest=4", 1, 0, letters.c_str()}) == XLSTM_USAGE);
    xlstm_options options{};
    xlstm_runner *runner = reinterpret_cast<xlstm_runner *>(&options);
    REQUIRE(xlstm_open(&options, &runner) == XLSTM_USAGE && runner == nullptr && error_has("options.size"));
    options.size = sizeof options;
    REQUIRE(xlstm_open(&options, &runner) == XLSTM_USAGE && error_has("options.engine is null"));
    options.engine = "/missing";
    REQUIRE(xlstm_open(&options, &runner) == XLSTM_BAD_INPUT && error_has("/missing: "));
    REQUIRE(runner == nullptr);
}

// A caller compiled against version 1, which names an io.json: it is not looked for.
void options_of_version_1() {
    const std::string engine = write("engine", "longest=4");
    xlstm_options options{};
    options.size = sizeof options;
    options.engine = engine.c_str();
    options.io = "/missing/io.json";
    xlstm_runner *runner = nullptr;
    REQUIRE(xlstm_open(&options, &runner) == XLSTM_OK && xlstm_count(runner, XLSTM_STATE) == 2);
    xlstm_close(runner);
}

// A caller compiled against a later interface, whose options are longer.
void longer_options() {
    struct Longer {
        xlstm_options known;
        char more[32];
    } options{};
    std::memset(options.more, 0xff, sizeof options.more);
    const std::string engine = write("engine", "longest=4");
    options.known.size = sizeof options;
    options.known.engine = engine.c_str();
    xlstm_runner *runner = nullptr;
    REQUIRE(xlstm_open(&options.known, &runner) == XLSTM_OK);
    xlstm_close(runner);
}

}  // namespace

const std::vector<Check> kCommonChecks = {
    {"states_are_found_by_name", states_are_found_by_name},
    {"other_names_are_no_states", other_names_are_no_states},
    {"tensors_that_do_not_fit", tensors_that_do_not_fit},
    {"checksum", checksum},
    {"every_length", every_length},
    {"steps", steps},
    {"rows_start_afresh", rows_start_afresh},
    {"states_resume", states_resume},
    {"damaged_states", damaged_states},
    {"states_of_others", states_of_others},
    {"outputs_not_wanted", outputs_not_wanted},
    {"descriptions", descriptions},
    {"wrong_arguments", wrong_arguments},
    {"wrong_options", wrong_options},
    {"options_of_version_1", options_of_version_1},
    {"longer_options", longer_options},
    {"states_in_another_order", states_in_another_order},
};

}  // namespace checks
