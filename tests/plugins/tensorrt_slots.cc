// The binary interface of the plugins as numbers: each virtual function is called by its slot, and structures
// are laid out by hand. Nothing of plugins/adapters/tensorrt/interface.h is included, so that a mistake there
// shows here.
#include <cstdint>
#include <cstring>
#include <string>

namespace {

struct RawDims {
    int32_t rank;
    int32_t padding;
    int64_t sizes[8];
};
struct RawDesc {
    RawDims dims;
    int32_t type, format;
    float scale;
    int32_t padding;
};
struct RawDynamicDesc {
    RawDesc desc;
    RawDims min, max, opt;
};
struct RawField {
    const char *name;
    const void *data;
    int32_t type, length;
};
struct RawFields {
    int32_t count;
    int32_t padding;
    const RawField *fields;
};
struct RawInfo {
    const char *kind;
    int32_t major, minor;
};
static_assert(sizeof(RawDims) == 72 && sizeof(RawDesc) == 88 && sizeof(RawDynamicDesc) == 304);

template <typename Result, typename... Arguments>
Result call(void *object, int slot, Arguments... arguments) {
    void **slots = *static_cast<void ***>(object);
    return reinterpret_cast<Result (*)(void *, Arguments...)>(slots[slot])(object, arguments...);
}

// An expression of a size: a pointer to slots, and an object with the answers.
struct RawImplementation {
    void **slots;
    bool constant;
    int64_t value;
};
struct RawExpression {
    void **slots;
    RawImplementation *implementation;
};
struct RawExpressions {
    int32_t rank;
    int32_t padding;
    RawExpression *sizes[8];
};
bool is_constant(RawImplementation *self) { return self->constant; }
int64_t constant_value(RawImplementation *self) { return self->value; }

constexpr int kLanguage = 0, kInfo = 1, kDelete = 3;
constexpr float kEps = 0.25F;

RawDesc desc(int32_t type, std::initializer_list<int64_t> sizes) {
    RawDesc made{};
    made.type = type;
    for (const int64_t size : sizes) made.dims.sizes[made.dims.rank++] = size;
    return made;
}

bool is(void *object, const char *kind, int32_t major) {
    const RawInfo info = call<RawInfo>(object, kInfo);
    return std::strcmp(info.kind, kind) == 0 && info.major == major && info.minor == 0 &&
           call<int32_t>(object, kLanguage) == 0;
}

bool same(const char *left, const char *right) { return left != nullptr && std::strcmp(left, right) == 0; }

}  // namespace

#define EXPECT(condition) \
    if (!(condition)) return #condition

