// Starting a kernel, and telling when that failed. No torch header.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace attbalance {

/// Raise what the runtime reports.
inline void check_cuda(cudaError_t error, const char* doing) {
    if (error != cudaSuccess) {
        throw std::runtime_error(std::string("attbalance_ext: ") + doing + ": " + cudaGetErrorString(error));
    }
}

/// Queue kernel(arguments...) on `stream`; returns at once. Arguments travel by value. Nothing is launched
/// for an empty grid, which the runtime would refuse.
template <typename... Parameters, typename... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
            cudaStream_t stream, Arguments&&... arguments) {
    if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
    cudaLaunchConfig_t config = {};
    config.gridDim = grid;
    config.blockDim = block;
    config.dynamicSmemBytes = shared_bytes;
    config.stream = stream;
    check_cuda(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...), name);
}

}  // namespace attbalance
