// A call of `balanced_loss`: its arguments checked, its results allocated.
#pragma once

#include <optional>
#include <tuple>

#include "../tensors.h"
#include "objective.h"

namespace attbalance {

/// As in the schema.
using BalancedLossResult = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

template <typename A>
struct BalancedLossCall {
    Inputs<A> in;
    Weights<A> weights;
    Outputs<A> out;
    BalancedLossResult result;
};

inline DifficultyFrom difficulty_of(int64_t code) {
    STD_TORCH_CHECK(code >= 0 && code <= 2, "attbalance_ext: unknown difficulty code ", code);
    return static_cast<DifficultyFrom>(code);
}

/// Raise unless the tensors fit together; allocate the results at `place`.
template <typename A>
BalancedLossCall<A> balanced_loss_call(const Tensor& in_box, const Tensor& rac, const Tensor& mrc,
                                       const Tensor& valid, const Tensor& pred, const Tensor& target,
                                       const Tensor& box_ratio, const std::optional<Tensor>& rho,
                                       const Weights<double>& weights, Place place = {}) {
    constexpr ScalarType kType = kScalarType<A>;
    STD_TORCH_CHECK(in_box.dim() == 2 && pred.dim() == 3,
                    "attbalance_ext: in_box must be (L, B) and pred (S, B, 4)");
    const int64_t layers = in_box.size(0), stages = pred.size(0), batch = pred.size(1);
    STD_TORCH_CHECK(stages > 0, "attbalance_ext: pred (S, B, 4) needs at least one stage");
    check(in_box, "in_box", kType, {layers, batch}, place);
    check(rac, "rac", kType, {layers, batch}, place);
    check(mrc, "mrc", kType, {layers, batch}, place);
    check(valid, "valid", ScalarType::Bool, {batch}, place);
    check(pred, "pred", kType, {stages, batch, 4}, place);
    check(target, "target", kType, {batch, 4}, place);
    check(box_ratio, "box_ratio", kType, {batch}, place);
    if (rho) check(*rho, "rho", kType, {layers}, place);

    const Tensor loss = empty({}, kType, place), samples = empty({kSampleRows, batch}, kType, place);
    const Tensor rho_out = empty({weights.plain ? 0 : layers}, kType, place);
    const Tensor grad_rac = empty({layers, batch}, kType, place);
    const Tensor grad_mrc = empty({layers, batch}, kType, place);
    const Tensor grad_pred = empty({stages, batch, 4}, kType, place);
    return {{layers, stages, batch, data<const A>(in_box), data<const A>(rac), data<const A>(mrc),
             data<const bool>(valid), data<const A>(pred), data<const A>(target), data<const A>(box_ratio),
             rho ? data<const A>(*rho) : nullptr},
            {static_cast<A>(weights.alpha_ar), static_cast<A>(weights.alpha_l1),
             static_cast<A>(weights.alpha_giou), static_cast<A>(weights.weight_rac),
             static_cast<A>(weights.weight_mrc), weights.difficulty_from, weights.detach_difficulty,
             weights.adw, weights.odw, weights.plain},
            {data<A>(loss), data<A>(samples), data<A>(rho_out), data<A>(grad_rac), data<A>(grad_mrc),
             data<A>(grad_pred)},
            {loss, samples, rho_out, grad_rac, grad_mrc, grad_pred}};
}

}  // namespace attbalance
