// What every backend demands of a region.
#pragma once

#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <vector>

#include "../tensors.h"
#include "region.h"

namespace attbalance {

/// Raise unless `region` is boxes (B, 4) on grids of N cells, or weights (B, N).
inline void check_region(const Tensor& region, const std::vector<int64_t>& grids, int64_t rule, int64_t batch,
                         int64_t tokens, ScalarType arithmetic, Place place = {}) {
    STD_TORCH_CHECK(rule >= 0 && rule < kRules, "attbalance_ext: unknown rule code ", rule);
    if (grids.empty()) {
        check(region, "region", arithmetic, {batch, tokens}, place);
        return;
    }
    check(region, "region", ScalarType::Float, {batch, 4}, place);
    STD_TORCH_CHECK(grids.size() % 2 == 0, "attbalance_ext: grids must hold pairs");
    int64_t cells = 0;
    for (size_t g = 0; g < grids.size(); g += 2) {
        STD_TORCH_CHECK(grids[g] > 0 && grids[g] <= tokens && grids[g + 1] > 0 && grids[g + 1] <= tokens,
                        "attbalance_ext: grids must be positive and no larger than the tokens");
        cells += grids[g] * grids[g + 1];
    }
    STD_TORCH_CHECK(cells == tokens, "attbalance_ext: grids have ", cells, " cells for ", tokens, " tokens");
}

}  // namespace attbalance
