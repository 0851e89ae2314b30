// xlstm-run: times decode steps of an engine, or continues token ids; on nothing but the C interface.
#include <algorithm>
#include <charconv>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iostream>
#include <memory>
#include <string>
#include <vector>

#include "xlstm_runner.h"

namespace {

constexpr char kUsage[] =
    "usage: xlstm-run ENGINE [options]\n"
    "\n"
    "Times decode steps, or with --generate continues the token ids on stdin and writes new ones to stdout.\n"
    "\n"
    "  --plugin LIB       library of the operators, libxlstm_trt.so\n"
    "  --batch N          streams (1)\n"
    "  --piece N          longest piece of a prefill (the engine's longest)\n"
    "  --device N         number of the GPU (0)\n"
    "  --no-graph         steps without a CUDA graph\n"
    "  --model-hash HEX   64 digits that name the model in saved states\n"
    "  --load-state FILE  start from a saved state\n"
    "  --save-state FILE  save the state at the end\n"
    "  --steps N          steps to time (1000)\n"
    "  --warmup N         steps before those (50)\n"
    "  --json             times as JSON\n"
    "  --generate N       greedy continuation by N tokens; a model of tokens, batch 1; 0: run the prompt\n"
    "\n"
    "An io.json after ENGINE, which earlier versions needed, is accepted and not read.\n"
    "\n"
    "Exit codes: 0 done, 2 usage, 3 environment, 4 bad input.\n";

struct Failure {
    int code;
    std::string text;
};

struct Arguments {
    std::string engine, plugin, model_hash, load_state, save_state;
    int64_t batch = 1, piece = 0, device = 0, steps = 1000, warmup = 50, generate = -1;
    bool no_graph = false, json = false;
};

struct Closer {
    void operator()(xlstm_runner *runner) const { xlstm_close(runner); }
};
using Runner = std::unique_ptr<xlstm_runner, Closer>;

void check(xlstm_status status) {
    if (status != XLSTM_OK) throw Failure{status, xlstm_error()};
}

int64_t parse_number(const std::string &what, const std::string &text, int64_t most) {
    int64_t value = 0;
    const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
    if (error != std::errc() || end != text.data() + text.size() || value < 0 || value > most) {
        throw Failure{XLSTM_USAGE, what + " is \"" + text + "\", expected 0 … " + std::to_string(most)};
    }
    return value;
}

Arguments parse_arguments(const std::vector<std::string> &words) {
    Arguments all;
    const std::pair<const char *, std::string *> texts[] = {
        {"--plugin", &all.plugin},
        {"--model-hash", &all.model_hash},
        {"--load-state", &all.load_state},
        {"--save-state", &all.save_state},
    };
    const std::pair<const char *, int64_t *> numbers[] = {
        {"--batch", &all.batch}, {"--piece", &all.piece},   {"--device", &all.device},
        {"--steps", &all.steps}, {"--warmup", &all.warmup}, {"--generate", &all.generate},
    };
    const std::pair<const char *, bool *> flags[] = {{"--no-graph", &all.no_graph}, {"--json", &all.json}};
    std::vector<std::string> files;
    for (size_t i = 0; i < words.size(); ++i) {
        const std::string &word = words[i];
        bool known = word.rfind("-", 0) != 0;
        if (known) files.push_back(word);
        for (const auto &[name, flag] : flags) {
            if (word == name) known = *flag = true;
        }
        const auto value = [&]() -> const std::string & {
            if (i + 1 == words.size()) throw Failure{XLSTM_USAGE, word + " needs a value"};
            known = true;
            return words[++i];
        };
        for (const auto &[name, text] : texts) {
            if (!known && word == name) *text = value();
        }
        for (const auto &[name, number] : numbers) {
            if (!known && word == name) *number = parse_number(name, value(), 1'000'000'000);
        }
        if (!known) throw Failure{XLSTM_USAGE, "unknown option " + word};
    }
    if (files.empty() || files.size() > 2) throw Failure{XLSTM_USAGE, "expected an engine"};
    all.engine = files[0];
    if (all.generate >= 0 && all.batch != 1) throw Failure{XLSTM_USAGE, "--generate takes one stream"};
    if (all.steps < 1) throw Failure{XLSTM_USAGE, "--steps is 0, at least 1"};
    return all;
}

const char *given_or_null(const std::string &text) { return text.empty() ? nullptr : text.c_str(); }

Runner open_runner(const Arguments &arguments) {
    xlstm_options options{};
    options.size = sizeof options;
    options.batch = static_cast<int32_t>(arguments.batch);
    options.engine = arguments.engine.c_str();
    options.plugin = given_or_null(arguments.plugin);
    options.model_hash = given_or_null(arguments.model_hash);
    options.piece = arguments.piece;
    options.device = static_cast<int32_t>(arguments.device);
    options.no_graph = arguments.no_graph;
    xlstm_runner *runner = nullptr;
    check(xlstm_open(&options, &runner));
    return Runner(runner);
}

xlstm_tensor description(const Runner &runner, xlstm_role role, int32_t index) {
    xlstm_tensor tensor;
    check(xlstm_describe(runner.get(), role, index, &tensor));
    return tensor;
}

size_t bytes_of(int32_t type) {
    if (type == XLSTM_INT64) return 8;
    if (type == XLSTM_FLOAT32 || type == XLSTM_INT32) return 4;
    return type == XLSTM_FLOAT16 || type == XLSTM_BFLOAT16 ? 2 : 1;
}

// Zeros for one position of every tensor of a role.
struct Buffers {
    Buffers(const Runner &runner, xlstm_role role) {
        for (int32_t i = 0; i < xlstm_count(runner.get(), role); ++i) {
            const xlstm_tensor tensor = description(runner, role, i);
            size_t bytes = bytes_of(tensor.type);
            for (int32_t axis = 0; axis < tensor.rank; ++axis) {
                bytes *= static_cast<size_t>(std::max<int64_t>(tensor.dims[axis], 1));
            }
            memory.emplace_back(bytes);
        }
        for (std::vector<char> &buffer : memory) pointers.push_back(buffer.data());
    }
    std::vector<std::vector<char>> memory;
    std::vector<void *> pointers;
};

void time_steps(const Runner &runner, const Arguments &arguments) {
    using Clock = std::chrono::steady_clock;
    const Buffers inputs(runner, XLSTM_INPUT), outputs(runner, XLSTM_OUTPUT);
    std::vector<double> times;  // ms
    const auto step = [&] {
        check(xlstm_step(runner.get(), inputs.pointers.data(), outputs.pointers.data()));
    };
    for (int64_t i = 0; i < arguments.warmup; ++i) step();
    double total = 0;
    for (int64_t i = 0; i < arguments.steps; ++i) {
        const Clock::time_point start = Clock::now();
        step();
        times.push_back(std::chrono::duration<double, std::milli>(Clock::now() - start).count());
        total += times.back();
    }
    std::sort(times.begin(), times.end());
    const auto quantile = [&](double part) {  // nearest rank
        return times[static_cast<size_t>(std::ceil(part * static_cast<double>(times.size()))) - 1];
    };
    const double rate = static_cast<double>(times.size()) / total * 1000;
    std::printf(arguments.json
                    ? "{\"steps\": %zu, \"batch\": %lld, \"steps_per_second\": %.6g, \"p50_ms\": %.6g, "
                      "\"p99_ms\": %.6g, \"p99_9_ms\": %.6g, \"max_ms\": %.6g}\n"
                    : "%zu steps, batch %lld: %.6g steps/s; p50 %.6g ms, p99 %.6g ms, p99.9 %.6g ms, "
                      "max %.6g ms\n",
                times.size(), static_cast<long long>(arguments.batch), rate, quantile(0.5), quantile(0.99),
                quantile(0.999), times.back());
}

float float_at(const char *data, int32_t type, size_t index) {
    uint32_t bits = 0;
    if (type == XLSTM_FLOAT32) {
        std::memcpy(&bits, data + 4 * index, 4);
    } else {
        std::memcpy(&bits, data + 2 * index, 2);
        if (type == XLSTM_FLOAT16) {
            const uint32_t exponent = (bits >> 10) & 31, fraction = bits & 0x3ff;
            const auto mantissa = static_cast<float>(exponent == 0 ? fraction : fraction + 1024);
            float value = std::ldexp(mantissa, static_cast<int>(std::max(exponent, 1u)) - 25);
            if (exponent == 31) value = fraction == 0 ? INFINITY : NAN;
            return (bits & 0x8000) != 0 ? -value : value;
        }
        bits <<= 16;
    }
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

// Index of the largest of `count` values; NaN is never larger.
int64_t largest(const std::vector<char> &logits, int32_t type, int64_t count) {
    int64_t best = 0;
    float value = -INFINITY;
    for (int64_t i = 0; i < count; ++i) {
        const float other = float_at(logits.data(), type, static_cast<size_t>(i));
        if (other > value) {
            value = other;
            best = i;
        }
    }
    return best;
}

void write_token(char *to, int32_t type, int64_t token) {
    const auto narrow = static_cast<int32_t>(token);
    type == XLSTM_INT64 ? std::memcpy(to, &token, 8) : std::memcpy(to, &narrow, 4);
}

void generate(const Runner &runner, int64_t count) {
    const xlstm_tensor in = description(runner, XLSTM_INPUT, 0), out = description(runner, XLSTM_OUTPUT, 0);
    const bool tokens = xlstm_count(runner.get(), XLSTM_INPUT) == 1 && in.rank == 2 &&
                        (in.type == XLSTM_INT64 || in.type == XLSTM_INT32);
    const bool logits = out.type <= XLSTM_BFLOAT16 && (out.rank == 2 || (out.rank == 3 && out.dims[1] <= 1));
    if (!tokens || !logits) throw Failure{XLSTM_USAGE, "--generate needs a model from token ids to logits"};
    const int64_t vocabulary = out.dims[out.rank - 1];
    std::vector<char> prompt;
    const size_t bytes = bytes_of(in.type);
    for (std::string word; std::cin >> word;) {
        prompt.resize(prompt.size() + bytes);
        write_token(&prompt[prompt.size() - bytes], in.type, parse_number("a token", word, vocabulary - 1));
    }
    if (prompt.empty()) throw Failure{XLSTM_USAGE, "no token ids on stdin"};
    // All but the last one without their logits, which would take far more memory than the model's state.
    const auto before = static_cast<int64_t>(prompt.size() / bytes) - (count == 0 ? 0 : 1);
    const void *inputs[] = {prompt.data()};
    if (before > 0) check(xlstm_prefill(runner.get(), before, inputs, nullptr));
    Buffers outputs(runner, XLSTM_OUTPUT);
    inputs[0] = prompt.data() + static_cast<size_t>(before) * bytes;
    char token[8];
    for (int64_t i = 0; i < count; ++i) {
        check(xlstm_step(runner.get(), inputs, outputs.pointers.data()));
        const int64_t next = largest(outputs.memory[0], out.type, vocabulary);
        std::printf("%s%lld", i == 0 ? "" : " ", static_cast<long long>(next));
        std::fflush(stdout);
        write_token(token, in.type, next);
        inputs[0] = token;
    }
    if (count > 0) std::printf("\n");
}

int run(const std::vector<std::string> &words) {
    if (words.empty() || std::count(words.begin(), words.end(), "--help") > 0) {
        std::fputs(kUsage, words.empty() ? stderr : stdout);
        return words.empty() ? XLSTM_USAGE : XLSTM_OK;
    }
    const Arguments arguments = parse_arguments(words);
    const Runner runner = open_runner(arguments);
    if (!arguments.load_state.empty()) check(xlstm_load_state(runner.get(), arguments.load_state.c_str()));
    if (arguments.generate >= 0) {
        generate(runner, arguments.generate);
    } else {
        time_steps(runner, arguments);
    }
    if (!arguments.save_state.empty()) check(xlstm_save_state(runner.get(), arguments.save_state.c_str()));
    return XLSTM_OK;
}

}  // namespace

int main(int count, char **words) {
    try {
        return run({words + 1, words + count});
    } catch (const Failure &failure) {
        std::fprintf(stderr, "xlstm-run: %s\n", failure.text.c_str());
        return failure.code;
    } catch (const std::exception &error) {
        std::fprintf(stderr, "xlstm-run: %s\n", error.what());
        return XLSTM_ENVIRONMENT;
    }
}
