// Drives the TensorRT plugin library inside a real TensorRT runtime, as a builder and an engine would.
//   tensorrt_driver RUNTIME PLUGINS load      the plugins through IPluginRegistry::loadLibrary
//   tensorrt_driver RUNTIME PLUGINS register  the library that registers itself, by dlopen
//   tensorrt_driver RUNTIME PLUGINS both SELF_REGISTERING
//   tensorrt_driver RUNTIME PLUGINS logger    only TensorRT's calls of a logger; without a GPU's driver it
//                                             complains, and such a process cannot end as usual
// Prints a line for each check: its name and "ok", or what did not hold.
#include <dlfcn.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "adapters/tensorrt/interface.h"
#include "fake_kernels.h"

std::string misplaced_slot(void *creator);

using namespace nvinfer1;

namespace {

struct Failure : std::runtime_error {
    using std::runtime_error::runtime_error;
};

#define REQUIRE(condition)                                                                     \
    do {                                                                                       \
        if (!(condition)) throw Failure("line " + std::to_string(__LINE__) + ": " #condition); \
    } while (false)

// --- TensorRT, whichever version: by slot, as its registry lost functions in TensorRT 11 -------------------

class Registry {
public:
    explicit Registry(const char *runtime) {
        library_ = dlopen(runtime, RTLD_NOW | RTLD_LOCAL);
        if (library_ == nullptr) throw Failure(dlerror());
        version = reinterpret_cast<int32_t (*)()>(dlsym(library_, "getInferLibVersion"))();
        registry_ = reinterpret_cast<void *(*)()>(dlsym(library_, "getPluginRegistry"))();
    }
    void *load(const char *path) {
        return reinterpret_cast<void *(*)(void *, const char *)>(slot(10, 6))(registry_, path);
    }
    void unload(void *library) {
        reinterpret_cast<void (*)(void *, void *)>(slot(11, 7))(registry_, library);
    }
    IPluginCreatorV3One *creator(const char *name, const char *version, const char *space) {
        using Get = IPluginCreatorInterface *(*)(void *, const char *, const char *, const char *);
        return static_cast<IPluginCreatorV3One *>(
            reinterpret_cast<Get>(slot(14, 10))(registry_, name, version, space));
    }
    // Makes it TensorRT's logger, by asking for a runtime.
    void take_logger(void *logger) {
        using Create = void *(*)(void *, int32_t);
        reinterpret_cast<Create>(dlsym(library_, "createInferRuntime_INTERNAL"))(logger, version);
    }
    int32_t version;

private:
    void *slot(int in_10, int in_11) const {
        return (*static_cast<void ***>(registry_))[version < 110000 ? in_10 : in_11];
    }
    void *library_;
    void *registry_;
};

// ILogger and ILoggerFinder, laid out as a version of TensorRT has them.
class Log {
public:
    explicit Log(int32_t version) {
        const bool eleven = version >= 110000;
        if (eleven) {
            for (Face *face : {&logger_, &finder_}) {
                face->slots[0] = reinterpret_cast<void *>(&language);
                face->slots[1] = reinterpret_cast<void *>(&info);
            }
        }
        logger_.slots[eleven ? 4 : 0] = reinterpret_cast<void *>(&take);
        finder_.slots[eleven ? 4 : 0] = reinterpret_cast<void *>(&find);
    }
    Log(const Log &) = delete;
    void *logger() { return &logger_; }
    void *finder() { return &finder_; }
    // What was logged since the last call must contain all parts.
    void require(std::initializer_list<const char *> parts) {
        const std::string seen = std::exchange(messages, "");
        for (const char *part : parts) {
            if (seen.find(part) == std::string::npos) {
                throw Failure("logged \"" + seen + "\", without \"" + part + "\"");
            }
        }
    }
    std::string messages;

private:
    struct Face {
        void **table;
        Log *log;
        void *slots[5] = {};
        explicit Face(Log *owner) : table(slots), log(owner) {}
    };
    static int32_t language(Face *) { return 0; }
    static InterfaceInfo info(Face *face) {
        return {face == &face->log->logger_ ? "ILogger" : "ILoggerFinder", 1, 0};
    }
    static void take(Face *face, int32_t severity, const char *message) {
        if (severity <= 1) face->log->messages += std::string(message) + "\n";
    }
    static void *find(Face *face) { return face->log->logger(); }

    Face logger_{this}, finder_{this};
};

// A size of a network: known, or a symbol.
class Size final : public IDimensionExpr, public apiv::VDimensionExpr {
public:
    explicit Size(int64_t value) : value_(value) { mImpl = this; }
    bool isConstant() const override { return value_ >= 0; }
    int64_t getConstantValue() const override { return value_; }
    bool isSizeTensor() const override { return false; }

private:
    int64_t value_;
};

// The plugins need no new expressions; asking for one fails the check.
class Builder final : public IExprBuilder, public apiv::VExprBuilder {
public:
    Builder() { mImpl = this; }
    const IDimensionExpr *constant(int64_t) override { throw Failure("constant"); }
    const IDimensionExpr *operation(DimensionOperation, const IDimensionExpr &,
                                    const IDimensionExpr &) override {
        throw Failure("operation");
    }
    const IDimensionExpr *declareSizeTensor(int32_t, const IDimensionExpr &,
                                            const IDimensionExpr &) override {
        throw Failure("declareSizeTensor");
    }
};

// --- Tensors ----------------------------------------------------------------------------------------------

constexpr DataType f32 = DataType::kFLOAT, f16 = DataType::kHALF, bf16 = DataType::kBF16;
constexpr DataType i8 = DataType::kINT8;

Dims dims(std::initializer_list<int64_t> sizes) {
    Dims made{};
    for (const int64_t size : sizes) made.d[made.nbDims++] = size;
    return made;
}

struct Tensors {
    std::vector<PluginTensorDesc> descs;  // inputs, then outputs
    int32_t inputs;

    void add(DataType type, std::initializer_list<int64_t> sizes) {
        PluginTensorDesc desc{};
        desc.dims = dims(sizes);
        desc.type = type;
        desc.format = TensorFormat::kLINEAR;
        descs.push_back(desc);
    }
    int32_t outputs() const { return static_cast<int32_t>(descs.size()) - inputs; }
    // As in a profile: sizes with axis `axis` and value `from` are dynamic, at most `most`.
    std::vector<DynamicPluginTensorDesc> dynamic(int64_t from = -1, int64_t most = 0) const {
        std::vector<DynamicPluginTensorDesc> made;
        for (const PluginTensorDesc &desc : descs) {
            DynamicPluginTensorDesc one{desc, desc.dims, desc.dims, desc.dims};
            for (int32_t i = 0; i < desc.dims.nbDims; ++i) {
                if (desc.dims.d[i] != from) continue;
                one.desc.dims.d[i] = -1;
                one.min.d[i] = 1;
                one.max.d[i] = most;
            }
            made.push_back(one);
        }
        return made;
    }
};

constexpr int64_t B = 3, S = 7, H = 5, K = 16, V = 32, D = 64;  // all different: a swap shows

Tensors mlstm_tensors(DataType io = f16, DataType state = f32, int64_t length = S) {
    Tensors made{{}, 8};
    for (int i = 0; i < 2; ++i) made.add(io, {B, length, H, K});
    made.add(io, {B, length, H, V});
    for (int i = 0; i < 2; ++i) made.add(f32, {B, length, H});
    made.add(state, {B, H, K, V});
    made.add(f32, {B, H, K});
    made.add(f32, {B, H});
    made.add(io, {B, length, H, V});
    made.add(state, {B, H, K, V});
    made.add(f32, {B, H, K});
    made.add(f32, {B, H});
    return made;
}

Tensors slstm_tensors(DataType io = f16, DataType weight = f16, bool scale = false) {
    Tensors made{{}, scale ? 8 : 7};
    made.add(io, {B, S, 4, H, D});
    made.add(weight, {H, D, 4, D});
    made.add(f32, {4, H, D});
    for (int i = 0; i < 4; ++i) made.add(f32, {B, H, D});
    if (scale) made.add(f32, {H, 4, D});
    made.add(io, {B, S, H, D});
    for (int i = 0; i < 4; ++i) made.add(f32, {B, H, D});
    return made;
}

// --- Plugins ----------------------------------------------------------------------------------------------

struct Instance {
    explicit Instance(IPluginV3 *made) : plugin(made) {
        if (made == nullptr) throw Failure("no plugin");
        using Type = PluginCapabilityType;
        core = static_cast<IPluginV3OneCore *>(made->getCapabilityInterface(Type::kCORE));
        build = static_cast<IPluginV3OneBuildV2 *>(made->getCapabilityInterface(Type::kBUILD));
        run = static_cast<IPluginV3OneRuntime *>(made->getCapabilityInterface(Type::kRUNTIME));
    }
    int32_t configure(const Tensors &tensors) {
        const auto all = tensors.dynamic();
        return build->configurePlugin(all.data(), tensors.inputs, all.data() + tensors.inputs,
                                      tensors.outputs());
    }
    int32_t shapes(const Tensors &tensors) {
        const PluginTensorDesc *all = tensors.descs.data();
        return run->onShapeChange(all, tensors.inputs, all + tensors.inputs, tensors.outputs());
    }
    bool supports(const Tensors &tensors, int32_t position) {
        return build->supportsFormatCombination(position, tensors.dynamic().data(), tensors.inputs,
                                                tensors.outputs());
    }
    bool supports_all(const Tensors &tensors) {
        for (int32_t i = 0; i < tensors.inputs + tensors.outputs(); ++i) {
            if (!supports(tensors, i)) return false;
        }
        return true;
    }

    std::unique_ptr<IPluginV3> plugin;
    IPluginV3OneCore *core;
    IPluginV3OneBuildV2 *build;
    IPluginV3OneRuntime *run;
};

constexpr float scale = 0.125F, eps = 1e-6F, bound = 15.0F;
const PluginField kEpsField{"eps", &eps, PluginFieldType::kFLOAT32, 1};
const PluginField kBoundField{"forget_max", &bound, PluginFieldType::kFLOAT32, 1};

struct Plugins {
    IPluginCreatorV3One *mlstm, *slstm;
    FakeKernels *fake;
    Log *log;

    Instance make(IPluginCreatorV3One *creator, std::vector<PluginField> fields) const {
        const PluginFieldCollection all{static_cast<int32_t>(fields.size()), fields.data()};
        return Instance(creator->createPlugin("layer", &all, TensorRTPhase::kBUILD));
    }
    Instance make_mlstm(int32_t aliased = 0) const {
        return make(mlstm, {{"scale", &scale, PluginFieldType::kFLOAT32, 1},
                            {"eps", &eps, PluginFieldType::kFLOAT32, 1},
                            {"aliased", &aliased, PluginFieldType::kINT32, 1}});
    }
    Instance make_slstm(int32_t aliased = 0) const {
        return make(slstm, {{"forget_max", &bound, PluginFieldType::kFLOAT32, 1},
                            {"aliased", &aliased, PluginFieldType::kINT32, 1}});
    }
    void refused(IPluginCreatorV3One *creator, const PluginFieldCollection *fields,
                 std::initializer_list<const char *> parts) const {
        REQUIRE(creator->createPlugin("blocks.0", fields, TensorRTPhase::kBUILD) == nullptr);
        log->require(parts);
    }
    void refused(IPluginCreatorV3One *creator, std::vector<PluginField> fields,
                 std::initializer_list<const char *> parts) const {
        const PluginFieldCollection all{static_cast<int32_t>(fields.size()), fields.data()};
        refused(creator, &all, parts);
    }
};

// --- Checks -----------------------------------------------------------------------------------------------

void identity(const Plugins &plugins) {
    for (IPluginCreatorV3One *creator : {plugins.mlstm, plugins.slstm}) {
        REQUIRE(std::strcmp(creator->getPluginVersion(), "1") == 0);
        REQUIRE(std::strcmp(creator->getPluginNamespace(), "xlstm") == 0);
        REQUIRE(std::strcmp(creator->getInterfaceInfo().kind, "PLUGIN CREATOR_V3ONE") == 0);
    }
    const PluginFieldCollection *names = plugins.mlstm->getFieldNames();
    REQUIRE(names->nbFields == 7 && std::strcmp(names->fields[0].name, "scale") == 0);
    REQUIRE(std::strcmp(names->fields[5].name, "aliased") == 0);
    REQUIRE(std::strcmp(names->fields[6].name, "processors") == 0);
    REQUIRE(names->fields[5].type == PluginFieldType::kINT32 &&
            names->fields[6].type == PluginFieldType::kINT32);
    REQUIRE(std::strcmp(plugins.slstm->getFieldNames()->fields[0].name, "forget_max") == 0);
    Instance made = plugins.make_slstm();
    REQUIRE(std::strcmp(made.core->getPluginName(), "XlstmSlstm") == 0);
    REQUIRE(std::strcmp(made.core->getPluginVersion(), "1") == 0);
    REQUIRE(std::strcmp(made.core->getPluginNamespace(), "xlstm") == 0);
    REQUIRE(made.plugin->getCapabilityInterface(static_cast<PluginCapabilityType>(3)) == nullptr);
    REQUIRE(made.build->getNbOutputs() == 5 && made.build->getTimingCacheID() != nullptr);
    REQUIRE(made.build->getNbTactics() == 0 && made.run->setTactic(0) == 0);
    REQUIRE(std::strcmp(made.build->getTimingCacheID(), plugins.make_mlstm().build->getTimingCacheID()) != 0);
}

void bad_fields(const Plugins &plugins) {
    constexpr auto fp32 = PluginFieldType::kFLOAT32;
    const PluginField good{"eps", &eps, fp32, 1};
    const float nan = NAN, negative = -1, infinite = INFINITY, least = -INFINITY;
    const double wide = 0.5;
    const int32_t two = 2, one = 1;
    const char *name = "XlstmMlstm \"blocks.0\"";
    plugins.refused(plugins.mlstm, std::vector<PluginField>{}, {name, "eps is missing"});
    plugins.refused(plugins.mlstm, {{"eps", &wide, PluginFieldType::kFLOAT64, 1}}, {name, "eps", "type 2"});
    plugins.refused(plugins.mlstm, {{"eps", &one, PluginFieldType::kINT32, 1}}, {"eps", "type 5"});
    plugins.refused(plugins.mlstm, {{"eps", "1e-6", PluginFieldType::kCHAR, 5}}, {"eps", "type 6"});
    plugins.refused(plugins.mlstm, {{"eps", &eps, fp32, 2}}, {"eps has 2 values"});
    plugins.refused(plugins.mlstm, {{"eps", &eps, fp32, 0}}, {"eps has 0 values"});
    plugins.refused(plugins.mlstm, {{"eps", &eps, fp32, -1}}, {"eps has -1 values"});
    plugins.refused(plugins.mlstm, {{"eps", nullptr, fp32, 1}}, {"eps has no value"});
    plugins.refused(plugins.mlstm, {{"eps", &negative, fp32, 1}}, {"eps is -1"});
    plugins.refused(plugins.mlstm, {good, {"scale", &nan, fp32, 1}}, {"scale is", "finite"});
    plugins.refused(plugins.mlstm, {good, {"scale", &infinite, fp32, 1}}, {"scale is inf"});
    plugins.refused(
        plugins.mlstm, {good, {"forget_max", &eps, fp32, 1}},
        {"no field \"forget_max\"", "scale, eps, forget_exp, input_sigmoid, normalize, aliased, processors"});
    plugins.refused(plugins.mlstm, {good, {"input_sigmoid", &eps, fp32, 1}}, {"input_sigmoid is", "0 or 1"});
    plugins.refused(plugins.slstm, {{"normalizer_min", &bound, fp32, 1}}, {"normalizer_min is 15", "0 to 1"});
    plugins.refused(plugins.mlstm, {good, {nullptr, &eps, fp32, 1}}, {"no field \"\""});
    plugins.refused(plugins.mlstm, {good, {"aliased", &two, PluginFieldType::kINT32, 1}}, {"aliased is 2"});
    plugins.refused(plugins.mlstm, {good, {"aliased", &eps, fp32, 1}}, {"aliased", "type 1"});
    plugins.refused(plugins.slstm, {{"forget_max", &nan, fp32, 1}}, {"XlstmSlstm", "forget_max is"});
    plugins.refused(plugins.slstm, {{"forget_max", &least, fp32, 1}}, {"forget_max is -inf"});
    plugins.refused(plugins.slstm, nullptr, {"no fields"});
    const PluginFieldCollection negative_count{-1, &good}, no_data{1, nullptr};
    plugins.refused(plugins.mlstm, &negative_count, {"no fields"});
    plugins.refused(plugins.mlstm, &no_data, {"no fields"});
    const PluginFieldCollection fine{1, &good};
    Instance unnamed(plugins.mlstm->createPlugin(nullptr, &fine, TensorRTPhase::kRUNTIME));
}

void default_fields(const Plugins &plugins) {
    Instance mlstm = plugins.make(plugins.mlstm, {{"eps", &eps, PluginFieldType::kFLOAT32, 1}});
    REQUIRE(mlstm.shapes(mlstm_tensors()) == 0);
    const xlstm::Mlstm &m = plugins.fake->mlstm;
    REQUIRE(m.scale == 0.25F);  // 16 ^ -0.5
    REQUIRE(m.forget_exp == 0 && m.input_sigmoid == 0 && m.normalize == 1);
    Instance slstm = plugins.make(plugins.slstm, {});
    REQUIRE(slstm.shapes(slstm_tensors()) == 0);
    REQUIRE(plugins.fake->slstm.forget_max == std::numeric_limits<float>::infinity());
    REQUIRE(plugins.fake->slstm.forget_exp == 0 && plugins.fake->slstm.normalizer_min == 0);
    const float infinite = std::numeric_limits<float>::infinity();
    plugins.make(plugins.slstm, {{"forget_max", &infinite, PluginFieldType::kFLOAT32, 1}});
}

// The function of a node, as given and as restored from an engine.
void functions(const Plugins &plugins) {
    constexpr auto fp32 = PluginFieldType::kFLOAT32;
    const float zero = 0, one = 1, half = 0.5F;
    Instance mlstm = plugins.make(plugins.mlstm, {{"eps", &eps, fp32, 1},
                                                  {"forget_exp", &one, fp32, 1},
                                                  {"input_sigmoid", &one, fp32, 1},
                                                  {"normalize", &zero, fp32, 1}});
    Instance slstm =
        plugins.make(plugins.slstm, {{"forget_exp", &one, fp32, 1}, {"normalizer_min", &half, fp32, 1}});
    const auto restored = [](IPluginCreatorV3One *creator, Instance &made) {
        return Instance(
            creator->createPlugin("layer", made.run->getFieldsToSerialize(), TensorRTPhase::kRUNTIME));
    };
    Instance mlstm_again = restored(plugins.mlstm, mlstm), slstm_again = restored(plugins.slstm, slstm);
    for (Instance *made : {&mlstm, &mlstm_again}) {
        plugins.fake->mlstm = {};
        REQUIRE(made->shapes(mlstm_tensors()) == 0);
        const xlstm::Mlstm &m = plugins.fake->mlstm;
        REQUIRE(m.forget_exp == 1 && m.input_sigmoid == 1 && m.normalize == 0);
    }
    for (Instance *made : {&slstm, &slstm_again}) {
        plugins.fake->slstm = {};
        REQUIRE(made->shapes(slstm_tensors()) == 0);
        REQUIRE(plugins.fake->slstm.forget_exp == 1 && plugins.fake->slstm.normalizer_min == half);
    }
}

void copies(const Plugins &plugins) {
    const auto is_same = [&](Instance copy) {
        REQUIRE(copy.shapes(mlstm_tensors()) == 0);
        REQUIRE(plugins.fake->mlstm.scale == scale && plugins.fake->mlstm.eps == eps);
        REQUIRE(copy.build->getAliasedInput(1) == 5);
        plugins.fake->refusal = "not today";
        REQUIRE(copy.shapes(mlstm_tensors()) != 0);
        plugins.fake->refusal = nullptr;
        plugins.log->require({"XlstmMlstm \"layer\": not today"});
    };
    IPluginV3 *copy, *attached, *restored;
    {
        Instance made = plugins.make_mlstm(1);
        copy = made.plugin->clone();
        attached = made.run->attachToContext(nullptr);
        REQUIRE(copy != made.plugin.get() && attached != made.plugin.get() && attached != copy);
        const PluginFieldCollection *stored = made.run->getFieldsToSerialize();
        REQUIRE(stored->nbFields == 7);
        restored = plugins.mlstm->createPlugin("layer", stored, TensorRTPhase::kRUNTIME);
    }  // the copies outlive the original
    is_same(Instance(copy));
    is_same(Instance(attached));
    is_same(Instance(restored));
    Instance bare = plugins.make(plugins.slstm, {});
    Instance again(
        plugins.slstm->createPlugin("layer", bare.run->getFieldsToSerialize(), TensorRTPhase::kRUNTIME));
    REQUIRE(again.shapes(slstm_tensors()) == 0 && std::isinf(plugins.fake->slstm.forget_max));
    // How many inputs enqueue is given, it sees by their types: nothing was configured before.
    Instance quantized(bare.run->attachToContext(nullptr));
    const Tensors tensors = slstm_tensors(f16, i8, true);
    char memory[13]{};
    std::vector<const void *> inputs(8, memory);
    std::vector<void *> outputs(5, memory);
    REQUIRE(quantized.run->enqueue(tensors.descs.data(), tensors.descs.data() + 8, inputs.data(),
                                   outputs.data(), memory, nullptr) == 0);
}

// A Jetson changes the number of its processors with its power mode; an engine keeps the workspace that it was
// built with.
void power_modes(const Plugins &plugins) {
    plugins.fake->processors = 8;
    Instance built = plugins.make_mlstm();
    const PluginFieldCollection *stored = built.run->getFieldsToSerialize();
    plugins.fake->processors = 16;
    Instance restored(plugins.mlstm->createPlugin("layer", stored, TensorRTPhase::kRUNTIME));
    Instance attached(restored.run->attachToContext(nullptr));
    for (const Instance *made : {&built, &restored, &attached}) {
        REQUIRE(made->run->onShapeChange(mlstm_tensors().descs.data(), 8, mlstm_tensors().descs.data() + 8,
                                         4) == 0);
        REQUIRE(plugins.fake->mlstm.processors == 8);
    }
    Instance here = plugins.make_mlstm();
    REQUIRE(here.shapes(mlstm_tensors()) == 0 && plugins.fake->mlstm.processors == 16);
    const int32_t none = 0;
    plugins.refused(
        plugins.mlstm,
        {{"eps", &eps, PluginFieldType::kFLOAT32, 1}, {"processors", &none, PluginFieldType::kINT32, 1}},
        {"processors is 0"});
}

void aliasing(const Plugins &plugins) {
    Instance separate = plugins.make_mlstm(), mlstm = plugins.make_mlstm(1), slstm = plugins.make_slstm(1);
    const int32_t mlstm_past[] = {-1, 5, 6, 7}, slstm_past[] = {-1, 3, 4, 5, 6};
    for (int32_t i = -1; i < 6; ++i) {
        REQUIRE(separate.build->getAliasedInput(i) == -1);
        REQUIRE(mlstm.build->getAliasedInput(i) == (i < 0 || i > 3 ? -1 : mlstm_past[i]));
        REQUIRE(slstm.build->getAliasedInput(i) == (i < 0 || i > 4 ? -1 : slstm_past[i]));
    }
}

void formats(const Plugins &plugins) {
    Instance mlstm = plugins.make_mlstm(), slstm = plugins.make_slstm();
    for (const DataType io : {f32, f16, bf16}) {
        for (const DataType other : {f32, f16, bf16}) {
            REQUIRE(mlstm.supports_all(mlstm_tensors(io, other)));
            REQUIRE(slstm.supports_all(slstm_tensors(io, other)));
        }
        REQUIRE(slstm.supports_all(slstm_tensors(io, i8, true)));
        REQUIRE(!slstm.supports(slstm_tensors(io, i8), 1));         // no scale
        REQUIRE(!slstm.supports(slstm_tensors(io, f16, true), 1));  // a scale of nothing
    }
    // At every position: any other type or format than the tensors before it ask for.
    const auto breaks = [](Instance &made, const Tensors &good, std::vector<int32_t> leaders) {
        for (int32_t position = 0; position < good.inputs + good.outputs(); ++position) {
            for (int32_t type = 0; type < 9; ++type) {
                Tensors tensors = good;
                tensors.descs[position].type = static_cast<DataType>(type);
                const bool leads = std::count(leaders.begin(), leaders.end(), position) == 1;
                const bool is_float = type == 0 || type == 1 || type == 7;
                const bool same = tensors.descs[position].type == good.descs[position].type;
                REQUIRE(made.supports(tensors, position) == (leads ? is_float : same));
            }
            Tensors tensors = good;
            tensors.descs[position].format = TensorFormat::kCHW32;
            REQUIRE(!made.supports(tensors, position));
        }
    };
    breaks(mlstm, mlstm_tensors(f16, bf16), {0, 5});
    breaks(slstm, slstm_tensors(bf16, f16), {0, 1});
    breaks(slstm, slstm_tensors(bf16, i8, true), {0});
    plugins.log->messages.clear();
    REQUIRE(!mlstm.supports(mlstm_tensors(), 12) && !mlstm.supports(mlstm_tensors(), -1));
    plugins.log->require({"no tensor 12", "no tensor -1"});
    REQUIRE(!mlstm.supports(slstm_tensors(), 0));
    plugins.log->require({"XlstmMlstm", "7 inputs, expected 8"});
}

void output_types(const Plugins &plugins) {
    const auto types_of = [](Instance &made, const Tensors &tensors, int32_t outputs, int32_t &status) {
        std::vector<DataType> inputs, found(8, DataType::kINT64);
        for (const PluginTensorDesc &desc : tensors.descs) inputs.push_back(desc.type);
        status = made.build->getOutputDataTypes(found.data(), outputs, inputs.data(), tensors.inputs);
        return found;
    };
    Instance mlstm = plugins.make_mlstm(), slstm = plugins.make_slstm();
    int32_t status;
    std::vector<DataType> found = types_of(mlstm, mlstm_tensors(f16, bf16), 4, status);
    REQUIRE(status == 0 && found[0] == f16 && found[1] == bf16 && found[2] == f32 && found[3] == f32);
    found = types_of(slstm, slstm_tensors(bf16, i8, true), 5, status);
    REQUIRE(status == 0 && found[0] == bf16);
    for (int i = 1; i < 5; ++i) REQUIRE(found[i] == f32);
    types_of(mlstm, mlstm_tensors(i8, f32), 4, status);
    REQUIRE(status != 0);
    plugins.log->require({"q is INT8, expected FP32, FP16 or BF16"});
    types_of(slstm, slstm_tensors(f16, i8), 5, status);
    REQUIRE(status != 0);
    plugins.log->require({"R is INT8", "R_scale"});
    Tensors mixed = mlstm_tensors(f16);
    mixed.descs[2].type = bf16;
    types_of(mlstm, mixed, 4, status);
    REQUIRE(status != 0);
    plugins.log->require({"v is BF16, unlike q"});
    mixed.descs[3].type = static_cast<DataType>(77);
    types_of(mlstm, mixed, 3, status);
    REQUIRE(status != 0);
    plugins.log->require({"3 outputs, expected 4"});
}

struct Symbols {
    std::vector<std::unique_ptr<Size>> owned;
    std::vector<DimsExprs> shapes;

    // A dimension of the given value becomes a symbol.
    Symbols(const Tensors &tensors, std::initializer_list<int64_t> dynamic) {
        for (int32_t i = 0; i < tensors.inputs; ++i) {
            DimsExprs shape{};
            shape.nbDims = tensors.descs[i].dims.nbDims;
            for (int32_t j = 0; j < std::min(shape.nbDims, 8); ++j) {
                const int64_t value = tensors.descs[i].dims.d[j];
                const bool symbol = std::count(dynamic.begin(), dynamic.end(), value) > 0;
                owned.push_back(std::make_unique<Size>(symbol ? -1 : value));
                shape.d[j] = owned.back().get();
            }
            shapes.push_back(shape);
        }
    }
};

void output_shapes(const Plugins &plugins) {
    Builder builder;
    DimsExprs found[5]{};
    const auto ask = [&](Instance &made, Symbols &symbols, int32_t outputs) {
        return made.build->getOutputShapes(symbols.shapes.data(), static_cast<int32_t>(symbols.shapes.size()),
                                           nullptr, 0, found, outputs, builder);
    };
    const auto constants = [](const DimsExprs &shape, std::initializer_list<int64_t> expected) {
        if (shape.nbDims != static_cast<int32_t>(expected.size())) return false;
        int32_t i = 0;
        for (const int64_t size : expected) {
            const IDimensionExpr *expression = shape.d[i++];
            if ((expression->isConstant() ? expression->getConstantValue() : -1) != size) return false;
        }
        return true;
    };
    Instance mlstm = plugins.make_mlstm(), slstm = plugins.make_slstm();
    Symbols dynamic(mlstm_tensors(), {B, S});
    REQUIRE(ask(mlstm, dynamic, 4) == 0);
    REQUIRE(constants(found[0], {-1, -1, H, V}) && constants(found[1], {-1, H, K, V}));
    REQUIRE(constants(found[2], {-1, H, K}) && constants(found[3], {-1, H}));
    REQUIRE(found[0].d[0] == dynamic.shapes[0].d[0] && found[0].d[1] == dynamic.shapes[0].d[1]);
    Symbols constant(slstm_tensors(), {});
    REQUIRE(ask(slstm, constant, 5) == 0);
    REQUIRE(constants(found[0], {B, S, H, D}));
    for (int i = 1; i < 5; ++i) REQUIRE(constants(found[i], {B, H, D}));
    // Where one input knows a size and another does not, the output knows it.
    Tensors partly = mlstm_tensors();
    for (const int i : {0, 1, 2}) partly.descs[i].dims.d[0] = 99;
    Symbols known(partly, {99});
    REQUIRE(ask(mlstm, known, 4) == 0 && constants(found[0], {B, S, H, V}));

    Tensors wrong = mlstm_tensors();
    wrong.descs[1].dims.nbDims = 3;
    Symbols flat(wrong, {});
    REQUIRE(ask(mlstm, flat, 4) != 0);
    plugins.log->require({"XlstmMlstm \"layer\": k has shape (3, 7, 5), expected (B, S, H, K)"});
    wrong = mlstm_tensors();
    wrong.descs[6].dims.d[2] = 17;
    Symbols unequal(wrong, {B, S});
    REQUIRE(ask(mlstm, unequal, 4) != 0);
    plugins.log->require({"n0 has shape (-1, 5, 17)", "K = 16"});
    wrong = slstm_tensors();
    wrong.descs[0].dims.d[2] = 3;
    Symbols gates(wrong, {});
    REQUIRE(ask(slstm, gates, 5) != 0);
    plugins.log->require({"x has shape (3, 7, 3, 5, 64), expected (B, S, 4, H, D)"});
    for (const int32_t rank : {-1, 0, 9, 1 << 30}) {
        Symbols odd(mlstm_tensors(), {});
        odd.shapes[0].nbDims = rank;
        for (const IDimensionExpr *&size : odd.shapes[0].d) size = odd.shapes[1].d[0];
        REQUIRE(ask(mlstm, odd, 4) != 0);
        plugins.log->require({"q has shape"});
    }
    Symbols hole(mlstm_tensors(), {});
    hole.shapes[0].d[1] = nullptr;
    REQUIRE(ask(mlstm, hole, 4) != 0);
    plugins.log->require({"q has no size"});
}

void profiles(const Plugins &plugins) {
    Instance mlstm = plugins.make_mlstm(), slstm = plugins.make_slstm();
    const auto configure = [&](const std::vector<DynamicPluginTensorDesc> &all, size_t &workspace) {
        workspace = mlstm.build->getWorkspaceSize(all.data(), 8, all.data() + 8, 4);
        return mlstm.build->configurePlugin(all.data(), 8, all.data() + 8, 4);
    };
    size_t workspace = 0;
    REQUIRE(configure(mlstm_tensors().dynamic(S, 512), workspace) == 0);
    REQUIRE(plugins.fake->mlstm.length == 512 && plugins.fake->mlstm.batch == B);
    REQUIRE(workspace == size_t{1} << 20);  // at batch 2, length 1
    REQUIRE(configure(mlstm_tensors().dynamic(S, 1 << 16), workspace) == 0);
    REQUIRE(workspace == size_t{256} * B * (1 << 16));
    // Bounds that differ between tensors are no error: the largest counts.
    auto loose = mlstm_tensors().dynamic(B, 4);
    loose[7].max.d[0] = 9;
    REQUIRE(configure(loose, workspace) == 0 && plugins.fake->mlstm.batch == 9);
    REQUIRE(workspace == size_t{1} << 21);  // at batch 7, length 1
    REQUIRE(slstm.configure(slstm_tensors(f32, i8, true)) == 0);
    REQUIRE(plugins.fake->slstm.weight == xlstm::Dtype::i8 && plugins.fake->slstm.dim == D);

    plugins.log->messages.clear();
    plugins.fake->refusal = "Dk is 16, at least 32 is needed";
    REQUIRE(configure(mlstm_tensors().dynamic(S, 512), workspace) != 0 && workspace == 0);
    plugins.fake->refusal = nullptr;
    plugins.log->require({"XlstmMlstm \"layer\": Dk is 16"});
    auto wrong = mlstm_tensors().dynamic();
    wrong[3].desc.dims.d[1] = S + 1;
    REQUIRE(configure(wrong, workspace) != 0);
    plugins.log->require({"i has shape (3, 8, 5), expected (B, S, H) with S = 7"});
    wrong = mlstm_tensors().dynamic();
    wrong[8].desc.type = f32;
    REQUIRE(configure(wrong, workspace) != 0);
    plugins.log->require({"h is FP32, unlike q"});
    wrong = mlstm_tensors().dynamic();
    wrong[9].desc.dims.nbDims = 2;
    REQUIRE(configure(wrong, workspace) != 0);
    plugins.log->require({"C has shape (3, 5)"});
    const auto all = mlstm_tensors().dynamic();
    REQUIRE(mlstm.build->configurePlugin(all.data(), 9, all.data(), 4) != 0);
    REQUIRE(mlstm.build->configurePlugin(all.data(), 0, all.data(), 4) != 0);
    REQUIRE(mlstm.build->getWorkspaceSize(all.data(), 8, all.data(), 5) == 0);
    plugins.log->require({"9 inputs", "0 inputs", "5 outputs"});
}

void shapes(const Plugins &plugins) {
    Instance mlstm = plugins.make_mlstm(), slstm = plugins.make_slstm();
    REQUIRE(mlstm.shapes(mlstm_tensors()) == 0 && slstm.shapes(slstm_tensors()) == 0);
    struct Case {
        int32_t tensor, axis;
        int64_t size;
        const char *message;
    };
    const Case cases[] = {
        {0, 0, -1, "q has shape (-1, 7, 5, 16)"},
        {0, 0, 0, "q has shape (0, 7, 5, 16)"},
        {1, 3, 17, "k has shape (3, 7, 5, 17), expected (B, S, H, K) with K = 16"},
        {2, 1, 8, "v has shape (3, 8, 5, 32)"},
        {5, 2, 1 << 20, "C0 has shape (3, 5, 1048576, 32)"},
        {7, 1, int64_t{1} << 40, "m0 has shape (3, 1099511627776)"},
        {8, 3, 16, "h has shape (3, 7, 5, 16)"},
        {11, 0, 2, "m has shape (2, 5)"},
    };
    for (const Case &one : cases) {
        Tensors wrong = mlstm_tensors();
        wrong.descs[one.tensor].dims.d[one.axis] = one.size;
        REQUIRE(mlstm.shapes(wrong) != 0);
        plugins.log->require({"XlstmMlstm \"layer\"", one.message});
    }
    for (const int32_t rank : {-1, 0, 3, 5, 8, 9, 1 << 30}) {
        Tensors wrong = mlstm_tensors();
        wrong.descs[0].dims.nbDims = rank;
        REQUIRE(mlstm.shapes(wrong) != 0);
        plugins.log->require({"q has shape"});
    }
    Tensors untyped = slstm_tensors();
    untyped.descs[3].type = f16;
    REQUIRE(slstm.shapes(untyped) != 0);
    plugins.log->require({"XlstmSlstm \"layer\": y0 is FP16, expected FP32"});
    Tensors scaled = slstm_tensors(f16, i8, true);
    scaled.descs[7].dims = dims({H, D, 4});
    REQUIRE(slstm.shapes(scaled) != 0);
    plugins.log->require({"R_scale has shape (5, 64, 4), expected (H, 4, D)"});
}

void runs(const Plugins &plugins) {
    char memory[16], scratch, stream;
    void *const context = &stream;
    FakeKernels &fake = *plugins.fake;
    fake.runs = 0;
    std::vector<const void *> in;
    std::vector<void *> out;
    const auto enqueue = [&](Instance &made, const Tensors &tensors, void *workspace) {
        in.clear(), out.clear();
        for (int i = 0; i < tensors.inputs; ++i) in.push_back(memory + i);
        for (int i = 0; i < tensors.outputs(); ++i) out.push_back(memory + tensors.inputs + i);
        return made.run->enqueue(tensors.descs.data(), tensors.descs.data() + tensors.inputs, in.data(),
                                 out.data(), workspace, static_cast<cudaStream_t>(context));
    };
    Instance mlstm = plugins.make_mlstm(), slstm = plugins.make_slstm();
    const Tensors tensors = mlstm_tensors(bf16, f16);
    REQUIRE(mlstm.shapes(tensors) == 0 && enqueue(mlstm, tensors, &scratch) == 0);
    const xlstm::Mlstm &m = fake.mlstm;
    REQUIRE(fake.workspace == &scratch && fake.context == context && fake.runs == 1);
    REQUIRE(m.batch == B && m.length == S && m.heads == H && m.dk == K && m.dv == V);
    REQUIRE(m.io == xlstm::Dtype::bf16 && m.state == xlstm::Dtype::f16 && m.scale == scale && m.eps == eps);
    const void *in_order[] = {m.q, m.k, m.v, m.i, m.f, m.C0, m.n0, m.m0, m.h, m.C, m.n, m.m};
    for (int i = 0; i < 12; ++i) REQUIRE(in_order[i] == memory + i);
    const Tensors one = mlstm_tensors(f32, f32, 1);
    REQUIRE(mlstm.shapes(one) == 0 && enqueue(mlstm, one, &scratch) == 0 && m.length == 1);
    REQUIRE(m.io == xlstm::Dtype::f32);

    const Tensors plain = slstm_tensors(f16, bf16), quantized = slstm_tensors(f32, i8, true);
    REQUIRE(slstm.shapes(plain) == 0 && enqueue(slstm, plain, &scratch) == 0);
    const xlstm::Slstm &s = fake.slstm;
    REQUIRE(s.batch == B && s.length == S && s.heads == H && s.dim == D && s.forget_max == bound);
    REQUIRE(s.io == xlstm::Dtype::f16 && s.weight == xlstm::Dtype::bf16 && s.R_scale == nullptr);
    const void *then[] = {s.x, s.R, s.bias, s.y0, s.c0, s.n0, s.m0, s.y, s.y_n, s.c_n, s.n_n, s.m_n};
    for (int i = 0; i < 12; ++i) REQUIRE(then[i] == memory + i);
    REQUIRE(slstm.shapes(quantized) == 0 && enqueue(slstm, quantized, &scratch) == 0);
    REQUIRE(s.weight == xlstm::Dtype::i8 && static_cast<const void *>(s.R_scale) == memory + 7);
    REQUIRE(s.y == memory + 8 && fake.runs == 4);

    fake.status = 700;
    REQUIRE(enqueue(slstm, quantized, &scratch) != 0);
    fake.status = 0;
    plugins.log->require({"XlstmSlstm \"layer\"", "CUDA error 700", "batch 3", "length 7"});
    const int before = fake.runs;
    fake.refusal = "no";
    REQUIRE(enqueue(slstm, quantized, &scratch) != 0);
    fake.refusal = nullptr;
    REQUIRE(enqueue(slstm, quantized, nullptr) != 0);
    plugins.log->require({"no workspace, where 5376 bytes"});
    in[3] = nullptr;
    const PluginTensorDesc *descs = quantized.descs.data();
    REQUIRE(slstm.run->enqueue(descs, descs + 8, in.data(), out.data(), &scratch, nullptr) != 0);
    plugins.log->require({"y0 has no address"});
    in[3] = memory, out[4] = nullptr;
    REQUIRE(slstm.run->enqueue(descs, descs + 8, in.data(), out.data(), &scratch, nullptr) != 0);
    plugins.log->require({"m_n has no address"});
    REQUIRE(slstm.run->enqueue(nullptr, nullptr, nullptr, nullptr, nullptr, nullptr) != 0);
    plugins.log->require({"without tensors"});
    REQUIRE(fake.runs == before);
}

void slots(const Plugins &plugins) {
    if (const std::string wrong = misplaced_slot(plugins.mlstm); !wrong.empty()) throw Failure(wrong);
}

int failures = 0;

void check(const char *name, const std::function<void()> &body) {
    std::string result = "ok";
    try {
        body();
    } catch (const std::exception &error) {
        result = error.what();
        ++failures;
    }
    std::printf("%s: %s\n", name, result.c_str());
}

void check_plugins(Registry &registry, void *library) {
    Log log(registry.version);
    Plugins plugins{};
    plugins.log = &log;
    check("found", [&] {
        plugins.mlstm = registry.creator("XlstmMlstm", "1", "xlstm");
        plugins.slstm = registry.creator("XlstmSlstm", "1", "xlstm");
        REQUIRE(plugins.mlstm != nullptr && plugins.slstm != nullptr);
        REQUIRE(registry.creator("XlstmMlstm", "3", "xlstm") == nullptr);
        REQUIRE(registry.creator("XlstmMlstm", "1", "other") == nullptr);
    });
    if (plugins.mlstm == nullptr || plugins.slstm == nullptr) return;
    check("versions", [&] {  // an engine finds a plugin again by its name, version and namespace
        for (const char *name : {"XlstmMlstm", "XlstmSlstm"}) {
            IPluginCreatorV3One *creator = registry.creator(name, "2", "xlstm");
            REQUIRE(creator != nullptr && std::strcmp(creator->getPluginVersion(), "2") == 0);
            const PluginFieldCollection fields{
                1, std::strcmp(name, "XlstmMlstm") == 0 ? &kEpsField : &kBoundField};
            Instance made(creator->createPlugin("layer", &fields, TensorRTPhase::kBUILD));
            Instance copy(made.run->attachToContext(nullptr));
            REQUIRE(std::strcmp(made.core->getPluginVersion(), "2") == 0);
            REQUIRE(std::strcmp(copy.core->getPluginVersion(), "2") == 0);
        }
    });
    check("logger", [&] {  // no one gave TensorRT a logger: to stderr, and no crash
        const PluginFieldCollection none{0, nullptr};
        REQUIRE(plugins.mlstm->createPlugin("layer", &none, TensorRTPhase::kBUILD) == nullptr);
    });
    const auto set_finder = reinterpret_cast<void (*)(void *)>(dlsym(library, "setLoggerFinder"));
    set_finder(log.finder());
    plugins.fake = fake_kernels();
    const std::pair<const char *, void (*)(const Plugins &)> checks[] = {
        {"identity", identity},
        {"bad_fields", bad_fields},
        {"default_fields", default_fields},
        {"copies", copies},
        {"power_modes", power_modes},
        {"functions", functions},
        {"aliasing", aliasing},
        {"formats", formats},
        {"output_types", output_types},
        {"output_shapes", output_shapes},
        {"profiles", profiles},
        {"shapes", shapes},
        {"runs", runs},
        {"slots", slots},
    };
    for (const auto &[name, body] : checks) {
        log.messages.clear();
        check(name, [&, run = body] { run(plugins); });
    }
    set_finder(nullptr);
}

// Both libraries in one process, each in turn first: the registry keeps the plugins that it has.
void check_both(Registry &registry, const char *loaded, const char *self_registering) {
    check("both", [&] {
        REQUIRE(registry.load(loaded) != nullptr);
        IPluginCreatorV3One *first = registry.creator("XlstmMlstm", "1", "xlstm");
        REQUIRE(dlopen(self_registering, RTLD_NOW | RTLD_LOCAL) != nullptr);
        REQUIRE(first != nullptr && registry.creator("XlstmMlstm", "1", "xlstm") == first);
        registry.load(loaded);
        IPluginCreatorV3One *other = registry.creator("XlstmSlstm", "1", "xlstm");
        REQUIRE(other != nullptr && std::strcmp(other->getPluginName(), "XlstmSlstm") == 0);
    });
}

// The layout of ILogger that the other checks rest on, by TensorRT's own word: it calls a logger of ours.
[[noreturn]] void check_layout_of_loggers(Registry &registry) {
    check("runtime_logger", [&] {
        Log log(registry.version);
        registry.take_logger(log.logger());
        log.require({"createInferRuntime"});
    });
    std::fflush(stdout);
    _exit(failures);
}

}  // namespace

int main(int argc, char **argv) {
    if (argc < 4) return 2;
    try {
        Registry registry(argv[1]);
        std::printf("version: %d\n", registry.version);
        const std::string how = argv[3];
        const bool registers_itself = how.rfind("register", 0) == 0;
        if (how == "both") {
            check_both(registry, argv[2], argv[4]);
            return failures;
        }
        if (how == "logger") check_layout_of_loggers(registry);
        void *handle = registers_itself ? nullptr : registry.load(argv[2]);
        void *library = dlopen(argv[2], RTLD_NOW | RTLD_LOCAL);
        if (library == nullptr) throw Failure(dlerror());
        check_plugins(registry, library);
        dlclose(library);
        check("unload", [&] {
            if (handle != nullptr) registry.unload(handle);
            // Self-registered plugins outlive the handle, as the registry still points to them.
            REQUIRE((registry.creator("XlstmMlstm", "1", "xlstm") != nullptr) == registers_itself);
            // TensorRT forgets one creator of a name; what it still points to must be there.
            for (const char *version : {"1", "2"}) {
                IPluginCreatorV3One *creator = registry.creator("XlstmMlstm", version, "xlstm");
                REQUIRE(creator == nullptr || std::strcmp(creator->getPluginName(), "XlstmMlstm") == 0);
            }
        });
    } catch (const std::exception &error) {
        std::printf("driver: %s\n", error.what());
        return 1;
    }
    return failures == 0 ? 0 : 1;
}
