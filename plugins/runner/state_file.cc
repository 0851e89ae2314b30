#include "state_file.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <memory>

#include "error.h"

namespace xlstm::runner {
namespace {

constexpr char kMagic[] = "XLSTMST\n";  // 8 bytes
constexpr uint32_t kVersion = 1;
constexpr size_t kVersionAt = 8, kHashAt = 16, kHashBytes = 32, kHeadBytes = 48, kChecksumBytes = 4;

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "saved states are little-endian");

template <typename Integer>
void append(std::string &to, Integer value) {
    to.append(reinterpret_cast<const char *>(&value), sizeof value);
}

[[noreturn]] void refuse(const std::string &what) { throw Error(XLSTM_BAD_INPUT, "saved state: " + what); }

uint32_t read_u32(const uint8_t *from) {
    uint32_t value;
    std::memcpy(&value, from, sizeof value);
    return value;
}

int hex_digit(char c) {
    if (c >= '0' && c <= '9') return c - '0';
    if (c >= 'a' && c <= 'f') return c - 'a' + 10;
    if (c >= 'A' && c <= 'F') return c - 'A' + 10;
    return -1;
}

std::array<uint32_t, 256> crc_table() {
    std::array<uint32_t, 256> table{};
    for (uint32_t byte = 0; byte < 256; ++byte) {
        uint32_t value = byte;
        for (int bit = 0; bit < 8; ++bit) value = (value >> 1) ^ ((value & 1) != 0 ? 0xedb88320u : 0u);
        table[byte] = value;
    }
    return table;
}

// An open temporary file, removed unless it was renamed.
struct Temporary {
    explicit Temporary(const std::string &target)
        : path(target + ".tmp." + std::to_string(getpid())),
          file(open(path.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666)) {}
    ~Temporary() {
        if (file >= 0) close(file);
        if (!path.empty()) unlink(path.c_str());
    }
    std::string path;
    int file;
};

bool write_all(int file, const uint8_t *data, size_t bytes) {
    while (bytes > 0) {
        const ssize_t done = write(file, data, bytes);
        if (done < 0 && errno != EINTR) return false;
        if (done > 0) {
            data += done;
            bytes -= static_cast<size_t>(done);
        }
    }
    return fsync(file) == 0;
}

// So that the new name survives a loss of power too. Not every file system can do it.
void sync_folder(const std::string &path) {
    const size_t slash = path.rfind('/');
    const std::string folder = slash == std::string::npos ? "." : path.substr(0, slash + 1);
    const int file = open(folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (file < 0) return;
    fsync(file);
    close(file);
}

}  // namespace

ModelHash parse_hash(const char *text) {
    ModelHash hash{};
    if (text == nullptr) return hash;
    bool fits = std::strlen(text) == 2 * hash.size();
    for (size_t i = 0; fits && i < hash.size(); ++i) {
        const int high = hex_digit(text[2 * i]), low = hex_digit(text[2 * i + 1]);
        fits = high >= 0 && low >= 0;
        hash[i] = static_cast<uint8_t>(high * 16 + low);
    }
    if (!fits) throw Error(XLSTM_USAGE, "model_hash must be 64 hexadecimal digits");
    return hash;
}

StateFormat::StateFormat(const IoSpec &io, int64_t batch, const ModelHash &hash) {
    head_.append(kMagic, kVersionAt);
    append(head_, kVersion);
    append(head_, static_cast<uint32_t>(io.states.size()));
    head_.append(reinterpret_cast<const char *>(hash.data()), hash.size());
    bytes_ = head_.size();
    for (const State &state : io.states) {
        Entry entry{};
        append(entry.head, static_cast<uint32_t>(state.past.name.size()));
        entry.head += state.past.name;
        append(entry.head, static_cast<uint32_t>(state.past.type));
        append(entry.head, static_cast<uint32_t>(state.past.dims.size()));
        for (const int64_t dim : state.past.dims) append(entry.head, dim == kBatch ? batch : dim);
        entry.offset = bytes_ + entry.head.size();
        entry.bytes = static_cast<size_t>(batch) * state.past.row_bytes();
        bytes_ = entry.offset + entry.bytes;
        texts_.push_back(describe(state.past));
        entries_.push_back(std::move(entry));
    }
    bytes_ += kChecksumBytes;
}

void StateFormat::write_frame(uint8_t *buffer) const {
    std::memcpy(buffer, head_.data(), head_.size());
    for (const Entry &entry : entries_) {
        std::memcpy(buffer + entry.offset - entry.head.size(), entry.head.data(), entry.head.size());
    }
}

void StateFormat::seal(uint8_t *buffer) const {
    const uint32_t sum = crc32(buffer, bytes_ - kChecksumBytes);
    std::memcpy(buffer + bytes_ - kChecksumBytes, &sum, sizeof sum);
}

std::vector<size_t> StateFormat::find(const uint8_t *buffer, size_t bytes) const {
    if (bytes < kHeadBytes + kChecksumBytes) refuse("too short, " + std::to_string(bytes) + " bytes");
    if (std::memcmp(buffer, kMagic, kVersionAt) != 0) refuse("does not start as one");
    if (crc32(buffer, bytes - kChecksumBytes) != read_u32(buffer + bytes - kChecksumBytes)) {
        refuse("damaged: its checksum is not that of its bytes");
    }
    const uint32_t version = read_u32(buffer + kVersionAt);
    if (version != kVersion) refuse("version " + std::to_string(version) + ", this runner reads 1");
    if (std::memcmp(buffer + kHashAt, head_.data() + kHashAt, kHashBytes) != 0) {
        refuse("of another model: its model hash differs");
    }
    if (std::memcmp(buffer, head_.data(), head_.size()) != 0) refuse("has another number of states");
    std::vector<size_t> offsets(entries_.size(), 0);
    size_t at = head_.size();
    for (size_t i = 0; i < entries_.size(); ++i) {
        const size_t which = next(buffer, at, bytes - kChecksumBytes, offsets);
        const Entry &entry = entries_[which];
        offsets[which] = at + entry.head.size();
        at += entry.head.size() + entry.bytes;
    }
    if (bytes != bytes_) {
        refuse(std::to_string(bytes) + " bytes, expected " + std::to_string(bytes_));
    }
    return offsets;
}

// Which of the states that were not found yet lies whole at `at`.
size_t StateFormat::next(const uint8_t *buffer, size_t at, size_t end,
                         const std::vector<size_t> &found) const {
    size_t missing = entries_.size();
    for (size_t i = 0; i < entries_.size(); ++i) {
        if (found[i] != 0) continue;
        const Entry &entry = entries_[i];
        const bool room = end - at >= entry.head.size() + entry.bytes;
        if (room && std::memcmp(buffer + at, entry.head.data(), entry.head.size()) == 0) return i;
        missing = std::min(missing, i);
    }
    refuse("no " + texts_[missing] + " for this batch where one is expected");
}

uint32_t crc32(const uint8_t *data, size_t bytes) {
    static const std::array<uint32_t, 256> kTable = crc_table();
    uint32_t value = 0xffffffffu;
    for (size_t i = 0; i < bytes; ++i) value = (value >> 8) ^ kTable[(value ^ data[i]) & 0xff];
    return ~value;
}

std::string read_file(const std::string &path) {
    const std::unique_ptr<std::FILE, int (*)(std::FILE *)> file(std::fopen(path.c_str(), "rb"), std::fclose);
    if (file == nullptr) throw Error(XLSTM_BAD_INPUT, path + ": " + std::strerror(errno));
    std::string text;
    std::vector<char> block(1 << 20);
    while (const size_t got = std::fread(block.data(), 1, block.size(), file.get())) {
        text.append(block.data(), got);
    }
    if (std::ferror(file.get()) != 0) throw Error(XLSTM_ENVIRONMENT, path + ": " + std::strerror(errno));
    return text;
}

void write_file(const std::string &path, const uint8_t *data, size_t bytes) {
    Temporary temporary(path);
    if (temporary.file < 0 || !write_all(temporary.file, data, bytes) ||
        std::rename(temporary.path.c_str(), path.c_str()) != 0) {
        throw Error(XLSTM_ENVIRONMENT, "cannot write " + path + ": " + std::strerror(errno));
    }
    temporary.path.clear();
    sync_folder(path);
}

}  // namespace xlstm::runner
