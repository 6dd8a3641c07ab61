// Spearman's rank correlation of each layer's in-box attention with the IoU, in double. Average ranks for
// ties.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "balanced_loss.h"

namespace attbalance {

template <typename A>
struct Ranked {
    A value;
    int64_t sample;
};

/// Samples whose bit is set in `kept`, by ascending value.
template <typename A>
std::vector<Ranked<A>> sorted(const A* values, const std::vector<char>& kept) {
    std::vector<Ranked<A>> order;
    order.reserve(kept.size());
    for (size_t b = 0; b < kept.size(); ++b) {
        if (kept[b]) order.push_back({values[b], static_cast<int64_t>(b)});
    }
    std::sort(order.begin(), order.end(),
              [](const Ranked<A>& a, const Ranked<A>& b) { return a.value < b.value; });
    return order;
}

/// ranks[b] = rank of sample b, from 1, minus the mean rank; ties share theirs. `order` is ascending.
template <typename A>
void centered_ranks(const std::vector<Ranked<A>>& order, std::vector<double>* ranks) {
    const double mean = (static_cast<double>(order.size()) + 1) / 2;
    for (size_t first = 0; first < order.size();) {
        size_t last = first + 1;
        while (last < order.size() && order[last].value == order[first].value) ++last;
        const double shared = (static_cast<double>(first) + 1 + static_cast<double>(last)) / 2 - mean;
        for (; first < last; ++first) (*ranks)[order[first].sample] = shared;
    }
}

/// rho of one layer; 0 where undefined. `iou_order` holds the samples that are valid and have a finite IoU,
/// ascending.
template <typename A>
double spearman(const A* in_box, const std::vector<Ranked<A>>& iou_order, int64_t batch) {
    std::vector<char> kept(batch, 0);
    std::vector<Ranked<A>> kept_iou;
    kept_iou.reserve(iou_order.size());
    for (const Ranked<A>& entry : iou_order) {
        if (!std::isfinite(in_box[entry.sample])) continue;
        kept[entry.sample] = 1;
        kept_iou.push_back(entry);
    }
    std::vector<double> x(batch, 0), y(batch, 0);
    centered_ranks(sorted(in_box, kept), &x);
    centered_ranks(kept_iou, &y);
    double covariance = 0, x_spread = 0, y_spread = 0;
    for (int64_t b = 0; b < batch; ++b) {
        covariance += x[b] * y[b];
        x_spread += x[b] * x[b];
        y_spread += y[b] * y[b];
    }
    return correlation(covariance, x_spread, y_spread);
}

}  // namespace attbalance
