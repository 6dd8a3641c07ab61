// `balanced_loss` on the CPU: the objective of a batch and its gradients in one pass over the samples.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

#include "../tensors.h"
#include "balanced_loss.h"
#include "spearman.h"

namespace attbalance {
namespace {

/// The numbers of the schema.
struct Weights {
    double alpha_ar, alpha_l1, alpha_giou, weight_rac, weight_mrc;
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
};

template <typename A>
struct Outputs {
    A* loss;
    A* samples;    // (9, B)
    A* rho;        // (L,)
    A* grad_rac;   // (L, B)
    A* grad_mrc;   // (L, B)
    A* grad_pred;  // (S, B, 4)
};

/// Box losses of every sample: samples[l1, giou, iou, box], and d box / d pred, not yet weighted.
template <typename A>
void box_losses(const Inputs<A>& in, const Weights& weights, const Outputs<A>& out) {
    const int64_t batch = in.batch;
    const A alpha_l1 = static_cast<A>(weights.alpha_l1), alpha_giou = static_cast<A>(weights.alpha_giou);
    for (int64_t b = 0; b < batch; ++b) {
        const A* const target = in.target + b * 4;
        A l1 = 0, giou = 0, iou = 0;
        for (int64_t s = 0; s < in.stages; ++s) {
            const A* const pred = in.pred + (s * batch + b) * 4;
            const BoxOverlap<A> boxes = box_overlap(pred, target);
            A distance = 0;
            for (int i = 0; i < 4; ++i) {
                const A difference = pred[i] - target[i];
                distance += std::abs(difference);
                out.grad_pred[(s * batch + b) * 4 + i] =
                    alpha_l1 * sign(difference) - alpha_giou * boxes.grad_giou[i];
            }
            l1 += distance;
            giou += 1 - boxes.giou;
            iou = boxes.iou;
        }
        out.samples[kL1 * batch + b] = l1;
        out.samples[kGiou * batch + b] = giou;
        out.samples[kIou * batch + b] = iou;
        out.samples[kBox * batch + b] = alpha_l1 * l1 + alpha_giou * giou;
    }
}

template <typename A>
void batch_spearman(const Inputs<A>& in, const A* iou, A* rho) {
    std::vector<char> kept(in.batch);
    for (int64_t b = 0; b < in.batch; ++b) kept[b] = in.valid[b] && std::isfinite(iou[b]);
    const std::vector<Ranked<A>> iou_order = sorted(iou, kept);
    const int64_t layers_per_task = std::max<int64_t>(1, 4096 / std::max<int64_t>(in.batch, 1));
    torch::stable::parallel_for(0, in.layers, layers_per_task, [&](int64_t first, int64_t last) {
        for (int64_t l = first; l < last; ++l) {
            rho[l] = static_cast<A>(spearman(in.in_box + l * in.batch, iou_order, in.batch));
        }
    });
}

/// Attention terms of every sample, their weights, and the gradients, from the box losses and `rho_weight`
/// (rho'). Returns the sum of the samples' losses.
template <typename A>
double objective(const Inputs<A>& in, const Weights& weights, const std::vector<A>& rho_weight,
                 const Outputs<A>& out) {
    const int64_t batch = in.batch, layers = in.layers;
    const A alpha_ar = static_cast<A>(weights.alpha_ar);
    const A weight_rac = static_cast<A>(weights.weight_rac), weight_mrc = static_cast<A>(weights.weight_mrc);
    const A share = 1 / static_cast<A>(std::max<int64_t>(batch, 1));
    double total = 0;
    for (int64_t b = 0; b < batch; ++b) {
        A rac = 0, mrc = 0;
        for (int64_t l = 0; l < layers; ++l) {
            rac += rho_weight[l] * in.rac[l * batch + b];
            mrc += in.mrc[l * batch + b];
        }
        const A attention = weight_rac * rac + weight_mrc * mrc;

        A difficulty = attention, difficulty_share = 1;
        int64_t first_difficult = 0;
        if (weights.difficulty_from == DifficultyFrom::kMean) {
            difficulty_share = 1 / static_cast<A>(std::max<int64_t>(layers, 1));
            difficulty = attention * difficulty_share;
        } else if (weights.difficulty_from == DifficultyFrom::kLast && layers > 0) {
            first_difficult = layers - 1;
            const int64_t last = first_difficult * batch + b;
            difficulty =
                weight_rac * (rho_weight[first_difficult] * in.rac[last]) + weight_mrc * in.mrc[last];
        }
        const bool weighted = weights.adw && in.valid[b];
        const A probability = sigmoid(difficulty);
        const A adw = weighted ? A(0.5) + probability : A(1);
        const A odw = weights.odw ? A(0.5) + sigmoid(1 - in.box_ratio[b]) : A(1);
        const A box = out.samples[kBox * batch + b];
        total += static_cast<double>(alpha_ar * attention + odw * adw * box);

        const A grad_attention = alpha_ar * share;
        const A grad_difficulty = weighted && !weights.detach_difficulty
                                      ? share * odw * box * probability * (1 - probability) * difficulty_share
                                      : A(0);
        for (int64_t l = 0; l < layers; ++l) {
            const A grad = l >= first_difficult ? grad_attention + grad_difficulty : grad_attention;
            out.grad_rac[l * batch + b] = grad * weight_rac * rho_weight[l];
            out.grad_mrc[l * batch + b] = grad * weight_mrc;
        }
        for (int64_t s = 0; s < in.stages; ++s) {
            for (int i = 0; i < 4; ++i) out.grad_pred[(s * batch + b) * 4 + i] *= share * odw * adw;
        }
        out.samples[kAttention * batch + b] = attention;
        out.samples[kRac * batch + b] = rac;
        out.samples[kMrc * batch + b] = mrc;
        out.samples[kAdw * batch + b] = adw;
        out.samples[kOdw * batch + b] = odw;
    }
    return total;
}

/// The box loss alone.
template <typename A>
double plain_objective(const Inputs<A>& in, const Outputs<A>& out) {
    const int64_t batch = in.batch;
    const A share = 1 / static_cast<A>(std::max<int64_t>(batch, 1));
    double total = 0;
    for (int64_t b = 0; b < batch; ++b) {
        total += static_cast<double>(out.samples[kBox * batch + b]);
        for (const SampleRow row : {kAttention, kRac, kMrc}) out.samples[row * batch + b] = 0;
        for (const SampleRow row : {kAdw, kOdw}) out.samples[row * batch + b] = 1;
    }
    for (int64_t i = 0; i < in.stages * batch * 4; ++i) out.grad_pred[i] *= share;
    std::fill_n(out.grad_rac, in.layers * batch, A(0));
    std::fill_n(out.grad_mrc, in.layers * batch, A(0));
    return total;
}

template <typename A>
void run(const Inputs<A>& in, const Weights& weights, const A* given_rho, const Outputs<A>& out) {
    box_losses(in, weights, out);
    double total = 0;
    if (weights.plain) {
        total = plain_objective(in, out);
    } else {
        if (given_rho) {
            std::copy_n(given_rho, in.layers, out.rho);
        } else {
            batch_spearman(in, out.samples + kIou * in.batch, out.rho);
        }
        A sum = 0;
        for (int64_t l = 0; l < in.layers; ++l) sum += out.rho[l];
        std::vector<A> rho_weight(in.layers);
        for (int64_t l = 0; l < in.layers; ++l)
            rho_weight[l] = out.rho[l] - sum / static_cast<A>(in.layers) + 1;
        total = objective(in, weights, rho_weight, out);
    }
    *out.loss = static_cast<A>(total / static_cast<double>(std::max<int64_t>(in.batch, 1)));
}

using Result = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

template <typename A>
Result checked_run(const Tensor& in_box, const Tensor& rac, const Tensor& mrc, const Tensor& valid,
                   const Tensor& pred, const Tensor& target, const Tensor& box_ratio,
                   const std::optional<Tensor>& rho, const Weights& weights) {
    constexpr ScalarType kType = kScalarType<A>;
    STD_TORCH_CHECK(in_box.dim() == 2 && pred.dim() == 3,
                    "attbalance_ext: in_box must be (L, B) and pred (S, B, 4)");
    const int64_t layers = in_box.size(0), stages = pred.size(0), batch = pred.size(1);
    check(in_box, "in_box", kType, {layers, batch});
    check(rac, "rac", kType, {layers, batch});
    check(mrc, "mrc", kType, {layers, batch});
    check(valid, "valid", ScalarType::Bool, {batch});
    check(pred, "pred", kType, {stages, batch, 4});
    check(target, "target", kType, {batch, 4});
    check(box_ratio, "box_ratio", kType, {batch});
    if (rho) check(*rho, "rho", kType, {layers});

    const Tensor loss = empty({}, kType), samples = empty({kSampleRows, batch}, kType);
    const Tensor rho_out = empty({weights.plain ? 0 : layers}, kType);
    const Tensor grad_rac = empty({layers, batch}, kType), grad_mrc = empty({layers, batch}, kType);
    const Tensor grad_pred = empty({stages, batch, 4}, kType);
    const Inputs<A> inputs = {layers,
                              stages,
                              batch,
                              data<const A>(in_box),
                              data<const A>(rac),
                              data<const A>(mrc),
                              data<const bool>(valid),
                              data<const A>(pred),
                              data<const A>(target),
                              data<const A>(box_ratio)};
    const Outputs<A> outputs = {data<A>(loss),     data<A>(samples),  data<A>(rho_out),
                                data<A>(grad_rac), data<A>(grad_mrc), data<A>(grad_pred)};
    run(inputs, weights, rho ? data<const A>(*rho) : nullptr, outputs);
    return {loss, samples, rho_out, grad_rac, grad_mrc, grad_pred};
}

Result balanced_loss(const Tensor& in_box, const Tensor& rac, const Tensor& mrc, const Tensor& valid,
                     const Tensor& pred, const Tensor& target, const Tensor& box_ratio,
                     const std::optional<Tensor>& rho, double alpha_ar, double alpha_l1, double alpha_giou,
                     double weight_rac, double weight_mrc, int64_t difficulty_from, bool detach_difficulty,
                     bool adw, bool odw, bool plain) {
    STD_TORCH_CHECK(difficulty_from >= 0 && difficulty_from <= 2, "attbalance_ext: unknown difficulty code ",
                    difficulty_from);
    const Weights weights = {alpha_ar,
                             alpha_l1,
                             alpha_giou,
                             weight_rac,
                             weight_mrc,
                             static_cast<DifficultyFrom>(difficulty_from),
                             detach_difficulty,
                             adw,
                             odw,
                             plain};
    const auto run = pred.scalar_type() == ScalarType::Double ? checked_run<double> : checked_run<float>;
    return run(in_box, rac, mrc, valid, pred, target, box_ratio, rho, weights);
}

}  // namespace
}  // namespace attbalance

STABLE_TORCH_LIBRARY_IMPL(attbalance_ext, CPU, m) {
    m.impl("balanced_loss.cpu", TORCH_BOX(&attbalance::balanced_loss));
}
