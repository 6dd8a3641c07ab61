// A box on one axis of a token grid. No torch header and no contraction to FMA: the weights have the bits of
// the Python reference, whose order of operations this follows.
#pragma once

#include <cstdint>

#include "../host_device.h"

namespace attbalance {

/// Codes as in the schemas (`rule`).
enum class Rule : int { kTouch = 0, kCenter = 1, kCoverage = 2, kNearest = 3 };

constexpr int kRules = 4;

/// Extent of a box on one axis, in cells.
struct Interval {
    float lo;
    float hi;
};

/// `center` and `extent` in [0, 1] of the canvas; `cells` along this axis.
ATTBALANCE_HOST_DEVICE inline Interval box_interval(float center, float extent, int64_t cells) {
    const float half = extent / 2;
    const float n = static_cast<float>(cells);
    return {(center - half) * n, (center + half) * n};
}

/// Weight of cell `cell` on one axis; the weight of a token is the product over both axes. NaN gives 0.
ATTBALANCE_HOST_DEVICE inline float cell_weight(Interval box, int64_t cell, Rule rule) {
    const float j = static_cast<float>(cell);
    if (rule == Rule::kCenter) return box.lo <= j + 0.5f && j + 0.5f < box.hi ? 1.0f : 0.0f;
    if (rule == Rule::kNearest) return box.lo <= j && j < box.hi ? 1.0f : 0.0f;
    // Written so that a NaN bound survives both selections.
    const float end = j + 1 < box.hi ? j + 1 : box.hi;
    const float begin = j > box.lo ? j : box.lo;
    const float overlap = end - begin;
    if (rule == Rule::kTouch) return overlap > 1e-3f ? 1.0f : 0.0f;
    return overlap > 0 ? overlap : 0.0f;
}

}  // namespace attbalance
