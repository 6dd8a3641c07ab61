// The arithmetic of `balanced_loss` for one sample: boxes, their losses and gradients, difficulty weights. No
// torch header. The order of operations is the Python reference's and nothing is contracted to FMA, so that
// IoU has the same bits: Spearman's rho, being made of ranks, would jump otherwise.
#pragma once

#include <math.h>

#include "../host_device.h"

namespace attbalance {

/// Codes as in the schemas (`difficulty_from`).
enum class DifficultyFrom : int { kSum = 0, kMean = 1, kLast = 2 };

/// Rows of `samples` (9, B).
enum SampleRow : int {
    kAttention = 0,
    kBox = 1,
    kRac = 2,
    kMrc = 3,
    kL1 = 4,
    kGiou = 5,
    kIou = 6,
    kAdw = 7,
    kOdw = 8,
    kSampleRows = 9,
};

/// The extent of a box on one axis.
template <typename A>
struct Extent {
    A lo;
    A hi;
};

template <typename A>
ATTBALANCE_HOST_DEVICE Extent<A> extent(A center, A size) {
    return {center - size / 2, center + size / 2};
}

// NaN in, NaN out, as torch.minimum, torch.maximum and clamp have it.
template <typename A>
ATTBALANCE_HOST_DEVICE A minimum(A a, A b) {
    return a != a || a < b ? a : b;
}

template <typename A>
ATTBALANCE_HOST_DEVICE A maximum(A a, A b) {
    return a != a || a > b ? a : b;
}

template <typename A>
ATTBALANCE_HOST_DEVICE A positive_part(A a) {
    return a < 0 ? 0 : a;
}

/// d maximum(a, b) / da, shared between both where they are equal.
template <typename A>
ATTBALANCE_HOST_DEVICE A larger(A a, A b) {
    return a > b ? A(1) : a == b ? A(0.5) : A(0);
}

/// d positive_part(a) / da, 1 at 0.
template <typename A>
ATTBALANCE_HOST_DEVICE A is_positive(A a) {
    return a >= 0 ? A(1) : A(0);
}

/// numerator / denominator, 0 where the denominator is 0.
template <typename A>
ATTBALANCE_HOST_DEVICE A ratio(A numerator, A denominator) {
    return denominator == 0 ? 0 : numerator / denominator;
}

/// Spearman's rho from sums over centred ranks (in any unit), 0 where undefined.
ATTBALANCE_HOST_DEVICE inline double correlation(double covariance, double x_spread, double y_spread) {
    return ratio(covariance, sqrt(x_spread * y_spread));
}

/// One axis of two boxes: lengths before clamping at 0.
template <typename A>
struct AxisOverlap {
    Extent<A> pred, target;
    A length, target_length, shared, hull;
};

template <typename A>
ATTBALANCE_HOST_DEVICE AxisOverlap<A> overlap(A center, A size, A target_center, A target_size) {
    const Extent<A> p = extent(center, size), t = extent(target_center, target_size);
    return {p,
            t,
            p.hi - p.lo,
            t.hi - t.lo,
            minimum(p.hi, t.hi) - maximum(p.lo, t.lo),
            maximum(p.hi, t.hi) - minimum(p.lo, t.lo)};
}

/// Accumulate the gradient of centre and size of the predicted box from those of the three lengths.
template <typename A>
ATTBALANCE_HOST_DEVICE void overlap_gradient(const AxisOverlap<A>& axis, A grad_length, A grad_shared,
                                             A grad_hull, A* grad_center, A* grad_size) {
    grad_length *= is_positive(axis.length);
    grad_shared *= is_positive(axis.shared);
    grad_hull *= is_positive(axis.hull);
    const A hi = grad_length + grad_shared * larger(axis.target.hi, axis.pred.hi) +
                 grad_hull * larger(axis.pred.hi, axis.target.hi);
    const A lo = -grad_length - grad_shared * larger(axis.pred.lo, axis.target.lo) -
                 grad_hull * larger(axis.target.lo, axis.pred.lo);
    *grad_center += hi + lo;
    *grad_size += (hi - lo) / 2;
}

/// IoU, generalised IoU (Rezatofighi et al. 2019) of two cxcywh boxes, and the gradient of the latter in
/// `pred`.
template <typename A>
struct BoxOverlap {
    A iou;
    A giou;
    A grad_giou[4];
};

template <typename A>
ATTBALANCE_HOST_DEVICE BoxOverlap<A> box_overlap(const A* pred, const A* target) {
    const AxisOverlap<A> x = overlap(pred[0], pred[2], target[0], target[2]);
    const AxisOverlap<A> y = overlap(pred[1], pred[3], target[1], target[3]);
    const A area = positive_part(x.length) * positive_part(y.length);
    const A target_area = positive_part(x.target_length) * positive_part(y.target_length);
    const A shared = positive_part(x.shared) * positive_part(y.shared);
    const A all = area + target_area - shared;
    const A hull = positive_part(x.hull) * positive_part(y.hull);
    const A iou = ratio(shared, all);
    const A giou = iou - ratio(hull - all, hull);

    const A grad_hull = ratio(ratio(hull - all, hull) - 1, hull);
    const A grad_all = ratio(A(1), hull) - ratio(iou, all);
    const A grad_shared = ratio(A(1), all) - grad_all;
    BoxOverlap<A> result = {iou, giou, {0, 0, 0, 0}};
    overlap_gradient(x, grad_all * positive_part(y.length), grad_shared * positive_part(y.shared),
                     grad_hull * positive_part(y.hull), &result.grad_giou[0], &result.grad_giou[2]);
    overlap_gradient(y, grad_all * positive_part(x.length), grad_shared * positive_part(x.shared),
                     grad_hull * positive_part(x.hull), &result.grad_giou[1], &result.grad_giou[3]);
    return result;
}

/// -1, 0 or 1; NaN stays NaN.
template <typename A>
ATTBALANCE_HOST_DEVICE A sign(A a) {
    return a > 0 ? A(1) : a < 0 ? A(-1) : a;
}

template <typename A>
ATTBALANCE_HOST_DEVICE A sigmoid(A x) {
    return 1 / (1 + static_cast<A>(exp(-x)));
}

}  // namespace attbalance
