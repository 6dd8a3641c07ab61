// Where the launches of a call go: the device its tensors are on, and PyTorch's current stream there.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include "../tensors.h"
#include "launch.h"

#define ATTBALANCE_DISPATCH_KEY CUDA

namespace attbalance {

/// Makes the tensor's device current while it lives.
class CurrentDevice {
  public:
    explicit CurrentDevice(const torch::stable::Tensor& tensor)
        : index_(checked_index(tensor)), guard_(index_) {}

    /// Where this call's tensors are.
    Place place() const { return {aoti_torch_device_type_cuda(), index_}; }

    cudaStream_t stream() const {
        void* stream = nullptr;
        TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index_, &stream));
        return static_cast<cudaStream_t>(stream);
    }

    int multiprocessors() const {
        int count = 0;
        check_cuda(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, index_),
                   "asking for the number of multiprocessors");
        return count;
    }

  private:
    static int32_t checked_index(const torch::stable::Tensor& tensor) {
        STD_TORCH_CHECK(tensor.is_cuda(), "attbalance_ext: this op needs CUDA tensors");
        return tensor.get_device_index();
    }

    int32_t index_;
    torch::stable::accelerator::DeviceGuard guard_;
};

}  // namespace attbalance
