// The arithmetic of `attention_terms` on a GPU: scores of more than a float's digits, region weights, sums
// over lanes, warps and blocks (each in one fixed order), online softmax.
#pragma once

#include <cuda_runtime.h>
#include <math.h>

#include <cstdint>

#include "../cuda/storage.cuh"
#include "arguments.h"
#include "launch_plan.h"

namespace attbalance {

__device__ __forceinline__ Score operator+(Score a, Score b) {
    const float hi = a.hi + b.hi;
    const float back = hi - a.hi;
    const float error = (a.hi - (hi - back)) + (b.hi - back);
    return {hi, (a.lo + b.lo) + error};
}

__device__ __forceinline__ Score operator*(Score a, Score scale) {
    const float hi = a.hi * scale.hi;
    const float lo = fmaf(a.hi, scale.hi, -hi) + fmaf(a.hi, scale.lo, a.lo * scale.hi);
    // From where half a digit of hi is worth more than 1, lo would only overflow exp.
    return {hi, fabsf(hi) < 1e6f ? lo : lo - lo};
}

/// score - reference, which is near or above it.
__device__ __forceinline__ float below(Score score, float reference) {
    return (score.hi - reference) + score.lo;
}

/// (e^x - 1 - x) / x^2 for |x| <= 1, without cancellation: the power series, up to x^9 / 11!.
__device__ __forceinline__ float exp_remainder(float x) {
    float r = 1.0f / 39916800;
    r = fmaf(r, x, 1.0f / 3628800);
    r = fmaf(r, x, 1.0f / 362880);
    r = fmaf(r, x, 1.0f / 40320);
    r = fmaf(r, x, 1.0f / 5040);
    r = fmaf(r, x, 1.0f / 720);
    r = fmaf(r, x, 1.0f / 120);
    r = fmaf(r, x, 1.0f / 24);
    r = fmaf(r, x, 1.0f / 6);
    return fmaf(r, x, 0.5f);
}

__device__ __forceinline__ float region_weight(const RegionArguments& region, int64_t b, int token,
                                               int tokens) {
    if (region.weights) return region.weights[b * tokens + token];
    int g = 0, cell = token;
    while (cell >= region.grid[g].rows * region.grid[g].columns) {
        cell -= region.grid[g].rows * region.grid[g].columns;
        ++g;
    }
    const int y = cell / region.grid[g].columns, x = cell % region.grid[g].columns;
    const float* const box = region.boxes + b * 4;
    const float row = cell_weight(box_interval(box[1], box[3], region.grid[g].rows), y, region.rule);
    return row * cell_weight(box_interval(box[0], box[2], region.grid[g].columns), x, region.rule);
}

/// Clamped to [0, 1]; NaN, which only reaches A_in and RAC, as 0.
__device__ __forceinline__ float clamped(float weight) {
    return weight > 0 ? fminf(weight, 1.0f) : 0.0f;
}

__device__ __forceinline__ unsigned region_bits(float weight) {
    return weight > 0 ? kSomeWeight : weight != weight ? kNotANumberWeight : 0u;
}

/// Lanes that share the work of one of kValues sums.
template <int kValues>
constexpr int kLanesOfValue = kWarpSize / kValues;

/// Sum of each of kValues partial sums over the lanes of a warp. While there are several values, half of them
/// move to the other half of the lanes; so in the end value i is known to the lanes from i * kLanesOfValue
/// on.
template <int kValues>
__device__ __forceinline__ Score sum_over_lanes(int lane, const float (&partial)[kValues]) {
    Score value[kValues];
#pragma unroll
    for (int i = 0; i < kValues; ++i) value[i] = {partial[i], 0};
#pragma unroll
    for (int offset = kWarpSize / 2, count = kValues; offset > 0; offset /= 2) {
        const bool exchange = count > 1;
        if (exchange) count /= 2;
        const bool upper = lane & offset;
#pragma unroll
        for (int i = 0; i < count; ++i) {
            const Score mine = exchange && upper ? value[i + count] : value[i];
            const Score other = exchange && !upper ? value[i + count] : value[i];
            Score received = {__shfl_xor_sync(kAllLanes, other.hi, offset), 0};
            if (offset < kWarpSize / 2) received.lo = __shfl_xor_sync(kAllLanes, other.lo, offset);
            value[i] = mine + received;
        }
    }
    return value[0];
}

__device__ __forceinline__ float sum_over_warp(float value) {
#pragma unroll
    for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
        value += __shfl_xor_sync(kAllLanes, value, offset);
    }
    return value;
}

__device__ __forceinline__ float max_over_warp(float value) {
#pragma unroll
    for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
        value = fmaxf(value, __shfl_xor_sync(kAllLanes, value, offset));
    }
    return value;
}

__device__ __forceinline__ unsigned bits_over_warp(unsigned bits) {
    return (__any_sync(kAllLanes, bits & 1u) ? 1u : 0u) | (__any_sync(kAllLanes, bits & 2u) ? 2u : 0u);
}

/// `scratch`: kWarps floats of shared memory. Every thread of the block calls it and gets the sum.
__device__ __forceinline__ float sum_over_block(float value, float* scratch) {
    value = sum_over_warp(value);
    if (threadIdx.x % kWarpSize == 0) scratch[threadIdx.x / kWarpSize] = value;
    __syncthreads();
    float total = 0;
    for (int w = 0; w < kWarps; ++w) total += scratch[w];
    return total;
}

/// exp(from - to) for sums: what a sum relative to `from` is multiplied with to be relative to `to`. 0 for a
/// sum without tokens.
__device__ __forceinline__ float rescaling(SoftmaxSum sum, float to) {
    return sum.sum != 0 ? expf(sum.max - to) : 0.0f;
}

/// Add kTokens tokens to a softmax sum and to its weighted sum of keys. Scores and weights are the same in
/// all lanes, so no branch diverges.
template <typename K, int kTokens, int kElements>
__device__ __forceinline__ void absorb(const Score (&score)[kTokens], const float (&weight)[kTokens],
                                       const PackedRow<K, kElements> (&row)[kTokens], bool with_keys,
                                       SoftmaxSum* sum, float (&keys)[kElements]) {
    float max = sum->max;
#pragma unroll
    for (int i = 0; i < kTokens; ++i) {
        if (weight[i] > 0) max = fmaxf(max, score[i].hi);
    }
    if (max > sum->max) {
        const float correction = expf(sum->max - max);
        sum->max = max;
        sum->sum *= correction;
#pragma unroll
        for (int e = 0; e < kElements; ++e) keys[e] *= correction;
    }
#pragma unroll
    for (int i = 0; i < kTokens; ++i) {
        if (!(weight[i] > 0)) continue;
        const float share = weight[i] * expf(below(score[i], max));
        sum->sum += share;
        if (!with_keys) continue;
        float key[kElements];
        row[i].unpack(key);
#pragma unroll
        for (int e = 0; e < kElements; ++e) keys[e] = fmaf(share, key[e], keys[e]);
    }
}

/// One sum out of a part in each lane.
__device__ __forceinline__ SoftmaxSum merged(SoftmaxSum part) {
    const float max = max_over_warp(part.max);
    return {max, sum_over_warp(part.sum * rescaling(part, max))};
}

/// At most 32 parts as one, in all lanes. Every lane of a warp calls it.
__device__ __forceinline__ Partial merged(const Partial* parts, int count) {
    const int lane = threadIdx.x % kWarpSize;
    const Partial part = lane < count ? parts[lane] : kNoTokens;
    return {merged(part.in), merged(part.out), merged(part.teacher), bits_over_warp(part.region)};
}

}  // namespace attbalance
