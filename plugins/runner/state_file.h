// The bytes of a saved state; README.md describes them.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "io_spec.h"

namespace xlstm::runner {

using ModelHash = std::array<uint8_t, 32>;

// Throws Error(XLSTM_USAGE) if it is neither null nor 64 hexadecimal digits; null gives zeros.
ModelHash parse_hash(const char *text);

class StateFormat {
public:
    StateFormat(const IoSpec &io, int64_t batch, const ModelHash &hash);

    size_t bytes() const { return bytes_; }
    // Where the data of a state lie in what is written here.
    size_t offset(size_t state) const { return entries_[state].offset; }
    // Write all but the data, then, when the data are in place, the checksum.
    void write_frame(uint8_t *buffer) const;
    void seal(uint8_t *buffer) const;
    // Where the data of each state lie in bytes of any origin, which may hold the states in another order.
    // Throws Error(XLSTM_BAD_INPUT) unless they are a whole state of this model and batch.
    std::vector<size_t> find(const uint8_t *buffer, size_t bytes) const;

private:
    size_t next(const uint8_t *buffer, size_t at, size_t end, const std::vector<size_t> &found) const;

    struct Entry {
        std::string head;  // name, type and shape as in the file
        size_t offset, bytes;
    };
    std::string head_;
    std::vector<Entry> entries_;
    std::vector<std::string> texts_;  // of the entries, for messages
    size_t bytes_;
};

uint32_t crc32(const uint8_t *data, size_t bytes);

// Throws Error: XLSTM_BAD_INPUT where there is no such file, XLSTM_ENVIRONMENT where reading fails.
std::string read_file(const std::string &path);

// Throws Error(XLSTM_ENVIRONMENT). After that, or a loss of power, the old file is there, or the new one.
void write_file(const std::string &path, const uint8_t *data, size_t bytes);

}  // namespace xlstm::runner
