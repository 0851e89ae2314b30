// The attributes of the operators, as every adapter takes them. All are FP32.
#pragma once

#include <cmath>
#include <limits>

namespace xlstm {

struct Attribute {
    const char *name;
    bool required;
    float fallback;           // where not given; NaN: the operator works it out
    const char *requirement;  // in words
    bool (*allowed)(float);
};

// NaN is what stands for an absent one, and no attribute may be it.
inline const Attribute kScale{"scale", false, std::numeric_limits<float>::quiet_NaN(), "a finite number",
                              [](float value) { return std::isfinite(value); }};
inline const Attribute kEps{"eps", true, 0.0F, "a finite number of at least 0",
                            [](float value) { return std::isfinite(value) && value >= 0; }};
inline const Attribute kForgetMax{
    "forget_max", false, std::numeric_limits<float>::infinity(), "a number or +infinity",
    [](float value) { return value > -std::numeric_limits<float>::infinity(); }};

inline bool is_flag(float value) { return value == 0 || value == 1; }

inline const Attribute kForgetExp{"forget_exp", false, 0.0F, "0 or 1", is_flag};
inline const Attribute kInputSigmoid{"input_sigmoid", false, 0.0F, "0 or 1", is_flag};
inline const Attribute kNormalize{"normalize", false, 1.0F, "0 or 1", is_flag};
inline const Attribute kNormalizerMin{"normalizer_min", false, 0.0F, "a number from 0 to 1",
                                      [](float value) { return value >= 0 && value <= 1; }};

// What q is multiplied with.
inline float scale_of(float given, int dk) {
    return std::isnan(given) ? 1.0F / std::sqrt(static_cast<float>(dk)) : given;
}

}  // namespace xlstm
