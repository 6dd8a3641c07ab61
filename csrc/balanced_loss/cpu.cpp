// `balanced_loss` on the CPU: the objective of a batch and its gradients in two passes over the samples.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "../parallel.h"
#include "call.h"
#include "spearman.h"

namespace attbalance {
namespace {

template <typename A>
void batch_spearman(const Inputs<A>& in, const A* iou, A* rho) {
    std::vector<char> kept(in.batch);
    for (int64_t b = 0; b < in.batch; ++b) kept[b] = in.valid[b] && std::isfinite(iou[b]);
    const std::vector<Ranked<A>> iou_order = sorted(iou, kept);
    const int64_t layers_per_task = std::max<int64_t>(1, 4096 / std::max<int64_t>(in.batch, 1));
    parallel_for(in.layers, layers_per_task, [&](int64_t first, int64_t last) {
        for (int64_t l = first; l < last; ++l) {
            rho[l] = static_cast<A>(spearman(in.in_box + l * in.batch, iou_order, in.batch));
        }
    });
}

template <typename A>
void run(const Inputs<A>& in, const Weights<A>& weights, const Outputs<A>& out) {
    for (int64_t b = 0; b < in.batch; ++b) box_losses(in, weights, b, out);
    if (needs_spearman(in, weights)) {
        batch_spearman(in, out.samples + kIou * in.batch, out.rho);
    } else if (!weights.plain) {
        std::copy_n(in.rho, in.layers, out.rho);
    }
    const RhoWeight<A> rho_weight(out.rho, weights.plain ? 0 : in.layers);
    double total = 0;
    for (int64_t b = 0; b < in.batch; ++b) {
        total += static_cast<double>(sample_objective(in, weights, rho_weight, b, out));
    }
    *out.loss = static_cast<A>(total / static_cast<double>(std::max<int64_t>(in.batch, 1)));
}

BalancedLossResult balanced_loss(const Tensor& in_box, const Tensor& rac, const Tensor& mrc,
                                 const Tensor& valid, const Tensor& pred, const Tensor& target,
                                 const Tensor& box_ratio, const std::optional<Tensor>& rho, double alpha_ar,
                                 double alpha_l1, double alpha_giou, double weight_rac, double weight_mrc,
                                 int64_t difficulty_from, bool detach_difficulty, bool adw, bool odw,
                                 bool plain) {
    const Weights<double> weights = {
        alpha_ar,          alpha_l1, alpha_giou, weight_rac, weight_mrc, difficulty_of(difficulty_from),
        detach_difficulty, adw,      odw,        plain};
    const auto solve = [&](auto zero) {
        const BalancedLossCall call = balanced_loss_call<decltype(zero)>(in_box, rac, mrc, valid, pred,
                                                                         target, box_ratio, rho, weights);
        run(call.in, call.weights, call.out);
        return call.result;
    };
    return pred.scalar_type() == ScalarType::Double ? solve(0.0) : solve(0.0f);
}

}  // namespace
}  // namespace attbalance

STABLE_TORCH_LIBRARY_IMPL(attbalance_ext, CPU, m) {
    m.impl("balanced_loss.cpu", TORCH_BOX(&attbalance::balanced_loss));
}
