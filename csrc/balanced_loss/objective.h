// The objective of one sample and its gradients, for every backend. No torch header.
#pragma once

#include <math.h>

#include <cstdint>

#include "balanced_loss.h"

namespace attbalance {

/// The numbers of the schema.
template <typename A>
struct Weights {
    A alpha_ar, alpha_l1, alpha_giou, weight_rac, weight_mrc;
    DifficultyFrom difficulty_from;
    bool detach_difficulty, adw, odw, plain;
};

template <typename A>
struct Inputs {
    int64_t layers, stages, batch;
    const A *in_box, *rac, *mrc;  // (L, B)
    const bool* valid;            // (B,)
    const A* pred;                // (S, B, 4)
    const A* target;              // (B, 4)
    const A* box_ratio;           // (B,)
    const A* rho;                 // (L,), or null: Spearman's over this batch
};

template <typename A>
struct Outputs {
    A* loss;
    A* samples;    // (9, B)
    A* rho;        // (L,), (0,) for the plain loss
    A* grad_rac;   // (L, B)
    A* grad_mrc;   // (L, B)
    A* grad_pred;  // (S, B, 4)
};

/// Does this call rank the batch?
template <typename A>
ATTBALANCE_HOST_DEVICE bool needs_spearman(const Inputs<A>& in, const Weights<A>& weights) {
    return !weights.plain && !in.rho && in.layers > 0;
}

/// rho' of each layer: rho less its mean, plus 1.
template <typename A>
class RhoWeight {
  public:
    ATTBALANCE_HOST_DEVICE RhoWeight(const A* rho, int64_t layers) : rho_(rho), mean_(0) {
        for (int64_t l = 0; l < layers; ++l) mean_ += rho[l];
        if (layers > 0) mean_ /= static_cast<A>(layers);
    }

    ATTBALANCE_HOST_DEVICE A operator[](int64_t layer) const { return rho_[layer] - mean_ + 1; }

  private:
    const A* rho_;
    A mean_;
};

/// Box losses of sample b, into samples[box, l1, giou, iou], and d box / d pred, into grad_pred. Returns the
/// IoU of the last stage.
template <typename A>
ATTBALANCE_HOST_DEVICE A box_losses(const Inputs<A>& in, const Weights<A>& weights, int64_t b,
                                    const Outputs<A>& out) {
    const int64_t batch = in.batch;
    const A* const target = in.target + b * 4;
    A l1 = 0, giou = 0, iou = 0;
    for (int64_t s = 0; s < in.stages; ++s) {
        const A* const pred = in.pred + (s * batch + b) * 4;
        A* const grad_pred = out.grad_pred + (s * batch + b) * 4;
        const BoxOverlap<A> boxes = box_overlap(pred, target);
        A distance = 0;
        for (int i = 0; i < 4; ++i) {
            const A difference = pred[i] - target[i];
            distance += fabs(difference);
            grad_pred[i] = weights.alpha_l1 * sign(difference) - weights.alpha_giou * boxes.grad_giou[i];
        }
        l1 += distance;
        giou += 1 - boxes.giou;
        iou = boxes.iou;
    }
    out.samples[kBox * batch + b] = weights.alpha_l1 * l1 + weights.alpha_giou * giou;
    out.samples[kL1 * batch + b] = l1;
    out.samples[kGiou * batch + b] = giou;
    out.samples[kIou * batch + b] = iou;
    return iou;
}

/// Sample b's part of the sum over the batch, after `box_losses` of the same sample. Writes the rest of its
/// column of `samples`, weighs grad_pred, and puts the mean's 1 / B into every gradient. The plain loss has
/// no attention terms and weights of 1; `rho_weight` is not read then.
template <typename A>
ATTBALANCE_HOST_DEVICE A sample_objective(const Inputs<A>& in, const Weights<A>& weights,
                                          const RhoWeight<A>& rho_weight, int64_t b, const Outputs<A>& out) {
    const int64_t batch = in.batch, layers = weights.plain ? 0 : in.layers;
    const A share = 1 / static_cast<A>(batch);
    A rac = 0, mrc = 0;
    for (int64_t l = 0; l < layers; ++l) {
        rac += rho_weight[l] * in.rac[l * batch + b];
        mrc += in.mrc[l * batch + b];
    }
    const A attention = weights.weight_rac * rac + weights.weight_mrc * mrc;

    A difficulty = attention, difficulty_share = 1;
    int64_t first_difficult = 0;
    if (weights.difficulty_from == DifficultyFrom::kMean && layers > 0) {
        difficulty_share = 1 / static_cast<A>(layers);
        difficulty = attention * difficulty_share;
    } else if (weights.difficulty_from == DifficultyFrom::kLast && layers > 0) {
        first_difficult = layers - 1;
        const int64_t last = first_difficult * batch + b;
        difficulty = weights.weight_rac * (rho_weight[first_difficult] * in.rac[last]) +
                     weights.weight_mrc * in.mrc[last];
    }
    const bool weighted = !weights.plain && weights.adw && in.valid[b];
    const A probability = sigmoid(difficulty);
    const A adw = weighted ? A(0.5) + probability : A(1);
    const A odw = !weights.plain && weights.odw ? A(0.5) + sigmoid(1 - in.box_ratio[b]) : A(1);

    const A box = out.samples[kBox * batch + b];
    out.samples[kAttention * batch + b] = attention;
    out.samples[kRac * batch + b] = rac;
    out.samples[kMrc * batch + b] = mrc;
    out.samples[kAdw * batch + b] = adw;
    out.samples[kOdw * batch + b] = odw;

    const A grad_attention = weights.alpha_ar * share;
    const A grad_difficulty = weighted && !weights.detach_difficulty
                                  ? share * odw * box * probability * (1 - probability) * difficulty_share
                                  : A(0);
    for (int64_t l = 0; l < in.layers; ++l) {
        const A grad = l >= first_difficult ? grad_attention + grad_difficulty : grad_attention;
        out.grad_rac[l * batch + b] = weights.plain ? 0 : grad * weights.weight_rac * rho_weight[l];
        out.grad_mrc[l * batch + b] = weights.plain ? 0 : grad * weights.weight_mrc;
    }
    for (int64_t s = 0; s < in.stages; ++s) {
        for (int i = 0; i < 4; ++i) out.grad_pred[(s * batch + b) * 4 + i] *= share * odw * adw;
    }
    return weights.alpha_ar * attention + odw * adw * box;
}

}  // namespace attbalance
