// Forward, for any D, alignment and strides: slower, and needs nothing.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "finish_rows.cuh"

namespace attbalance {

/// Shared memory of `forward_any`: a tile of one token a lane.
struct AnyShared {
    EndShared end;
    Score score[kWarpSize];
    Score teacher_score[kWarpSize];
    float in[kWarpSize];  // of the tile's tokens, relative to the sums' new maxima; 0 at padding
    float out[kWarpSize];
    float teacher[kWarpSize];
    float correction[kKeyMeans];  // of the sums so far
};

/// One lane's token joins a softmax sum. Returns its share; `correction` is the factor of what was there.
__device__ __forceinline__ float absorb_tile(Score score, float weight, SoftmaxSum* sum, float* correction) {
    const float max = fmaxf(sum->max, max_over_warp(weight > 0 ? score.hi : -INFINITY));
    *correction = max > sum->max ? expf(sum->max - max) : 1.0f;
    const float share = weight > 0 ? weight * expf(below(score, max)) : 0.0f;
    sum->sum = sum->sum * *correction + sum_over_warp(share);
    sum->max = max;
    return share;
}

__device__ __forceinline__ Score any_score(const KeysArguments& keys, int64_t b, int token, int dim,
                                           int lane) {
    const float* const query = keys.query + b * dim;
    const int64_t first = b * keys.batch_stride + token * keys.token_stride;
    Score partial = {0, 0};
    for (int d = lane; d < dim; d += kWarpSize) {
        partial = partial + Score{query[d] * load_value(keys.key, keys.dtype, first + d), 0};
    }
    Score total = partial;
#pragma unroll
    for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
        total = total + Score{__shfl_xor_sync(kAllLanes, total.hi, offset),
                              __shfl_xor_sync(kAllLanes, total.lo, offset)};
    }
    return total * keys.scale;
}

/// `forward_rows` for any D, alignment and strides, each layer with its own dtypes: single values are loaded,
/// and each key twice, the second time most likely from a cache.
__global__ void __launch_bounds__(kThreads) forward_any(const __grid_constant__ ForwardArguments a) {
    extern __shared__ __align__(16) unsigned char shared_memory[];
    AnyShared& shared = *reinterpret_cast<AnyShared*>(shared_memory);

    const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
    const int row = static_cast<int>(blockIdx.x) / a.splits, split = static_cast<int>(blockIdx.x) % a.splits;
    const int layer = row / a.batch;
    const int64_t b = row % a.batch;
    const KeysArguments& student = a.student[layer];
    const KeysArguments& teacher = a.teacher[layer];
    const bool with_teacher = a.log_t != nullptr;
    const int begin = static_cast<int>(static_cast<int64_t>(a.tokens) * split / a.splits);
    const int end = static_cast<int>(static_cast<int64_t>(a.tokens) * (split + 1) / a.splits);
    float* const key_sums =
        a.key_sums ? a.key_sums + static_cast<int64_t>(blockIdx.x) * kKeyMeans * a.dim : nullptr;
    if (key_sums) {
        // A thread touches the same columns here, in every tile, and in finish_row.
        for (int kind = 0; kind < kKeyMeans; ++kind) {
            for (int d = threadIdx.x; d < a.dim; d += kThreads) key_sums[kind * a.dim + d] = 0;
        }
    }

    Partial mine = kNoTokens;  // of warp 0
    for (int base = begin; base < end; base += kWarpSize) {
        const int count = min(kWarpSize, end - base);
        for (int i = warp; i < count; i += kWarps) {
            if (a.padding && a.padding[b * a.tokens + base + i]) continue;
            const Score score = any_score(student, b, base + i, a.dim, lane);
            const Score teacher_score =
                with_teacher ? any_score(teacher, b, base + i, a.dim, lane) : Score{0, 0};
            if (lane != 0) continue;
            const int64_t place = static_cast<int64_t>(row) * a.tokens + base + i;
            shared.score[i] = a.scores[place] = score;
            if (with_teacher) shared.teacher_score[i] = a.teacher_scores[place] = teacher_score;
        }
        __syncthreads();
        if (warp == 0) {
            const int own = base + lane;
            const bool live = lane < count && !(a.padding && a.padding[b * a.tokens + own]);
            const float raw_weight = live ? region_weight(a.region, b, own, a.tokens) : 0.0f;
            const float m = clamped(raw_weight);
            const Score score = live ? shared.score[lane] : Score{0, 0};
            const Score teacher_score = live && with_teacher ? shared.teacher_score[lane] : Score{0, 0};
            mine.region |= bits_over_warp(region_bits(raw_weight));
            float in_correction, out_correction, teacher_correction;
            shared.in[lane] = absorb_tile(score, m, &mine.in, &in_correction);
            shared.out[lane] = absorb_tile(score, live ? 1 - m : 0.0f, &mine.out, &out_correction);
            shared.teacher[lane] = absorb_tile(teacher_score, live && with_teacher ? 1.0f : 0.0f,
                                               &mine.teacher, &teacher_correction);
            if (lane == 0) {
                shared.correction[kMeanIn] = in_correction;
                shared.correction[kMeanOut] = out_correction;
                shared.correction[kMeanTeacher] = teacher_correction;
            }
        }
        __syncthreads();
        for (int d = threadIdx.x; key_sums && d < a.dim; d += kThreads) {
            float in = shared.correction[kMeanIn] * key_sums[kMeanIn * a.dim + d];
            float out = shared.correction[kMeanOut] * key_sums[kMeanOut * a.dim + d];
            float from_teacher = shared.correction[kMeanTeacher] * key_sums[kMeanTeacher * a.dim + d];
            for (int i = 0; i < count; ++i) {
                if (a.padding && a.padding[b * a.tokens + base + i]) continue;
                const float key =
                    load_value(student.key, student.dtype,
                               b * student.batch_stride + (base + i) * student.token_stride + d);
                in = fmaf(shared.in[i], key, in);
                out = fmaf(shared.out[i], key, out);
                from_teacher = fmaf(shared.teacher[i], key, from_teacher);
            }
            key_sums[kMeanIn * a.dim + d] = in;
            key_sums[kMeanOut * a.dim + d] = out;
            key_sums[kMeanTeacher * a.dim + d] = from_teacher;
        }
        // No barrier: the next tile writes what was read here only after its first one.
    }
    if (threadIdx.x == 0) shared.end.block = mine;
    __syncthreads();
    end_of_block(a, row, split, key_sums, &shared.end);
}

}  // namespace attbalance
