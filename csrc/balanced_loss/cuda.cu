// `balanced_loss` on a GPU: one launch of one block.
#include <current_device.h>
#include <torch/csrc/stable/library.h>

#include "../cuda/launch.h"
#include "call.h"
#include "kernels.cuh"

namespace attbalance {
namespace {

BalancedLossResult balanced_loss(const Tensor& in_box, const Tensor& rac, const Tensor& mrc,
                                 const Tensor& valid, const Tensor& pred, const Tensor& target,
                                 const Tensor& box_ratio, const std::optional<Tensor>& rho, double alpha_ar,
                                 double alpha_l1, double alpha_giou, double weight_rac, double weight_mrc,
                                 int64_t difficulty_from, bool detach_difficulty, bool adw, bool odw,
                                 bool plain) {
    const CurrentDevice device(pred);
    const Weights<double> weights = {
        alpha_ar,          alpha_l1, alpha_giou, weight_rac, weight_mrc, difficulty_of(difficulty_from),
        detach_difficulty, adw,      odw,        plain};
    const BalancedLossCall call = balanced_loss_call<float>(in_box, rac, mrc, valid, pred, target, box_ratio,
                                                            rho, weights, device.place());
    const bool ranked = needs_spearman(call.in, call.weights);
    STD_TORCH_CHECK(!ranked || call.in.batch <= kMaxBatch, "attbalance_ext: rho of more than ", kMaxBatch,
                    " samples is not supported on CUDA");
    const BalancedLossPlan plan = plan_balanced_loss(call.in.batch, call.in.layers, ranked);
    BalancedLossArguments arguments = {call.in, call.weights, call.out, plan, nullptr};
    if (plan.in_shared) {
        const auto kernel = balanced_loss_kernel<true>;
        if (plan.scratch.bytes > kSharedUnasked) {
            // The same for every call: another thread may be between this and its launch.
            check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                            static_cast<int>(kMaxShared)),
                       "asking for shared memory");
        }
        launch("balanced_loss", kernel, dim3(1), dim3(plan.threads), static_cast<size_t>(plan.scratch.bytes),
               device.stream(), arguments);
    } else {
        // Given back at the return, while the kernel is only queued: the allocator reuses memory in stream
        // order.
        const Tensor workspace = empty({plan.scratch.bytes}, ScalarType::Byte, device.place());
        arguments.workspace = data<unsigned char>(workspace);
        launch("balanced_loss", balanced_loss_kernel<false>, dim3(1), dim3(plan.threads), 0, device.stream(),
               arguments);
    }
    return call.result;
}

}  // namespace
}  // namespace attbalance

STABLE_TORCH_LIBRARY_IMPL(attbalance_ext, ATTBALANCE_DISPATCH_KEY, m) {
    m.impl("balanced_loss.cuda", TORCH_BOX(&attbalance::balanced_loss));
}
