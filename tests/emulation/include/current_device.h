// csrc/cuda/current_device.h for the emulated device: the tensors are on the CPU.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include "cuda/launch.h"
#include "tensors.h"

#define ATTBALANCE_DISPATCH_KEY CPU

namespace attbalance {

class CurrentDevice {
  public:
    explicit CurrentDevice(const torch::stable::Tensor& tensor) { check_place(tensor, "a tensor", place()); }

    Place place() const { return {}; }

    cudaStream_t stream() const { return nullptr; }

    int multiprocessors() const {
        int count = 0;
        check_cuda(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, 0),
                   "asking for the number of multiprocessors");
        return count;
    }
};

}  // namespace attbalance
