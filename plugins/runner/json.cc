#include "json.h"

#include <charconv>

#include "error.h"

namespace xlstm::runner {
namespace {

constexpr int kDeepest = 64;

class Parser {
public:
    explicit Parser(const std::string &text)
        : begin_(text.data()), at_(begin_), end_(begin_ + text.size()) {}

    Json whole() {
        Json value = parse_value(0);
        skip_space();
        if (at_ != end_) fail("something after the value");
        return value;
    }

private:
    [[noreturn]] void fail(const std::string &what) const {
        throw Error(XLSTM_BAD_INPUT, "not JSON: " + what + " at byte " + std::to_string(at_ - begin_));
    }

    void skip_space() {
        while (at_ != end_ && (*at_ == ' ' || *at_ == '\t' || *at_ == '\n' || *at_ == '\r')) ++at_;
    }

    bool take(char wanted) {
        if (at_ == end_ || *at_ != wanted) return false;
        ++at_;
        return true;
    }

    void expect(char wanted) {
        if (!take(wanted)) fail(std::string("no ") + wanted);
    }

    // A comma, or the end of an array or object.
    bool another(char closing) {
        skip_space();
        if (take(closing)) return false;
        expect(',');
        return true;
    }

    Json parse_value(int depth) {
        if (depth > kDeepest) fail("too many levels");
        skip_space();
        if (at_ == end_) fail("the end");
        if (*at_ == '{') return parse_object(depth);
        if (*at_ == '[') return parse_array(depth);
        Json value;
        if (*at_ == '"') {
            value.kind = Json::kString;
            value.text = parse_string();
        } else if (take_word("true")) {
            value.kind = Json::kBool;
            value.integer = 1;
        } else if (take_word("false")) {
            value.kind = Json::kBool;
        } else if (!take_word("null")) {
            return parse_number();
        }
        return value;
    }

    bool take_word(const char *word) {
        const char *next = at_;
        while (*word != '\0') {
            if (next == end_ || *next++ != *word++) return false;
        }
        at_ = next;
        return true;
    }

    Json parse_object(int depth) {
        Json value;
        value.kind = Json::kObject;
        expect('{');
        skip_space();
        if (take('}')) return value;
        do {
            skip_space();
            std::string name = parse_string();
            if (value.find(name) != nullptr) fail("a second \"" + name + "\"");
            skip_space();
            expect(':');
            value.members.emplace_back(std::move(name), parse_value(depth + 1));
        } while (another('}'));
        return value;
    }

    Json parse_array(int depth) {
        Json value;
        value.kind = Json::kArray;
        expect('[');
        skip_space();
        if (take(']')) return value;
        do {
            value.items.push_back(parse_value(depth + 1));
        } while (another(']'));
        return value;
    }

    int count_digits() {
        int count = 0;
        for (; at_ != end_ && *at_ >= '0' && *at_ <= '9'; ++at_) ++count;
        return count;
    }

    Json parse_number() {
        const char *start = at_;
        Json value;
        value.kind = Json::kInteger;
        take('-');
        const char *first = at_;
        const int digits = count_digits();
        if (digits == 0) fail("no value");
        if (digits > 1 && *first == '0') fail("a number that starts with 0");
        if (take('.')) {
            value.kind = Json::kReal;
            if (count_digits() == 0) fail("no digit after the point");
        }
        if (take('e') || take('E')) {
            value.kind = Json::kReal;
            if (!take('+')) take('-');
            if (count_digits() == 0) fail("no digit in the exponent");
        }
        const auto read = value.kind == Json::kInteger ? std::from_chars(start, at_, value.integer)
                                                       : std::from_chars(start, at_, value.real);
        if (read.ec != std::errc()) fail("a number out of range");
        return value;
    }

    std::string parse_string() {
        std::string text;
        expect('"');
        while (!take('"')) {
            if (at_ == end_) fail("a string without an end");
            const char c = *at_++;
            if (static_cast<unsigned char>(c) < 0x20) fail("a control character in a string");
            if (c == '\\') {
                parse_escape(text);
            } else {
                text += c;
            }
        }
        return text;
    }

    void parse_escape(std::string &text) {
        static const std::string kPlain = "\"\\/bfnrt", kMeant = "\"\\/\b\f\n\r\t";
        if (at_ == end_) fail("a string without an end");
        const size_t which = kPlain.find(*at_);
        if (which != std::string::npos) {
            ++at_;
            text += kMeant[which];
        } else if (take('u')) {
            uint32_t code = parse_hex();
            if (code >= 0xd800 && code < 0xdc00 && take('\\') && take('u')) {
                const uint32_t low = parse_hex();
                if (low < 0xdc00 || low > 0xdfff) fail("half of a surrogate pair");
                code = 0x10000 + ((code - 0xd800) << 10) + (low - 0xdc00);
            } else if (code >= 0xd800 && code <= 0xdfff) {
                fail("half of a surrogate pair");
            }
            append_utf8(text, code);
        } else {
            fail("an unknown escape");
        }
    }

    uint32_t parse_hex() {
        uint32_t code = 0;
        if (end_ - at_ < 4 || std::from_chars(at_, at_ + 4, code, 16).ptr != at_ + 4) fail("no 4 hex digits");
        at_ += 4;
        return code;
    }

    static void append_utf8(std::string &text, uint32_t code) {
        const auto tail = [&](int shift) { text += static_cast<char>(0x80 | ((code >> shift) & 0x3f)); };
        if (code < 0x80) {
            text += static_cast<char>(code);
        } else if (code < 0x800) {
            text += static_cast<char>(0xc0 | (code >> 6));
            tail(0);
        } else if (code < 0x10000) {
            text += static_cast<char>(0xe0 | (code >> 12));
            tail(6);
            tail(0);
        } else {
            text += static_cast<char>(0xf0 | (code >> 18));
            tail(12);
            tail(6);
            tail(0);
        }
    }

    const char *begin_, *at_, *end_;
};

}  // namespace

const Json *Json::find(const std::string &name) const {
    for (const auto &member : members) {
        if (member.first == name) return &member.second;
    }
    return nullptr;
}

Json parse_json(const std::string &text) { return Parser(text).whole(); }

}  // namespace xlstm::runner