// What is not where it belongs in the creator of XlstmMlstm and its plugins, or an empty string.
std::string misplaced_slot(void *creator) {
    EXPECT(is(creator, "PLUGIN CREATOR_V3ONE", 1));
    EXPECT(same(call<const char *>(creator, 6), "XlstmMlstm"));
    EXPECT(same(call<const char *>(creator, 7), "1"));
    EXPECT(same(call<const char *>(creator, 8), "xlstm"));
    const auto *names = call<const RawFields *>(creator, 5);
    EXPECT(names->count == 7 && same(names->fields[1].name, "eps") && names->fields[1].type == 1);

    const RawField field{"eps", &kEps, 1, 1};
    const RawFields fields{1, 0, &field};
    void *plugin = call<void *>(creator, 4, "layer", &fields, int32_t{0});
    EXPECT(plugin != nullptr && is(plugin, "PLUGIN", 1));
    void *copy = call<void *>(plugin, 5);
    EXPECT(copy != nullptr && copy != plugin && is(copy, "PLUGIN", 1));
    call<void>(copy, kDelete);

    void *core = call<void *>(plugin, 4, int32_t{0});
    EXPECT(is(core, "PLUGIN_V3ONE_CORE", 1));
    EXPECT(same(call<const char *>(core, 4), "XlstmMlstm"));
    EXPECT(same(call<const char *>(core, 5), "1"));
    EXPECT(same(call<const char *>(core, 6), "xlstm"));

    const RawDesc tensors[] = {desc(1, {2, 3, 4, 16}),  desc(1, {2, 3, 4, 16}), desc(1, {2, 3, 4, 32}),
                               desc(0, {2, 3, 4}),      desc(0, {2, 3, 4}),     desc(0, {2, 4, 16, 32}),
                               desc(0, {2, 4, 16}),     desc(0, {2, 4}),        desc(1, {2, 3, 4, 32}),
                               desc(0, {2, 4, 16, 32}), desc(0, {2, 4, 16}),    desc(0, {2, 4})};
    RawDynamicDesc dynamic[12]{};
    int32_t types[12];
    for (int i = 0; i < 12; ++i) {
        dynamic[i] = {tensors[i], tensors[i].dims, tensors[i].dims, tensors[i].dims};
        types[i] = tensors[i].type;
    }
    void *build = call<void *>(plugin, 4, int32_t{1});
    EXPECT(is(build, "PLUGIN_V3ONE_BUILD", 2));
    const RawDynamicDesc *outputs = dynamic + 8;
    EXPECT(call<int32_t>(build, 4, &dynamic[0], int32_t{8}, outputs, int32_t{4}) == 0);
    int32_t found[4] = {-1, -1, -1, -1};
    EXPECT(call<int32_t>(build, 5, &found[0], int32_t{4}, &types[0], int32_t{8}) == 0);
    EXPECT(found[0] == 1 && found[1] == 0 && found[2] == 0 && found[3] == 0);
    void *slots[5] = {nullptr, nullptr, reinterpret_cast<void *>(&is_constant),
                      reinterpret_cast<void *>(&constant_value), nullptr};
    RawImplementation implementations[8][4];
    RawExpression expressions[8][4];
    RawExpressions shapes[12]{};
    for (int i = 0; i < 8; ++i) {
        shapes[i].rank = tensors[i].dims.rank;
        for (int j = 0; j < shapes[i].rank; ++j) {
            implementations[i][j] = {slots, j != 1, tensors[i].dims.sizes[j]};
            expressions[i][j] = {nullptr, &implementations[i][j]};
            shapes[i].sizes[j] = &expressions[i][j];
        }
    }
    void *builder[2] = {nullptr, nullptr};  // not needed: every size is one of an input
    EXPECT(call<int32_t>(build, 6, &shapes[0], int32_t{8}, static_cast<RawExpressions *>(nullptr), int32_t{0},
                         &shapes[8], int32_t{4}, &builder[0]) == 0);
    EXPECT(shapes[8].rank == 4 && shapes[8].sizes[1] == shapes[0].sizes[1]);
    EXPECT(shapes[8].sizes[3]->implementation->value == 32);
    EXPECT(shapes[9].rank == 4 && shapes[10].rank == 3 && shapes[11].rank == 2);
    EXPECT(call<bool>(build, 7, int32_t{11}, &dynamic[0], int32_t{8}, int32_t{4}));
    EXPECT(call<int32_t>(build, 8) == 4);
    EXPECT(call<size_t>(build, 9, &dynamic[0], int32_t{8}, outputs, int32_t{4}) == size_t{1} << 20);
    EXPECT(call<int32_t>(build, 10, static_cast<int32_t *>(nullptr), int32_t{0}) == 0);
    EXPECT(call<int32_t>(build, 11) == 0);
    EXPECT(same(call<const char *>(build, 12), "xlstm.XlstmMlstm.1"));
    EXPECT(call<int32_t>(build, 13) >= 9);
    EXPECT(call<const char *>(build, 14) == nullptr);
    EXPECT(call<int32_t>(build, 15, int32_t{1}) == -1);

    void *runtime = call<void *>(plugin, 4, int32_t{2});
    EXPECT(is(runtime, "PLUGIN_V3ONE_RUNTIME", 1));
    EXPECT(call<int32_t>(runtime, 4, int32_t{0}) == 0);
    EXPECT(call<int32_t>(runtime, 5, &tensors[0], int32_t{8}, &tensors[8], int32_t{4}) == 0);
    char memory[13]{};
    const void *addresses[8];
    void *results[4];
    for (int i = 0; i < 8; ++i) addresses[i] = memory + i;
    for (int i = 0; i < 4; ++i) results[i] = memory + 8 + i;
    EXPECT(call<int32_t>(runtime, 6, &tensors[0], &tensors[8], static_cast<const void *const *>(addresses),
                         static_cast<void *const *>(results), static_cast<void *>(memory),
                         static_cast<void *>(nullptr)) == 0);
    void *attached = call<void *>(runtime, 7, static_cast<void *>(nullptr));
    EXPECT(attached != nullptr && attached != plugin && is(attached, "PLUGIN", 1));
    call<void>(attached, kDelete);
    const auto *stored = call<const RawFields *>(runtime, 8);
    EXPECT(stored->count == 6 && same(stored->fields[0].name, "eps") && stored->fields[0].length == 1);
    EXPECT(*static_cast<const float *>(stored->fields[0].data) == kEps);
    call<void>(plugin, kDelete);
    return "";
}
