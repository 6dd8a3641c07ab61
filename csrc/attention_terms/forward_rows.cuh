// Forward, where 128-bit loads can read the keys: a warp reads a token's key once, as one row of registers:
// its score, then its share of the weighted means of the keys. Tokens are spread over the warps of a block,
// and over blocks where rows are few.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "finish_rows.cuh"

namespace attbalance {

/// A tile of as many tokens as a warp has lanes; those that are not padding come first. In shared memory.
struct TokenList {
    int place[kWarpSize];  // in the tile
    float in[kWarpSize];   // m, and 1 - m: both 0 for the rest, whose place is that of another token
    float out[kWarpSize];
    Score score[kWarpSize];
    Score teacher_score[kWarpSize];
};

/// Shared memory of `forward_rows`.
struct alignas(16) ForwardRowsShared {
    TokenList list[kWarps];
    Partial warp[kWarps];
    EndShared end;
};

/// The key sums of one kind of all warps come behind it.
inline size_t forward_rows_shared_bytes(int64_t dim) {
    return sizeof(ForwardRowsShared) + static_cast<size_t>(kWarps * dim) * sizeof(float);
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
        for (int v = 0; v < kVector<K>; v += 4) {
            const float* const key = keys + c * kVector<K> + v;
            if (d < dim) {
                *reinterpret_cast<float4*>(buffer + warp * dim + d + v) =
                    make_float4(factor * key[0], factor * key[1], factor * key[2], factor * key[3]);
            }
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

/// 32-bit registers of a row of keys in each lane.
template <typename K, int kElements>
constexpr int kRowRegisters = kElements * static_cast<int>(sizeof(K)) / 4;

/// Tokens that a warp works on together: as many as fill about 16 registers, teacher's keys included.
template <typename K, int kElements, bool kTeacher>
constexpr int kGroupTokens = kRowRegisters<K, kElements> * (kTeacher ? 2 : 1) <= 4   ? 4
                             : kRowRegisters<K, kElements> * (kTeacher ? 2 : 1) <= 8 ? 2
                                                                                     : 1;

/// Whether the keys of a warp's next tokens are on the way while it works on these: where they fit in the
/// registers beside queries (1 or 2 rows of floats), key sums (2 or 3) and the keys at work.
template <typename K, int kElements, bool kTeacher>
constexpr bool kLoadsAhead =
    kElements * (kTeacher ? 5 : 3) + kRowRegisters<K, kElements> * (kTeacher ? 3 : 2) <= 150;

/// Each lane's token goes to its place in the list. Returns the number of tokens that are not padding.
__device__ __forceinline__ int make_list(int lane, bool live, float weight, TokenList* list) {
    const unsigned lives = __ballot_sync(kAllLanes, live), before = (1u << lane) - 1;
    const int count = __popc(lives);
    const int rank = live ? __popc(lives & before) : count + __popc(~lives & before);
    __syncwarp();  // the tile before has been read
    list->place[rank] = live ? lane : __ffs(static_cast<int>(lives)) - 1;
    list->in[rank] = weight;
    list->out[rank] = live ? 1 - weight : 0.0f;
    __syncwarp();
    return count;
}

/// The keys of the tokens at these places of a tile. keys: the tile's first token. stride: from token to
/// token, in units of 16 bytes.
template <typename K, int kTokens, int kElements>
__device__ __forceinline__ void load(const uint4* keys, int stride, int dim, int lane, const int* place,
                                     PackedRow<K, kElements> (&row)[kTokens]) {
#pragma unroll
    for (int i = 0; i < kTokens; ++i) row[i].load(keys + static_cast<int64_t>(place[i]) * stride, dim, lane);
}

/// scale * query . key of kTokens tokens, in all lanes and in the list. A lane's columns beyond D have a
/// query of 0.
template <typename K, int kTokens, int kElements>
__device__ __forceinline__ void scores(const float (&query)[kElements],
                                       const PackedRow<K, kElements> (&row)[kTokens], Score scale, int lane,
                                       Score (&score)[kTokens], Score* listed) {
    float partial[kTokens];
#pragma unroll
    for (int i = 0; i < kTokens; ++i) {
        float key[kElements];
        row[i].unpack(key);
        partial[i] = 0;
#pragma unroll
        for (int e = 0; e < kElements; ++e) partial[i] = fmaf(query[e], key[e], partial[i]);
    }
    constexpr int kLanes = kLanesOfValue<kTokens>;
    const Score own = sum_over_lanes(lane, partial) * scale;
    if (lane % kLanes == 0) listed[lane / kLanes] = own;
#pragma unroll
    for (int i = 0; i < kTokens; ++i) {
        score[i] = {__shfl_sync(kAllLanes, own.hi, i * kLanes), __shfl_sync(kAllLanes, own.lo, i * kLanes)};
    }
}

/// Scores, partial sums and key sums of one split of one row. K: storage type of student and teacher keys.
/// kElements: of a row in each lane, lane_elements(D).
template <typename K, int kElements, bool kTeacher>
__global__ void __launch_bounds__(kThreads, kElements <= 8 ? 2 : 1)
    forward_rows(const __grid_constant__ ForwardArguments a) {
    extern __shared__ __align__(16) unsigned char shared_memory[];
    ForwardRowsShared& shared = *reinterpret_cast<ForwardRowsShared*>(shared_memory);
    float* const buffer = reinterpret_cast<float*>(shared_memory + sizeof(ForwardRowsShared));

    const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
    const int row = static_cast<int>(blockIdx.x) / a.splits, split = static_cast<int>(blockIdx.x) % a.splits;
    const int layer = row / a.batch;
    const int64_t b = row % a.batch;
    const KeysArguments& student = a.student[layer];
    const KeysArguments& teacher = a.teacher[layer];
    // In units of 16 bytes.
    const uint4* const keys =
        static_cast<const uint4*>(student.key) + b * (student.batch_stride / kVector<K>);
    const uint4* const teacher_keys =
        kTeacher ? static_cast<const uint4*>(teacher.key) + b * (teacher.batch_stride / kVector<K>) : nullptr;
    const int stride = static_cast<int>(student.token_stride / kVector<K>);
    const int teacher_stride = kTeacher ? static_cast<int>(teacher.token_stride / kVector<K>) : 0;
    const bool with_keys = a.key_means != nullptr;

    float query[kElements], teacher_query[kElements];
    load_floats<K>(student.query + b * a.dim, a.dim, lane, query);
    if constexpr (kTeacher) load_floats<K>(teacher.query + b * a.dim, a.dim, lane, teacher_query);

    // This block's tokens, and this warp's of them.
    const int block_begin = static_cast<int>(static_cast<int64_t>(a.tokens) * split / a.splits);
    const int block_end = static_cast<int>(static_cast<int64_t>(a.tokens) * (split + 1) / a.splits);
    const int share = (block_end - block_begin + kWarps - 1) / kWarps;
    const int begin = min(block_begin + warp * share, block_end), end = min(begin + share, block_end);

    Partial mine = kNoTokens;
    float keys_in[kElements] = {}, keys_out[kElements] = {}, keys_teacher[kElements] = {};
    constexpr bool kAhead = kLoadsAhead<K, kElements, kTeacher>;
    constexpr int kTokens = kGroupTokens<K, kElements, kTeacher>;
    TokenList& list = shared.list[warp];
    for (int base = begin; base < end; base += kWarpSize) {
        // Each lane looks at one token: whether it counts, and its region weight.
        const int own = base + lane;
        const bool live = own < end && !(a.padding && a.padding[b * a.tokens + own]);
        const float raw_weight = live ? region_weight(a.region, b, own, a.tokens) : 0.0f;
        const float own_weight = clamped(raw_weight);
        mine.region |= region_bits(raw_weight);
        const int count = make_list(lane, live, own_weight, &list);
        const uint4* const first_key = keys + static_cast<int64_t>(base) * stride;
        const uint4* const first_teacher_key = teacher_keys + static_cast<int64_t>(base) * teacher_stride;

        // The next tokens' keys are on the way while these are worked on, the teacher's in the registers that
        // its scores have set free.
        PackedRow<K, kElements> key[kTokens], next_key[kTokens], teacher_key[kTokens];
        const auto fetch = [&](const uint4* first, int step, int i, auto& rows) {
            if (i < count) load(first, step, a.dim, lane, list.place + i, rows);
        };
        if (kAhead) fetch(first_key, stride, 0, key);
        if (kAhead && kTeacher) fetch(first_teacher_key, teacher_stride, 0, teacher_key);
        for (int i = 0; i < count; i += kTokens) {
            if (kAhead) fetch(first_key, stride, i + kTokens, next_key);
            Score score[kTokens], teacher_score[kTokens];
            if constexpr (kTeacher) {
                if (!kAhead) fetch(first_teacher_key, teacher_stride, i, teacher_key);
                scores(teacher_query, teacher_key, teacher.scale, lane, teacher_score,
                       list.teacher_score + i);
                if (kAhead) fetch(first_teacher_key, teacher_stride, i + kTokens, teacher_key);
            }
            if (!kAhead) fetch(first_key, stride, i, key);
            scores(query, key, student.scale, lane, score, list.score + i);

            float in[kTokens], out[kTokens], every[kTokens];
#pragma unroll
            for (int t = 0; t < kTokens; ++t) {
                in[t] = list.in[i + t];
                out[t] = list.out[i + t];
                every[t] = i + t < count ? 1.0f : 0.0f;
            }
            absorb(score, in, key, with_keys, &mine.in, keys_in);
            absorb(score, out, key, with_keys, &mine.out, keys_out);
            if constexpr (kTeacher) absorb(teacher_score, every, key, with_keys, &mine.teacher, keys_teacher);
#pragma unroll
            for (int t = 0; kAhead && t < kTokens; ++t) key[t] = next_key[t];
        }
        __syncwarp();
        if (lane < count) {
            const int64_t place = static_cast<int64_t>(row) * a.tokens + base + list.place[lane];
            a.scores[place] = list.score[lane];
            if constexpr (kTeacher) a.teacher_scores[place] = list.teacher_score[lane];
        }
    }
    mine.region = bits_over_warp(mine.region);

    if (lane == 0) shared.warp[warp] = mine;
    __syncthreads();
    const Partial block = merged(shared.warp, kWarps);
    if (threadIdx.x == 0) shared.end.block = block;
    float* const key_sums =
        a.key_sums ? a.key_sums + static_cast<int64_t>(blockIdx.x) * kKeyMeans * a.dim : nullptr;
    if (with_keys) {
        merge_key_sums<K>(keys_in, rescaling(mine.in, block.in.max), a.dim, buffer,
                          key_sums + kMeanIn * a.dim);
        merge_key_sums<K>(keys_out, rescaling(mine.out, block.out.max), a.dim, buffer,
                          key_sums + kMeanOut * a.dim);
        if constexpr (kTeacher) {
            merge_key_sums<K>(keys_teacher, rescaling(mine.teacher, block.teacher.max), a.dim, buffer,
                              key_sums + kMeanTeacher * a.dim);
        }
    }
    __syncthreads();
    end_of_block(a, row, split, key_sums, &shared.end);
}

}  // namespace attbalance
