// A strict reader of JSON (RFC 8259), for small files written by tools: duplicate names, more than 64 levels and
// anything after the value are errors.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace xlstm::runner {

struct Json {
    enum Kind { kNull, kBool, kInteger, kReal, kString, kArray, kObject };

    Kind kind = kNull;
    int64_t integer = 0;  // and the truth of kBool
    double real = 0;
    std::string text;  // UTF-8
    std::vector<Json> items;
    std::vector<std::pair<std::string, Json>> members;  // in the file's order

    // The member of that name, or null.
    const Json *find(const std::string &name) const;
};

// Throws Error(XLSTM_BAD_INPUT) with the position of what is wrong.
Json parse_json(const std::string &text);

}  // namespace xlstm::runner
