// Kernels that each do one thing, right or wrong, for the emulator's own tests. Pointers come as integers
// from Python (Tensor.data_ptr()).
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <tuple>

#include "controls.h"
#include "cuda/launch.h"

namespace attbalance {

__device__ __forceinline__ int linear_thread() {
    return static_cast<int>((threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x);
}

__device__ __forceinline__ int linear_block() {
    return static_cast<int>((blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x);
}

// --- where a thread is ------------------------------------------------------------------------------------

__global__ void indices(int* out) {
    const int threads = static_cast<int>(blockDim.x * blockDim.y * blockDim.z);
    int* const row = out + 12 * (static_cast<int64_t>(linear_block()) * threads + linear_thread());
    const unsigned found[12] = {threadIdx.x, threadIdx.y, threadIdx.z, blockIdx.x, blockIdx.y, blockIdx.z,
                                blockDim.x,  blockDim.y,  blockDim.z,  gridDim.x,  gridDim.y,  gridDim.z};
    for (int i = 0; i < 12; ++i) row[i] = static_cast<int>(found[i]);
}

/// Cannot be found by name.
static __global__ void nameless() {}

// --- warps ------------------------------------------------------------------------------------------------

enum Shuffle { kIndexed, kUp, kDown, kXor };

template <typename T>
__global__ void shuffle(const T* in, const int* operand, T* out, int kind, int width) {
    const int i = linear_thread();
    constexpr unsigned all = 0xffffffffu;
    if (kind == kIndexed) out[i] = __shfl_sync(all, in[i], operand[i], width);
    if (kind == kUp) out[i] = __shfl_up_sync(all, in[i], static_cast<unsigned>(operand[i]), width);
    if (kind == kDown) out[i] = __shfl_down_sync(all, in[i], static_cast<unsigned>(operand[i]), width);
    if (kind == kXor) out[i] = __shfl_xor_sync(all, in[i], operand[i], width);
}

/// Lanes below `split` vote among themselves, and so do the others, each half in its own branch.
__global__ void divided_votes(const int* predicate, int split, unsigned* ballot, int* any, int* all,
                              int* next) {
    const int lane = linear_thread(), i = lane;
    const unsigned low = (1u << split) - 1;
    if (lane < split) {
        ballot[i] = __ballot_sync(low, predicate[i]);
        any[i] = __any_sync(low, predicate[i]);
        all[i] = __all_sync(low, predicate[i]);
        next[i] = __shfl_sync(low, i, (lane + 1) % split);
    } else {
        next[i] = __shfl_sync(~low, i, lane == 31 ? split : lane + 1);
        all[i] = __all_sync(~low, predicate[i]);
        any[i] = __any_sync(~low, predicate[i]);
        ballot[i] = __ballot_sync(~low, predicate[i]);
    }
}

/// Lanes write, then read their neighbour's value; right only with a __syncwarp between.
__global__ void neighbours(int* out, bool synchronise) {
    extern __shared__ __align__(16) unsigned char shared_memory[];
    int* const values = reinterpret_cast<int*>(shared_memory);
    const int lane = linear_thread();
    values[lane] = lane;
    if (synchronise) __syncwarp();
    out[lane] = values[lane ^ 1];
}

enum Misuse { kLaneMissing, kLaneReturned, kNotInMask, kUnnamedSource, kBadWidth, kTwoMasks, kTwoCalls };

__global__ void misused_warp(int kind) {
    const int lane = linear_thread() % 32;
    constexpr unsigned all = 0xffffffffu;
    if (kind == kLaneMissing) {
        if (lane != 5) __shfl_sync(all, 1, 0);
        __syncthreads();
    }
    if (kind == kLaneReturned) {
        if (lane == 7) return;
        __syncwarp();
    }
    if (kind == kNotInMask && lane < 2) __any_sync(2u, 1);
    if (kind == kUnnamedSource && lane < 2) __shfl_down_sync(3u, 1, 1u);
    if (kind == kBadWidth) __shfl_xor_sync(all, 1, 1, 12);
    if (kind == kTwoMasks) __ballot_sync(lane < 16 ? all : 0xffff0000u, 1);
    if (kind == kTwoCalls) lane < 16 ? __any_sync(all, 1) : __all_sync(all, 1);
}

// --- blocks -----------------------------------------------------------------------------------------------

/// Sums one value a thread in a tree; right only with a barrier in each turn of the loop.
__global__ void block_sum(const float* in, float* out, bool synchronise) {
    extern __shared__ __align__(16) unsigned char shared_memory[];
    float* const partial = reinterpret_cast<float*>(shared_memory);
    const int threads = static_cast<int>(blockDim.x), i = linear_thread();
    partial[i] = in[linear_block() * threads + i];
    for (int stride = threads / 2; stride > 0; stride /= 2) {
        if (synchronise) __syncthreads();
        if (i < stride) partial[i] += partial[i + stride];
    }
    if (i == 0) out[linear_block()] = partial[0];
}

__global__ void block_votes(const int* predicate, int* any, int* all) {
    const int i = linear_thread();
    any[i] = __syncthreads_or(predicate[i]);
    all[i] = __syncthreads_and(predicate[i]);
}

enum LostBarrier { kReturnedEarly, kTwoBarriers, kBarrierAndShuffle, kOnceMore };

__global__ void lost_barrier(int kind) {
    const int i = linear_thread();
    if (kind == kReturnedEarly) {
        if (i == 3) return;
        __syncthreads();
    }
    if (kind == kTwoBarriers) {
        if (i < 40) {
            __syncthreads();
        } else {
            __syncthreads_or(1);
        }
    }
    if (kind == kBarrierAndShuffle) {
        if (i < 32) {
            __syncthreads();
        } else {
            __shfl_sync(0xffffffffu, i, i == 40 ? 0 : 1);
            __syncthreads_and(1);
        }
    }
    if (kind == kOnceMore) {
        for (int turn = 0; turn < (i < 32 ? 3 : 2); ++turn) __syncthreads();
    }
}

/// Each block adds to what the one before it left behind: right only in the order of a single multiprocessor.
__global__ void chained_blocks(int* out) {
    const int block = linear_block();
    out[block] = block == 0 ? 1 : out[block - 1] + 1;
}

// --- shared memory ----------------------------------------------------------------------------------------

__global__ void read_shared(float* out) {
    extern __shared__ __align__(16) unsigned char shared_memory[];
    out[linear_thread()] = reinterpret_cast<const float*>(shared_memory)[linear_thread()];
}

__global__ void write_shared(int offset, int value) {
    extern __shared__ __align__(16) unsigned char shared_memory[];
    shared_memory[offset] = static_cast<unsigned char>(value);
}

/// One block leaves a value in shared memory, the next one finds it.
__global__ void leave_in_shared(float* out) {
    extern __shared__ __align__(16) unsigned char shared_memory[];
    float* const kept = reinterpret_cast<float*>(shared_memory);
    if (linear_block() == 0) *kept = 1.0f;
    out[linear_block()] = *kept;
}

// --- global memory and bits -------------------------------------------------------------------------------

__global__ void copy(const float* in, float* out, int count) {
    for (int i = linear_thread(); i < count; i += static_cast<int>(blockDim.x)) out[i] = in[i];
}

__global__ void copy_vectors(const uint4* in, uint4* out, int count) {
    const int i = linear_thread();
    if (i < count) __stcs(out + i, i % 2 ? __ldg(in + i) : __ldcs(in + i));
}

__global__ void bit_functions(const int* in, int* out, int count) {
    for (int i = 0; i < count; ++i) {
        out[4 * i] = __popc(static_cast<unsigned>(in[i]));
        out[4 * i + 1] = __ffs(in[i]);
        out[4 * i + 2] = __clz(in[i]);
        out[4 * i + 3] = __float_as_int(__int_as_float(in[i]));
    }
}

__global__ void widen(const unsigned short* in, float* bfloat, float* half, int count) {
    for (int i = 0; i < count; ++i) {
        bfloat[i] = __bfloat162float(__ushort_as_bfloat16(in[i]));
        half[i] = __half2float(__ushort_as_half(in[i]));
    }
}

__global__ void narrow(const float* in, unsigned short* bfloat, unsigned short* half, int count) {
    for (int i = 0; i < count; ++i) {
        bfloat[i] = __bfloat16_as_ushort(__float2bfloat16_rn(in[i]));
        half[i] = __half_as_ushort(__float2half_rn(in[i]));
    }
}

}  // namespace attbalance

namespace {

using Size = std::tuple<unsigned, unsigned, unsigned>;

template <typename T>
T converted(std::conditional_t<std::is_pointer_v<T>, uintptr_t, T> value) {
    if constexpr (std::is_pointer_v<T>) {
        return reinterpret_cast<T>(value);
    } else {
        return value;
    }
}

/// name(grid, block, bytes of shared memory, ...): launches the kernel.
template <typename... Parameters>
void bind(pybind11::module_& module, const char* name, void (*kernel)(Parameters...)) {
    module.def(name, [=](Size grid, Size block, size_t shared_bytes,
                         std::conditional_t<std::is_pointer_v<Parameters>, uintptr_t, Parameters>... values) {
        const auto dim = [](Size size) {
            return dim3(std::get<0>(size), std::get<1>(size), std::get<2>(size));
        };
        attbalance::launch(name, kernel, dim(grid), dim(block), shared_bytes, nullptr,
                           converted<Parameters>(values)...);
    });
}

}  // namespace

PYBIND11_MODULE(_tiny_kernels, module) {
    using namespace attbalance;
    emulation::bind_controls(module);
    bind(module, "indices", indices);
    bind(module, "nameless", nameless);
    bind(module, "shuffle_int", shuffle<int>);
    bind(module, "shuffle_unsigned", shuffle<unsigned>);
    bind(module, "shuffle_float", shuffle<float>);
    bind(module, "shuffle_double", shuffle<double>);
    bind(module, "shuffle_long_long", shuffle<long long>);
    bind(module, "divided_votes", divided_votes);
    bind(module, "neighbours", neighbours);
    bind(module, "misused_warp", misused_warp);
    bind(module, "block_sum", block_sum);
    bind(module, "block_votes", block_votes);
    bind(module, "lost_barrier", lost_barrier);
    bind(module, "chained_blocks", chained_blocks);
    bind(module, "read_shared", read_shared);
    bind(module, "write_shared", write_shared);
    bind(module, "leave_in_shared", leave_in_shared);
    bind(module, "copy", copy);
    bind(module, "copy_vectors", copy_vectors);
    bind(module, "bit_functions", bit_functions);
    bind(module, "widen", widen);
    bind(module, "narrow", narrow);
    module.def("multiprocessors", [] {
        int count = 0;
        check_cuda(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, 0), "asking");
        return count;
    });
    module.def("allow_shared", [](int bytes) {
        check_cuda(cudaFuncSetAttribute(read_shared, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes),
                   "allow_shared");
    });
}
