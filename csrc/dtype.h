// Storage types of keys, by the codes the operator schemas use.
#pragma once

#include <cstdint>

namespace attbalance {

/// Codes as in the schemas (`key_dtype`).
enum class Dtype : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kFloat64 = 3 };

constexpr int kDtypes = 4;

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
