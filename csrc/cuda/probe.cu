// Whether this library's kernels can run on the current device: it may have no machine code for it, or the
// driver may be too old for the runtime that is linked in. Asked before a backend is chosen, so that another
// one can be.
#include <cuda_runtime.h>

namespace {
__global__ void probe() {}
}  // namespace

/// Null, or why not.
extern "C" __attribute__((visibility("default"))) const char* attbalance_cuda_problem() {
    cudaFuncAttributes attributes;
    const cudaError_t error = cudaFuncGetAttributes(&attributes, probe);
    if (error == cudaSuccess) return nullptr;
    cudaGetLastError();  // not to be found by the next who asks
    return cudaGetErrorString(error);
}
