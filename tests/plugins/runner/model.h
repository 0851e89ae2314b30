// The model of the runner's tests, small enough to do by hand. Per row and position, for token x:
//
//   C'[j] = C[j] / 2 + (j + 1) x,  conv' = (conv[1], conv[2], x),  logits[v] = v C'[0] + C'[1] − conv[0]
//
// and `last`, an output that can be left away and has no sequence axis, is C' after the last position.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <map>
#include <string>

namespace model {

constexpr int kMemory = 2, kConv = 3, kLogits = 3;

#define REQUIRE(condition)                                                               \
    do {                                                                                 \
        if (!(condition)) {                                                              \
            std::fprintf(stderr, "%s:%d: not so: %s\n", __FILE__, __LINE__, #condition); \
            std::abort();                                                                \
        }                                                                                \
    } while (false)

struct Tensors {
    const int64_t *tokens;
    const float *C;
    const int64_t *conv;
    float *next_C;
    int64_t *next_conv;
    float *logits, *last;

    explicit Tensors(const std::map<std::string, void *> &by_name) {
        const auto at = [&](const char *name) {
            REQUIRE(by_name.count(name) == 1 && by_name.at(name) != nullptr);
            return by_name.at(name);
        };
        REQUIRE(by_name.size() == 6 + by_name.count("last"));
        tokens = static_cast<const int64_t *>(at("tokens"));
        C = static_cast<const float *>(at("past_0_C"));
        conv = static_cast<const int64_t *>(at("past_0_conv"));
        next_C = static_cast<float *>(at("present_0_C"));
        next_conv = static_cast<int64_t *>(at("present_0_conv"));
        logits = static_cast<float *>(at("logits"));
        last = by_name.count("last") == 0 ? nullptr : static_cast<float *>(at("last"));
        REQUIRE(C != next_C && conv != next_conv);
    }
};

inline void run(const Tensors &all, int64_t batch, int64_t length) {
    std::memset(all.next_C, 0xff, sizeof(float) * batch * kMemory);  // NaN, where something is read too late
    for (int64_t row = 0; row < batch; ++row) {
        float C[kMemory];
        int64_t conv[kConv];
        std::memcpy(C, all.C + row * kMemory, sizeof C);
        std::memcpy(conv, all.conv + row * kConv, sizeof conv);
        for (int64_t position = row * length; position < (row + 1) * length; ++position) {
            const int64_t token = all.tokens[position];
            for (int j = 0; j < kMemory; ++j) C[j] = C[j] / 2 + static_cast<float>((j + 1) * token);
            for (int v = 0; v < kLogits; ++v) {
                all.logits[position * kLogits + v] =
                    static_cast<float>(v) * C[0] + C[1] - static_cast<float>(conv[0]);
            }
            std::memmove(conv, conv + 1, sizeof conv - sizeof conv[0]);
            conv[kConv - 1] = token;
        }
        if (all.last != nullptr) std::memcpy(all.last + row * kMemory, C, sizeof C);
        std::memcpy(all.next_C + row * kMemory, C, sizeof C);
        std::memcpy(all.next_conv + row * kConv, conv, sizeof conv);
    }
}

// An engine file of the tests: words such as longest=4.
class Settings {
public:
    explicit Settings(std::istream &file) {
        for (std::string word; file >> word;) {
            const size_t equals = word.find('=');
            REQUIRE(equals != std::string::npos);
            values_[word.substr(0, equals)] = word.substr(equals + 1);
        }
    }
    std::string text(const std::string &name) const {
        const auto found = values_.find(name);
        return found == values_.end() ? "" : found->second;
    }
    int64_t number(const std::string &name, int64_t otherwise) const {
        return values_.count(name) == 0 ? otherwise : std::atoll(values_.at(name).c_str());
    }

private:
    std::map<std::string, std::string> values_;
};

}  // namespace model
