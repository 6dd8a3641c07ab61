// The end of a row's forward pass: its terms, and what its backward pass needs, from the parts that warps and
// blocks left.
#pragma once

#include <cuda_runtime.h>
#include <math.h>

#include <cstdint>

#include "row_math.cuh"

namespace attbalance {

/// Shared memory of `finish_row`.
struct FinishShared {
    float scratch[kWarps];
    float factor[kKeyMeans][kMaxSplits];  // of each part's key sums in the key means
    float unit[kKeyMeans];                // what the mean is still to be multiplied with
};

/// A part's factor in the mean of all parts, whose sum is `total` relative to `max`.
__device__ __forceinline__ float share_of(SoftmaxSum part, float max, float total) {
    return total != 0 ? part.sum != 0 ? expf(part.max - max) / total : 0.0f : 0.0f;
}

/// Terms of a row, and what its backward pass needs, from its parts: at most kMaxSplits. All threads of the
/// block call it. key_sums: (count, 3, D), the teacher's only with a teacher; may be the row's key means.
__device__ __forceinline__ void finish_row(const ForwardArguments& a, int row, const Partial* parts,
                                           int count, const float* key_sums, FinishShared* shared) {
    const int64_t b = row % a.batch;
    const int64_t first = static_cast<int64_t>(row) * a.tokens;
    const Partial all = merged(parts, count);
    const bool any_token = all.in.sum != 0 || all.out.sum != 0;
    const float max = fmaxf(all.in.max, all.out.max);
    const float in = all.in.sum * rescaling(all.in, max), out = all.out.sum * rescaling(all.out, max);
    const float total = in + out;
    const float log_total = any_token ? logf(total) : 0.0f;
    const float log_sum_exp = any_token ? max + log_total : 0.0f;
    const float log_teacher = any_token && a.log_t ? logf(all.teacher.sum) : 0.0f;

    if (static_cast<int>(threadIdx.x) < count) {
        const Partial part = parts[threadIdx.x];
        // 1 / sum overflows where all weights of a region are subnormal. (The other sums are 1 at least.)
        const float unit = all.in.sum < 0x1p-64f ? 0x1p64f : 1.0f;
        shared->factor[kMeanIn][threadIdx.x] = share_of(part.in, all.in.max, all.in.sum * unit);
        if (threadIdx.x == 0) {
            shared->unit[kMeanIn] = unit;
            shared->unit[kMeanOut] = shared->unit[kMeanTeacher] = 1;
        }
        shared->factor[kMeanOut][threadIdx.x] = share_of(part.out, max, total);
        shared->factor[kMeanTeacher][threadIdx.x] = share_of(part.teacher, all.teacher.max, all.teacher.sum);
    }

    // KL(t || p) = sum_j t_j (e^x_j - 1 - x_j), x = log p - log t.
    float divergence = 0;
    for (int j = threadIdx.x; j < a.tokens; j += kThreads) {
        const bool padded = a.padding && a.padding[b * a.tokens + j];
        float log_p = 0, log_t = 0;
        if (!padded) {
            const Score s = a.scores[first + j];
            log_p = below(s, max) - log_total;
            if (a.log_t) {
                const Score t = a.teacher_scores[first + j];
                log_t = below(t, all.teacher.max) - log_teacher;
                // Not log_p - log_t: two roundings of large numbers, where teacher and student almost agree.
                const float x =
                    (((s.hi - t.hi) - (max - all.teacher.max)) + (s.lo - t.lo)) - (log_total - log_teacher);
                const float teacher = expf(log_t);
                const bool near = x > -1 && x < 1;
                divergence += near ? teacher * x * x * exp_remainder(x) : expf(log_p) - teacher - teacher * x;
            }
        }
        a.log_p[first + j] = log_p;
        if (a.log_t) a.log_t[first + j] = log_t;
    }
    divergence = sum_over_block(divergence, shared->scratch);  // a barrier: the factors are there

    if (threadIdx.x == 0) {
        float out_of_box = any_token ? out / total : 0.0f;
        float in_box = 0, rac = 0, log_in_box = -INFINITY;
        if (all.region & kNotANumberWeight) {
            in_box = rac = log_in_box = out_of_box = NAN;
        } else if (all.region & kSomeWeight) {
            in_box = in / total;
            log_in_box =
                in_box > 0.5f ? log1pf(-out_of_box) : ((all.in.max - max) + logf(all.in.sum)) - log_total;
            rac = 0 - 2 * log_in_box;
        }
        a.in_box[row] = in_box;
        a.rac[row] = rac;
        a.mrc[row] = a.log_t && any_token ? divergence : 0.0f;
        float* const stats = a.stats + static_cast<int64_t>(row) * kStats;
        stats[kLogSumExp] = log_sum_exp;
        stats[kLogInBox] = log_in_box;
        stats[kOutOfBox] = out_of_box;
        stats[kTeacherLogSumExp] = any_token && a.log_t ? all.teacher.max + log_teacher : 0.0f;
        if (a.valid && row < a.batch) a.valid[b] = all.region != 0;
    }

    if (!a.key_means) return;
    float* const means = a.key_means + static_cast<int64_t>(row) * kKeyMeans * a.dim;
    for (int kind = 0; kind < kKeyMeans; ++kind) {
        const bool wanted = kind != kMeanTeacher || a.log_t;
        for (int d = threadIdx.x; d < a.dim; d += kThreads) {
            float mean = 0;
            for (int c = 0; wanted && c < count; ++c) {
                mean += shared->factor[kind][c] *
                        key_sums[(static_cast<int64_t>(c) * kKeyMeans + kind) * a.dim + d];
            }
            means[kind * a.dim + d] = mean * shared->unit[kind];
        }
    }
}

/// Rows whose tokens several blocks shared. One block a row.
__global__ void __launch_bounds__(kThreads) finish_rows(const __grid_constant__ ForwardArguments a) {
    extern __shared__ __align__(16) unsigned char shared_memory[];
    const int row = static_cast<int>(blockIdx.x);
    const int64_t first = static_cast<int64_t>(row) * a.splits;
    finish_row(a, row, a.partials + first, a.splits,
               a.key_sums ? a.key_sums + first * kKeyMeans * a.dim : nullptr,
               reinterpret_cast<FinishShared*>(shared_memory));
}

/// Shared memory at the end of a forward block.
struct EndShared {
    Partial block;
    FinishShared finish;
};

/// A block's part of its row is complete: `shared->block`, visible to all threads, and its key sums in
/// memory. Finish the row, or leave the part to `finish_rows`.
__device__ __forceinline__ void end_of_block(const ForwardArguments& a, int row, int split,
                                             const float* key_sums, EndShared* shared) {
    if (a.splits == 1) {
        finish_row(a, row, &shared->block, 1, key_sums, &shared->finish);
    } else if (threadIdx.x == 0) {
        a.partials[static_cast<int64_t>(row) * a.splits + split] = shared->block;
    }
}

}  // namespace attbalance
