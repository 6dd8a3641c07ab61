// `attention_terms` on a GPU. No torch header.
//
// Forward: a warp reads a token's key once, as one row of registers: its score, then its share of the
// weighted means of the keys, with online softmax. Tokens are spread over the warps of a block, and over
// blocks where rows are few; partial sums are merged in a fixed order. A row is one (layer, sample).
// Backward: writes dK from the scores and dq from the key means; reads no key.
//
// Two paths: `_rows` kernels need keys that 128-bit loads can read, and D <= 1024; `_any` kernels need
// nothing.
#pragma once

#include <cuda_runtime.h>
#include <math.h>

#include <cstdint>

#include "../cuda/storage.cuh"
#include "../dtype.h"
#include "attention_terms.h"
#include "launch_plan.h"
#include "region.h"

namespace attbalance {

constexpr unsigned kAllLanes = 0xffffffffu;

/// Layers of one launch: what fits in the 4 KiB of arguments that every architecture takes.
constexpr int kLaunchLayers = 16;

constexpr int kMaxGrids = 16;

/// A float and what rounding left of it: hi + lo. Scores reach 50, where a float's last digit is worth more
/// than the KL divergence of a teacher that almost agrees.
struct Score {
    float hi;
    float lo;
};

/// Region weights m: boxes (B, 4) cxcywh on grids, or weights (B, N); the other is null.
struct RegionArguments {
    struct Grid {
        int rows;
        int columns;
    };
    const float* boxes;
    const float* weights;
    Grid grid[kMaxGrids];
    Rule rule;
};

/// Keys (B, N, D) of one layer and the query of each sample. Strides in elements; D is contiguous.
struct KeysArguments {
    const float* query;  // (B, D)
    const void* key;
    int64_t batch_stride;
    int64_t token_stride;
    Score scale;
    Dtype dtype;
};

/// Sum over tokens of w_j exp(s_j - max).
struct SoftmaxSum {
    float max;  // -inf: no token yet
    float sum;
};

/// What some of a row's tokens contribute to it. Together `in` and `out` cover every token: p m + p (1 - m) =
/// p.
struct Partial {
    SoftmaxSum in;       // w_j = m_j
    SoftmaxSum out;      // w_j = 1 - m_j
    SoftmaxSum teacher;  // w_j = 1, the teacher's scores
    float poison;        // 0, or NaN where a student score is not finite
    float teacher_poison;
    int region_some;  // a token that is not padding has m > 0
    int region_nan;   // or NaN
};

struct ForwardArguments {
    KeysArguments student[kLaunchLayers];
    KeysArguments teacher[kLaunchLayers];  // of the first layer null: no teacher
    RegionArguments region;
    const bool* padding;  // (B, N) or null
    int batch;
    int tokens;
    int dim;
    int splits;  // blocks that share a row
    // Results; layers of this launch.
    float* in_box;     // (L, B)
    float* rac;        // (L, B)
    float* mrc;        // (L, B)
    bool* valid;       // (B,), or null where another launch writes it
    float* log_p;      // (L, B, N)
    float* log_t;      // (L, B, N) or null
    float* stats;      // (L, B, 4), see Stat
    float* key_means;  // (L, B, 3, D), see KeyMean, or null
    // Workspace.
    Score* scores;          // (L, B, N)
    Score* teacher_scores;  // (L, B, N) or null
    Partial* partials;      // (L, B, splits), or null with one split
    float* key_sums;        // (L, B, splits, 3, D); with one split, key_means; null without key means
};

struct BackwardLayer {
    const float* query;  // (B, D)
    float* grad_query;   // (B, D) or null
    void* grad_key;      // (B, N, D) or null
    int64_t batch_stride;
    int64_t token_stride;
    float scale;
    Dtype dtype;
};

struct BackwardArguments {
    BackwardLayer layer[kLaunchLayers];
    RegionArguments region;
    const bool* padding;  // (B, N) or null
    int batch;
    int tokens;
    int dim;
    int tile;   // tokens of one block, <= kThreads
    int tiles;  // blocks that share a row
    const float* grad_in_box;
    const float* grad_rac;
    const float* grad_mrc;
    const float* in_box;     // (L, B)
    const float* log_p;      // (L, B, N)
    const float* log_t;      // (L, B, N) or null
    const float* stats;      // (L, B, 4)
    const float* key_means;  // (L, B, 3, D) or null
};

// --- arithmetic
// ------------------------------------------------------------------------------------------------------

__device__ __forceinline__ Score operator+(Score a, Score b) {
    const float hi = a.hi + b.hi;
    const float back = hi - a.hi;
    const float error = (a.hi - (hi - back)) + (b.hi - back);
    return {hi, (a.lo + b.lo) + error};
}

__device__ __forceinline__ Score operator*(Score a, Score scale) {
    const float hi = a.hi * scale.hi;
    return {hi, fmaf(a.hi, scale.hi, -hi) + fmaf(a.hi, scale.lo, a.lo * scale.hi)};
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

// --- reductions, each in one fixed order
// -----------------------------------------------------------------------------

/// Sum of each of kValues partial sums over the lanes of a warp, known to all lanes. Lanes share the work:
/// while there are several values, half of them move to the other half of the lanes.
template <int kValues>
__device__ __forceinline__ void sum_over_lanes(int lane, const float (&partial)[kValues],
                                               Score (&total)[kValues]) {
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
#pragma unroll
    for (int i = 0; i < kValues; ++i) {
        if constexpr (kValues == 1) {
            total[i] = value[i];  // every lane has it
            continue;
        }
        const int source = i * (kWarpSize / kValues);
        total[i] = {__shfl_sync(kAllLanes, value[0].hi, source), __shfl_sync(kAllLanes, value[0].lo, source)};
    }
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

/// `scratch`: kWarps floats of shared memory. Every thread of the block calls it and gets the sum.
__device__ __forceinline__ float sum_over_block(float value, float* scratch) {
    value = sum_over_warp(value);
    if (threadIdx.x % kWarpSize == 0) scratch[threadIdx.x / kWarpSize] = value;
    __syncthreads();
    float total = 0;
    for (int w = 0; w < kWarps; ++w) total += scratch[w];
    return total;
}

// --- online softmax
// --------------------------------------------------------------------------------------------------

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

/// The parts of one kind, in order, as one sum.
__device__ __forceinline__ SoftmaxSum merged(const Partial* parts, int count, SoftmaxSum Partial::* kind) {
    SoftmaxSum all = {-INFINITY, 0};
    for (int c = 0; c < count; ++c) all.max = fmaxf(all.max, (parts[c].*kind).max);
    for (int c = 0; c < count; ++c) {
        const SoftmaxSum part = parts[c].*kind;
        all.sum += part.sum * rescaling(part, all.max);
    }
    return all;
}

__device__ __forceinline__ Partial merged(const Partial* parts, int count) {
    Partial all = {};
    all.in = merged(parts, count, &Partial::in);
    all.out = merged(parts, count, &Partial::out);
    all.teacher = merged(parts, count, &Partial::teacher);
    for (int c = 0; c < count; ++c) {
        all.poison += parts[c].poison;
        all.teacher_poison += parts[c].teacher_poison;
        all.region_some |= parts[c].region_some;
        all.region_nan |= parts[c].region_nan;
    }
    return all;
}

// --- forward
// ---------------------------------------------------------------------------------------------------------

/// Terms of a row, and what its backward pass needs, from its parts. All threads of the block call it.
/// key_sums: (count, 3, D), may be the row's key means. scratch: kWarps floats of shared memory.
__device__ __forceinline__ void finish_row(const ForwardArguments& a, int row, const Partial* parts,
                                           int count, const float* key_sums, float* scratch) {
    const int64_t b = row % a.batch;
    const int64_t first = static_cast<int64_t>(row) * a.tokens;
    const Partial all = merged(parts, count);
    const bool any_token = all.in.sum != 0 || all.out.sum != 0;
    const float max = fmaxf(all.in.max, all.out.max);
    const float in = all.in.sum * rescaling(all.in, max), out = all.out.sum * rescaling(all.out, max);
    const float total = in + out;
    const float log_total = any_token ? logf(total) : 0.0f;
    const float log_sum_exp = any_token ? max + log_total + all.poison : 0.0f;
    const float log_teacher = any_token && a.log_t ? logf(all.teacher.sum) : 0.0f;

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
    divergence = sum_over_block(divergence, scratch);

    if (threadIdx.x == 0) {
        float out_of_box = any_token ? out / total + all.poison : 0.0f;
        float in_box = 0, rac = 0, log_in_box = -INFINITY;
        if (all.region_nan) {
            in_box = rac = log_in_box = out_of_box = NAN;
        } else if (all.region_some) {
            in_box = in / total + all.poison;
            log_in_box = in_box > 0.5f ? log1pf(-out_of_box)
                                       : ((all.in.max - max) + logf(all.in.sum)) - log_total + all.poison;
            rac = 0 - 2 * log_in_box;
        }
        a.in_box[row] = in_box;
        a.rac[row] = rac;
        a.mrc[row] = a.log_t && any_token ? divergence + (all.poison + all.teacher_poison) : 0.0f;
        float* const stats = a.stats + static_cast<int64_t>(row) * kStats;
        stats[kLogSumExp] = log_sum_exp;
        stats[kLogInBox] = log_in_box;
        stats[kOutOfBox] = out_of_box;
        stats[kTeacherLogSumExp] =
            any_token && a.log_t ? all.teacher.max + log_teacher + all.teacher_poison : 0.0f;
        if (a.valid && row < a.batch) a.valid[b] = all.region_some || all.region_nan;
    }

    if (!a.key_means) return;
    float* const means = a.key_means + static_cast<int64_t>(row) * kKeyMeans * a.dim;
    for (int d = threadIdx.x; d < a.dim; d += kThreads) {
        float mean_in = 0, mean_out = 0, mean_teacher = 0;
        for (int c = 0; c < count; ++c) {
            const float* const sums = key_sums + static_cast<int64_t>(c) * kKeyMeans * a.dim;
            const Partial& part = parts[c];
            mean_in += rescaling(part.in, all.in.max) / all.in.sum * sums[kMeanIn * a.dim + d];
            mean_out += rescaling(part.out, max) / total * sums[kMeanOut * a.dim + d];
            mean_teacher +=
                rescaling(part.teacher, all.teacher.max) / all.teacher.sum * sums[kMeanTeacher * a.dim + d];
        }
        means[kMeanIn * a.dim + d] = all.in.sum != 0 ? mean_in : 0.0f;
        means[kMeanOut * a.dim + d] = any_token ? mean_out : 0.0f;
        means[kMeanTeacher * a.dim + d] = all.teacher.sum != 0 ? mean_teacher : 0.0f;
    }
}

/// A block's part of its row is complete: in `part`, and its key sums in memory. Finish the row, or leave the
/// part to `finish_rows`. part, scratch: shared memory, `part` visible to all threads.
__device__ __forceinline__ void end_of_block(const ForwardArguments& a, int row, int split,
                                             const Partial* part, const float* key_sums, float* scratch) {
    if (a.splits == 1) {
        finish_row(a, row, part, 1, key_sums, scratch);
    } else if (threadIdx.x == 0) {
        a.partials[static_cast<int64_t>(row) * a.splits + split] = *part;
    }
}

/// Rows whose tokens several blocks shared. One block a row.
__global__ void __launch_bounds__(kThreads) finish_rows(const __grid_constant__ ForwardArguments a) {
    extern __shared__ __align__(16) unsigned char shared_memory[];
    const int row = static_cast<int>(blockIdx.x);
    const int64_t first = static_cast<int64_t>(row) * a.splits;
    finish_row(a, row, a.partials + first, a.splits,
               a.key_sums ? a.key_sums + first * kKeyMeans * a.dim : nullptr,
               reinterpret_cast<float*>(shared_memory));
}

/// Shared memory of the forward kernels.
struct ForwardShared {
    Partial warp[kWarps];
    Partial block;
    float scratch[kWarps];
};

/// Bytes of shared memory of `forward_rows`: the merge of one kind of key sums over the warps comes behind.
inline size_t forward_rows_shared_bytes(int64_t dim) {
    return sizeof(ForwardShared) + static_cast<size_t>(kWarps * dim) * sizeof(float);
}

/// The key sums of one kind over the warps of a block, in order. Every thread of the block calls it.
template <typename K, int kElements>
__device__ __forceinline__ void merge_key_sums(const float (&keys)[kElements], float factor, int dim,
                                               float* buffer, float* out) {
    const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
#pragma unroll
    for (int c = 0; c < LaneColumns<K, kElements>::kChunks; ++c) {
        const int d = LaneColumns<K, kElements>::column(c, lane);
#pragma unroll
        for (int v = 0; v < kVector<K>; ++v) {
            if (d < dim) buffer[warp * dim + d + v] = factor * keys[c * kVector<K> + v];
        }
    }
    __syncthreads();
    for (int d = threadIdx.x; d < dim; d += kThreads) {
        float total = 0;
        for (int w = 0; w < kWarps; ++w) total += buffer[w * dim + d];
        out[d] = total;
    }
    __syncthreads();
}

/// 32-bit registers of a token's keys in each lane.
template <typename K, int kElements, bool kTeacher>
constexpr int kTokenRegisters = kElements * static_cast<int>(sizeof(K)) / 4 * (kTeacher ? 2 : 1);

/// Tokens that a warp works on together: as many as fill about 16 registers.
template <typename K, int kElements, bool kTeacher>
constexpr int kGroupTokens = kTokenRegisters<K, kElements, kTeacher> <= 4   ? 4
                             : kTokenRegisters<K, kElements, kTeacher> <= 8 ? 2
                                                                            : 1;

/// Whether the keys of a warp's next tokens are on the way while it works on these: where they fit in the
/// registers beside queries and key sums.
template <typename K, int kElements, bool kTeacher>
constexpr bool kLoadsAhead = kTokenRegisters<K, kElements, kTeacher> + kElements * (kTeacher ? 5 : 3) <= 150;

/// The next tokens of a warp, -1 where there are no more. `left` has a bit for each token from `base` on that
/// is still to come.
template <int kTokens>
__device__ __forceinline__ void take(unsigned* left, int base, int (&token)[kTokens]) {
#pragma unroll
    for (int i = 0; i < kTokens; ++i) {
        token[i] = *left ? base + __ffs(static_cast<int>(*left)) - 1 : -1;
        *left &= *left - 1;
    }
}

template <typename K, int kTokens, int kElements>
__device__ __forceinline__ void load(const K* keys, int64_t stride, int dim, int lane,
                                     const int (&token)[kTokens], PackedRow<K, kElements> (&row)[kTokens]) {
#pragma unroll
    for (int i = 0; i < kTokens; ++i) {
        if (token[i] >= 0) row[i].load(keys + token[i] * stride, dim, lane);
    }
}

/// scale * query . key of a group's tokens, in all lanes.
template <typename K, int kTokens, int kElements>
__device__ __forceinline__ void scores(const float (&query)[kElements],
                                       const PackedRow<K, kElements> (&row)[kTokens],
                                       const int (&token)[kTokens], Score scale, int lane,
                                       Score (&score)[kTokens]) {
    float partial[kTokens];
#pragma unroll
    for (int i = 0; i < kTokens; ++i) {
        partial[i] = 0;
        if (token[i] < 0) continue;
        float key[kElements];
        row[i].unpack(key);
#pragma unroll
        for (int e = 0; e < kElements; ++e) partial[i] = fmaf(query[e], key[e], partial[i]);
    }
    sum_over_lanes(lane, partial, score);
#pragma unroll
    for (int i = 0; i < kTokens; ++i) score[i] = score[i] * scale;
}

/// Scores, partial sums and key sums of one split of one row. K: storage type of student and teacher keys.
/// kElements: of a row in each lane, lane_elements(D).
template <typename K, int kElements, bool kTeacher>
__global__ void __launch_bounds__(kThreads, kElements <= 8 ? 2 : 1)
    forward_rows(const __grid_constant__ ForwardArguments a) {
    extern __shared__ __align__(16) unsigned char shared_memory[];
    ForwardShared& shared = *reinterpret_cast<ForwardShared*>(shared_memory);
    float* const buffer = reinterpret_cast<float*>(shared_memory + sizeof(ForwardShared));

    const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
    const int row = static_cast<int>(blockIdx.x) / a.splits, split = static_cast<int>(blockIdx.x) % a.splits;
    const int layer = row / a.batch;
    const int64_t b = row % a.batch;
    const KeysArguments& student = a.student[layer];
    const KeysArguments& teacher = a.teacher[layer];
    const K* const keys = static_cast<const K*>(student.key) + b * student.batch_stride;
    const K* const teacher_keys =
        kTeacher ? static_cast<const K*>(teacher.key) + b * teacher.batch_stride : nullptr;
    const bool with_keys = a.key_means != nullptr;

    float query[kElements], teacher_query[kElements];
    load_floats<K>(student.query + b * a.dim, a.dim, lane, query);
    if constexpr (kTeacher) load_floats<K>(teacher.query + b * a.dim, a.dim, lane, teacher_query);

    // This block's tokens, and this warp's of them.
    const int block_begin = static_cast<int>(static_cast<int64_t>(a.tokens) * split / a.splits);
    const int block_end = static_cast<int>(static_cast<int64_t>(a.tokens) * (split + 1) / a.splits);
    const int share = (block_end - block_begin + kWarps - 1) / kWarps;
    const int begin = min(block_begin + warp * share, block_end), end = min(begin + share, block_end);

    Partial mine = {{-INFINITY, 0}, {-INFINITY, 0}, {-INFINITY, 0}, 0, 0, 0, 0};
    float keys_in[kElements] = {}, keys_out[kElements] = {}, keys_teacher[kElements] = {};
    constexpr bool kAhead = kLoadsAhead<K, kElements, kTeacher>;
    constexpr int kTokens = kGroupTokens<K, kElements, kTeacher>;
    for (int base = begin; base < end; base += kWarpSize) {
        // Each lane looks at one token: whether it counts, and its region weight.
        const int own = base + lane;
        const bool live = own < end && !(a.padding && a.padding[b * a.tokens + own]);
        const float raw_weight = live ? region_weight(a.region, b, own, a.tokens) : 0.0f;
        const float own_weight = clamped(raw_weight);
        mine.region_some |= own_weight > 0;
        mine.region_nan |= raw_weight != raw_weight;
        unsigned left = __ballot_sync(kAllLanes, live);

        int token[kTokens];
        PackedRow<K, kElements> key[kTokens], teacher_key[kTokens];
        take(&left, base, token);
        if constexpr (kAhead) {
            load(keys, student.token_stride, a.dim, lane, token, key);
            if constexpr (kTeacher) load(teacher_keys, teacher.token_stride, a.dim, lane, token, teacher_key);
        }
        while (token[0] >= 0) {
            int next[kTokens];
            PackedRow<K, kElements> next_key[kTokens], next_teacher_key[kTokens];
            take(&left, base, next);
            if constexpr (kAhead) {
                load(keys, student.token_stride, a.dim, lane, next, next_key);
                if constexpr (kTeacher)
                    load(teacher_keys, teacher.token_stride, a.dim, lane, next, next_teacher_key);
            }

            Score score[kTokens], teacher_score[kTokens];
            if constexpr (kTeacher) {
                if constexpr (!kAhead)
                    load(teacher_keys, teacher.token_stride, a.dim, lane, token, teacher_key);
                scores(teacher_query, teacher_key, token, teacher.scale, lane, teacher_score);
            }
            if constexpr (!kAhead) load(keys, student.token_stride, a.dim, lane, token, key);
            scores(query, key, token, student.scale, lane, score);

            float in[kTokens], out[kTokens], every[kTokens];
#pragma unroll
            for (int i = 0; i < kTokens; ++i) {
                const bool present = token[i] >= 0;
                const float m = __shfl_sync(kAllLanes, own_weight, present ? token[i] - base : 0);
                in[i] = present ? m : 0.0f;
                out[i] = present ? 1 - m : 0.0f;
                every[i] = present ? 1.0f : 0.0f;
                if (!present) continue;
                const int64_t place = static_cast<int64_t>(row) * a.tokens + token[i];
                mine.poison += score[i].hi * 0;
                if (lane == 0) a.scores[place] = score[i];
                if constexpr (kTeacher) {
                    mine.teacher_poison += teacher_score[i].hi * 0;
                    if (lane == 0) a.teacher_scores[place] = teacher_score[i];
                }
            }
            absorb(score, in, key, with_keys, &mine.in, keys_in);
            absorb(score, out, key, with_keys, &mine.out, keys_out);
            if constexpr (kTeacher) absorb(teacher_score, every, key, with_keys, &mine.teacher, keys_teacher);

#pragma unroll
            for (int i = 0; i < kTokens; ++i) {
                token[i] = next[i];
                if constexpr (kAhead) {
                    key[i] = next_key[i];
                    if constexpr (kTeacher) teacher_key[i] = next_teacher_key[i];
                }
            }
        }
    }
    mine.region_some = __any_sync(kAllLanes, mine.region_some);
    mine.region_nan = __any_sync(kAllLanes, mine.region_nan);

    if (lane == 0) shared.warp[warp] = mine;
    __syncthreads();
    if (threadIdx.x == 0) shared.block = merged(shared.warp, kWarps);
    __syncthreads();
    float* const key_sums =
        a.key_sums ? a.key_sums + static_cast<int64_t>(blockIdx.x) * kKeyMeans * a.dim : nullptr;
    if (with_keys) {
        const Partial& block = shared.block;
        merge_key_sums<K>(keys_in, rescaling(mine.in, block.in.max), a.dim, buffer,
                          key_sums + kMeanIn * a.dim);
        merge_key_sums<K>(keys_out, rescaling(mine.out, block.out.max), a.dim, buffer,
                          key_sums + kMeanOut * a.dim);
        if constexpr (kTeacher) {
            merge_key_sums<K>(keys_teacher, rescaling(mine.teacher, block.teacher.max), a.dim, buffer,
                              key_sums + kMeanTeacher * a.dim);
        }
    }
    end_of_block(a, row, split, &shared.block, key_sums, shared.scratch);
}

/// Shared memory of `forward_any`: a tile of one token a lane.
struct AnyShared {
    ForwardShared forward;
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

    Partial mine = {{-INFINITY, 0}, {-INFINITY, 0}, {-INFINITY, 0}, 0, 0, 0, 0};  // of warp 0
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
            mine.region_some |= __any_sync(kAllLanes, m > 0);
            mine.region_nan |= __any_sync(kAllLanes, raw_weight != raw_weight);
            mine.poison += sum_over_warp(score.hi * 0);
            mine.teacher_poison += sum_over_warp(teacher_score.hi * 0);
            float correction[kKeyMeans] = {1, 1, 1};
            shared.in[lane] = absorb_tile(score, m, &mine.in, &correction[kMeanIn]);
            shared.out[lane] = absorb_tile(score, live ? 1 - m : 0.0f, &mine.out, &correction[kMeanOut]);
            shared.teacher[lane] = absorb_tile(teacher_score, live && with_teacher ? 1.0f : 0.0f,
                                               &mine.teacher, &correction[kMeanTeacher]);
            if (lane < kKeyMeans) shared.correction[lane] = correction[lane];
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
        __syncthreads();
    }
    if (threadIdx.x == 0) shared.forward.block = mine;
    __syncthreads();
    end_of_block(a, row, split, &shared.forward.block, key_sums, shared.forward.scratch);
}

// --- backward
// --------------------------------------------------------------------------------------------------------

/// What the gradients of a row have in common.
struct RowGradient {
    float region;  // 2 g_rac - g_in A_in: what RAC and A_in together put on p - pin; 0 where the region is
                   // empty
    float mrc;
    float in_box;
    float out_of_box;
    float log_in_box;
};

__device__ __forceinline__ RowGradient row_gradient(const BackwardArguments& a, int row) {
    const float* const stats = a.stats + static_cast<int64_t>(row) * kStats;
    RowGradient g = {0, a.grad_mrc[row], a.in_box[row], stats[kOutOfBox], stats[kLogInBox]};
    if (g.log_in_box != -INFINITY) g.region = 2 * a.grad_rac[row] - a.grad_in_box[row] * g.in_box;
    return g;
}

/// dL/ds_j of a token that is not padding.
__device__ __forceinline__ float score_gradient(const BackwardArguments& a, const RowGradient& g, int row,
                                                int token) {
    const int64_t place = static_cast<int64_t>(row) * a.tokens + token;
    const float m = clamped(region_weight(a.region, row % a.batch, token, a.tokens));
    const float log_p = a.log_p[place];
    const float p = expf(log_p);
    // Outside the region the exponent may be large, and 0 * inf must not arise.
    const float pin = m > 0 ? m * expf(log_p - g.log_in_box) : 0.0f;
    // p - pin = p (1 - m) - A_out pin keeps its digits where A_in tends to 1.
    float gradient = g.region * (p * (1 - m) - g.out_of_box * pin);
    if (a.log_t) {
        const float log_t = a.log_t[place];
        const float x = log_p - log_t, t = expf(log_t);
        const bool near = x > -1 && x < 1;
        gradient += g.mrc * (near ? t * fmaf(x * x, exp_remainder(x), x) : p - t);
    }
    return gradient;
}

/// dL/dq of a row, from its key means. All threads of the block.
__device__ __forceinline__ void write_query_gradient(const BackwardArguments& a, const RowGradient& g,
                                                     int row, const BackwardLayer& layer) {
    const float* const means = a.key_means + static_cast<int64_t>(row) * kKeyMeans * a.dim;
    float* const out = layer.grad_query + static_cast<int64_t>(row % a.batch) * a.dim;
    for (int d = threadIdx.x; d < a.dim; d += kThreads) {
        const float in = means[kMeanIn * a.dim + d], outside = means[kMeanOut * a.dim + d];
        float gradient = g.region * (outside - g.out_of_box * in);
        if (a.log_t) gradient += g.mrc * ((outside + g.in_box * in) - means[kMeanTeacher * a.dim + d]);
        out[d] = layer.scale * gradient;
    }
}

/// scale * dL/ds_j of this block's tokens in shared memory (a.tile floats), and dq where it is this block's.
/// Returns the number of tokens; 0 where no key gradient is asked for.
__device__ __forceinline__ int tile_gradients(const BackwardArguments& a, int row, int first,
                                              const BackwardLayer& layer, float* coefficients) {
    const RowGradient g = row_gradient(a, row);
    if (layer.grad_query && first == 0) write_query_gradient(a, g, row, layer);
    if (!layer.grad_key) return 0;
    const int count = min(a.tile, a.tokens - first);
    const int own = first + static_cast<int>(threadIdx.x);
    if (static_cast<int>(threadIdx.x) < count) {
        const bool padded = a.padding && a.padding[static_cast<int64_t>(row % a.batch) * a.tokens + own];
        coefficients[threadIdx.x] = padded ? 0.0f : layer.scale * score_gradient(a, g, row, own);
    }
    return count;
}

/// dK and dq of one tile of tokens of one row.
template <typename K, int kElements>
__global__ void __launch_bounds__(kThreads) backward_rows(const __grid_constant__ BackwardArguments a) {
    extern __shared__ __align__(16) unsigned char shared_memory[];
    float* const coefficients = reinterpret_cast<float*>(shared_memory);
    const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
    const int row = static_cast<int>(blockIdx.x) / a.tiles;
    const int first = static_cast<int>(blockIdx.x) % a.tiles * a.tile;
    const BackwardLayer& layer = a.layer[row / a.batch];
    const int64_t b = row % a.batch;
    const int count = tile_gradients(a, row, first, layer, coefficients);
    __syncthreads();
    if (count == 0) return;
    float query[kElements];
    load_floats<K>(layer.query + b * a.dim, a.dim, lane, query);
    K* const out = static_cast<K*>(layer.grad_key) + b * layer.batch_stride;
    for (int i = warp; i < count; i += kWarps) {
        float values[kElements];
#pragma unroll
        for (int e = 0; e < kElements; ++e) values[e] = coefficients[i] * query[e];
        PackedRow<K, kElements> packed;
        packed.pack(values);
        packed.store(out + (first + i) * layer.token_stride, a.dim, lane);
    }
}

/// `backward_rows` for any D and alignment, each layer with its own dtype: single values are stored.
__global__ void __launch_bounds__(kThreads) backward_any(const __grid_constant__ BackwardArguments a) {
    extern __shared__ __align__(16) unsigned char shared_memory[];
    float* const coefficients = reinterpret_cast<float*>(shared_memory);
    const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
    const int row = static_cast<int>(blockIdx.x) / a.tiles;
    const int first = static_cast<int>(blockIdx.x) % a.tiles * a.tile;
    const BackwardLayer& layer = a.layer[row / a.batch];
    const int64_t b = row % a.batch;
    const int count = tile_gradients(a, row, first, layer, coefficients);
    __syncthreads();
    const float* const query = layer.query + b * a.dim;
    for (int i = warp; i < count; i += kWarps) {
        const int64_t place = b * layer.batch_stride + (first + i) * layer.token_stride;
        for (int d = lane; d < a.dim; d += kWarpSize) {
            store_value(layer.grad_key, layer.dtype, place + d, coefficients[i] * query[d]);
        }
    }
}

}  // namespace attbalance
