// Storage types of keys, by the codes the operator schemas use.
#pragma once

#include <cstdint>

namespace attbalance {

/// Codes as in the schemas (`key_dtype`).
enum class Dtype : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kFloat64 = 3 };

constexpr int kDtypes = 4;

/// Whether keys of this type are worked on in double rather than float.
constexpr bool in_double(Dtype dtype) {
    return dtype == Dtype::kFloat64;
}

/// Sixteen bits of storage. Arithmetic is done in float after widening.
struct BFloat16 {
    static constexpr bool kIsBFloat16 = true;
    uint16_t bits;
};

struct Float16 {
    static constexpr bool kIsBFloat16 = false;
    uint16_t bits;
};

}  // namespace attbalance
