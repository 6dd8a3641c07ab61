// The part of the CUDA toolkit that our kernels and launchers use, for a host compiler. Names and meanings
// are the toolkit's; what is not here, the kernels may not use. The emulator (../emulator.h) does the work.
//
// Kernels are in namespace attbalance, where the one array of dynamic shared memory is defined.
#pragma once

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <tuple>
#include <type_traits>
#include <utility>

#define __global__
#define __device__
#define __host__
#define __shared__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))

// --- vectors ----------------------------------------------------------------------------------------------

struct uint3 {
    unsigned x, y, z;
};

struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

struct __align__(8) float2 {
    float x, y;
};
struct __align__(16) float4 {
    float x, y, z, w;
};
struct __align__(8) uint2 {
    unsigned x, y;
};
struct __align__(16) uint4 {
    unsigned x, y, z, w;
};
struct __align__(16) int4 {
    int x, y, z, w;
};

inline float2 make_float2(float x, float y) {
    return {x, y};
}
inline float4 make_float4(float x, float y, float z, float w) {
    return {x, y, z, w};
}
inline uint2 make_uint2(unsigned x, unsigned y) {
    return {x, y};
}
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) {
    return {x, y, z, w};
}
inline int4 make_int4(int x, int y, int z, int w) {
    return {x, y, z, w};
}

// --- what a thread knows and meets others at --------------------------------------------------------------

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

namespace emulation {

/// Where a thread can wait for others.
enum class Call : uint8_t {
    kSyncThreads,
    kSyncThreadsOr,
    kSyncThreadsAnd,
    kSyncWarp,
    kShuffle,
    kShuffleUp,
    kShuffleDown,
    kShuffleXor,
    kBallot,
    kAny,
    kAll,
};

/// Wait for every thread of the block; the votes' result.
int meet_block(Call call, int predicate);

/// Wait for every lane in `mask`; the bits of `value` that this lane gets. `operand`: a shuffle's source
/// lane, delta or lane mask.
uint64_t meet_warp(Call call, unsigned mask, uint64_t value, int operand, int width);

template <typename T>
T shuffle(Call call, unsigned mask, T value, int operand, int width) {
    static_assert(std::is_same_v<T, int> || std::is_same_v<T, unsigned> || std::is_same_v<T, float> ||
                      std::is_same_v<T, double> || std::is_same_v<T, long long>,
                  "shuffles take int, unsigned, float, double and long long");
    uint64_t bits = 0;
    memcpy(&bits, &value, sizeof(T));
    bits = meet_warp(call, mask, bits, operand, width);
    memcpy(&value, &bits, sizeof(T));
    return value;
}

template <typename To, typename From>
To bit_cast(From value) {
    static_assert(sizeof(To) == sizeof(From));
    To result;
    memcpy(&result, &value, sizeof(To));
    return result;
}

}  // namespace emulation

inline void __syncthreads() {
    emulation::meet_block(emulation::Call::kSyncThreads, 0);
}
inline int __syncthreads_or(int predicate) {
    return emulation::meet_block(emulation::Call::kSyncThreadsOr, predicate);
}
inline int __syncthreads_and(int predicate) {
    return emulation::meet_block(emulation::Call::kSyncThreadsAnd, predicate);
}
inline void __syncwarp(unsigned mask = 0xffffffffu) {
    emulation::meet_warp(emulation::Call::kSyncWarp, mask, 0, 0, 32);
}
template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
    return emulation::shuffle(emulation::Call::kShuffle, mask, value, source, width);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
    return emulation::shuffle(emulation::Call::kShuffleUp, mask, value, static_cast<int>(delta), width);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
    return emulation::shuffle(emulation::Call::kShuffleDown, mask, value, static_cast<int>(delta), width);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32) {
    return emulation::shuffle(emulation::Call::kShuffleXor, mask, value, lane_mask, width);
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
    return static_cast<unsigned>(emulation::meet_warp(emulation::Call::kBallot, mask, predicate != 0, 0, 32));
}
inline int __any_sync(unsigned mask, int predicate) {
    return static_cast<int>(emulation::meet_warp(emulation::Call::kAny, mask, predicate != 0, 0, 32));
}
inline int __all_sync(unsigned mask, int predicate) {
    return static_cast<int>(emulation::meet_warp(emulation::Call::kAll, mask, predicate != 0, 0, 32));
}

// --- arithmetic and memory --------------------------------------------------------------------------------

inline int min(int a, int b) {
    return a < b ? a : b;
}
inline int max(int a, int b) {
    return a > b ? a : b;
}
inline int __popc(unsigned value) {
    return __builtin_popcount(value);
}
inline int __ffs(int value) {
    return __builtin_ffs(value);
}
inline int __clz(int value) {
    return value == 0 ? 32 : __builtin_clz(static_cast<unsigned>(value));
}
inline unsigned __float_as_uint(float value) {
    return emulation::bit_cast<unsigned>(value);
}
inline float __uint_as_float(unsigned value) {
    return emulation::bit_cast<float>(value);
}
inline int __float_as_int(float value) {
    return emulation::bit_cast<int>(value);
}
inline float __int_as_float(int value) {
    return emulation::bit_cast<float>(value);
}

namespace emulation {

template <typename T>
constexpr bool kHasCachedAccess =
    std::is_same_v<T, uint4> || std::is_same_v<T, float4> || std::is_same_v<T, float>;

}  // namespace emulation

template <typename T>
T __ldg(const T* address) {
    static_assert(emulation::kHasCachedAccess<T>, "__ldg takes uint4, float4 and float");
    return *address;
}
template <typename T>
T __ldcs(const T* address) {
    static_assert(emulation::kHasCachedAccess<T>, "__ldcs takes uint4, float4 and float");
    return *address;
}
template <typename T>
void __stcs(T* address, T value) {
    static_assert(emulation::kHasCachedAccess<T>, "__stcs takes uint4, float4 and float");
    *address = value;
}

// --- the host's side --------------------------------------------------------------------------------------

enum cudaError_t {
    cudaSuccess = 0,
    cudaErrorInvalidValue = 1,
    cudaErrorInvalidConfiguration = 9,
    cudaErrorLaunchFailure = 719,
};
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount = 16 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
using cudaStream_t = struct CUstream_st*;

struct cudaLaunchConfig_t {
    dim3 gridDim;
    dim3 blockDim;
    size_t dynamicSmemBytes;
    cudaStream_t stream;
};

/// What went wrong last, in the emulator's own words.
const char* cudaGetErrorString(cudaError_t error);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);

namespace emulation {

cudaError_t set_attribute(const void* kernel, cudaFuncAttribute attribute, int value);

/// Run the kernel to its end. `thread(arguments)` is what each thread does.
cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel, void (*thread)(const void*),
                   const void* arguments);

}  // namespace emulation

template <typename Function>
cudaError_t cudaFuncSetAttribute(Function* kernel, cudaFuncAttribute attribute, int value) {
    return emulation::set_attribute(reinterpret_cast<const void*>(kernel), attribute, value);
}

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
    using Call = std::tuple<void (*)(Parameters...), Parameters...>;
    const Call call(kernel, std::forward<Arguments>(arguments)...);
    const auto thread = [](const void* erased) {
        std::apply([](auto kernel, const auto&... values) { kernel(values...); },
                   *static_cast<const Call*>(erased));
    };
    return emulation::launch(*config, reinterpret_cast<const void*>(kernel), thread, &call);
}
