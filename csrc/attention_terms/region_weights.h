// The region of a whole batch as weights of its tokens, on the CPU.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "../tensors.h"
#include "attention_terms.h"
#include "region.h"

namespace attbalance {

/// Region weights m of every token, in [0, 1].
template <typename A>
struct RegionWeights {
    std::vector<A> values;            // (B, N)
    std::vector<RegionState> states;  // (B,)

    const A* row(int64_t b, int64_t tokens) const { return values.data() + b * tokens; }
};

/// m (N,) of one box (4,), the cells of each grid row-major, grids end to end.
template <typename A>
void rasterise(const float* box, const std::vector<int64_t>& grids, Rule rule, A* weights) {
    for (size_t g = 0; g < grids.size(); g += 2) {
        const int64_t height = grids[g], width = grids[g + 1];
        const Interval rows = box_interval(box[1], box[3], height);
        const Interval columns = box_interval(box[0], box[2], width);
        for (int64_t x = 0; x < width; ++x) weights[x] = static_cast<A>(cell_weight(columns, x, rule));
        // Upwards: the first row holds the columns' weights until its own turn.
        for (int64_t y = height - 1; y >= 0; --y) {
            const float row = cell_weight(rows, y, rule);
            for (int64_t x = 0; x < width; ++x) {
                weights[y * width + x] = static_cast<A>(row * static_cast<float>(weights[x]));
            }
        }
        weights += height * width;
    }
}

/// From boxes (B, 4) where there are grids, else from weights (B, N).
template <typename A>
RegionWeights<A> region_weights(const Tensor& region, const std::vector<int64_t>& grids, Rule rule,
                                const bool* padding, int64_t batch, int64_t tokens) {
    RegionWeights<A> weights;
    weights.values.resize(batch * tokens);
    weights.states.resize(batch);
    for (int64_t b = 0; b < batch; ++b) {
        A* m = weights.values.data() + b * tokens;
        if (grids.empty()) {
            std::copy_n(data<const A>(region) + b * tokens, tokens, m);
        } else {
            rasterise(data<const float>(region) + b * 4, grids, rule, m);
        }
        RegionState state = RegionState::kEmpty;
        for (int64_t j = 0; j < tokens; ++j) {
            const bool padded = padding && padding[b * tokens + j];
            if (m[j] != m[j]) {
                // A weight that is NaN must reach A_in and RAC, but not p.
                if (!padded) state = RegionState::kNotANumber;
                m[j] = 0;
            }
            m[j] = std::clamp<A>(m[j], 0, 1);
            if (m[j] > 0 && !padded && state == RegionState::kEmpty) state = RegionState::kSome;
        }
        weights.states[b] = state;
    }
    return weights;
}

}  // namespace attbalance
