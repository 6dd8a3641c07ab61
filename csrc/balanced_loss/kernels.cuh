// The kernel of `balanced_loss`: one block computes the loss of a batch and all gradients. No torch header.
#pragma once

#include <cuda_runtime.h>
#include <math.h>

#include <cstdint>

#include "launch_plan.h"
#include "objective.h"

namespace attbalance {

struct BalancedLossArguments {
    Inputs<float> in;
    Weights<float> weights;
    Outputs<float> out;
    BalancedLossPlan plan;
    unsigned char* workspace;  // plan.scratch.bytes where the scratch memory is not shared memory
};

/// A value and its sample, in one number that sorts by value. Samples that are left out sort last.
using Key = long long;
constexpr int kLeftOut = 0x7fffffff;

__device__ inline Key make_key(int ordered, int sample) {
    return static_cast<Key>(ordered) * (1ll << 32) + sample;
}

/// `value` is finite; -0 and 0 tie.
__device__ inline Key key_of(float value, int sample) {
    const int bits = __float_as_int(value == 0 ? 0.0f : value);
    return make_key(bits < 0 ? bits ^ 0x7fffffff : bits, sample);
}

__device__ inline int value_of(Key key) {
    return static_cast<int>(key >> 32);
}

__device__ inline int sample_of(Key key) {
    return static_cast<int>(key & 0xffffffff);
}

/// The warps that work on one row of values together.
struct Team {
    int row;    // of those sorted at a time
    int warp;   // within the team
    int warps;  // of the team
    int lane;

    __device__ int member() const { return warp * kWarpSize + lane; }
    __device__ int members() const { return warps * kWarpSize; }
};

/// One of two keys `stride` lanes apart, as bitonic merging towards runs of `size` places them.
__device__ inline Key exchanged(Key key, int index, int size, int stride) {
    const Key other = __shfl_xor_sync(kAllLanes, key, stride);
    const bool smaller = ((index & size) == 0) == ((index & stride) == 0);
    return (other < key) == smaller ? other : key;
}

/// Bitonic stages of stride below 64 in registers: runs of first_size, ..., last_size, both powers of two.
/// Runs of twice `batch` and more are not needed: what lies behind is left out.
__device__ inline void sort_in_registers(Key* keys, const Team& team, int row_length, int batch,
                                         int first_size, int last_size) {
    const int step = kSortedInRegisters * team.warps;
    for (int begin = kSortedInRegisters * team.warp; begin < row_length; begin += step) {
        const int low = begin + team.lane, high = low + kWarpSize;
        Key a = keys[low], b = keys[high];
        for (int size = first_size; size <= last_size && size / 2 < batch; size *= 2) {
            if (size > kWarpSize && (b < a) == ((begin & size) == 0)) {
                const Key swapped = a;
                a = b;
                b = swapped;
            }
            for (int stride = size > kWarpSize ? kWarpSize / 2 : size / 2; stride > 0; stride /= 2) {
                a = exchanged(a, low, size, stride);
                b = exchanged(b, high, size, stride);
            }
        }
        keys[low] = a;
        keys[high] = b;
    }
}

/// One bitonic stage of any stride.
__device__ inline void sort_stage(Key* keys, const Team& team, int row_length, int size, int stride) {
    for (int pair = team.member(); pair < row_length / 2; pair += team.members()) {
        const int i = 2 * pair - (pair & (stride - 1));
        const Key a = keys[i], b = keys[i + stride];
        if ((b < a) == ((i & size) == 0)) {
            keys[i] = b;
            keys[i + stride] = a;
        }
    }
}

/// Sort a row of which every lane has written keys i with i % 64 = lane or lane + 32, in the same order as
/// `sort_in_registers` reads them. Ends without a barrier. All threads call this; those that are not `active`
/// for the barriers' sake.
__device__ inline void sort_row(Key* keys, const Team& team, bool active, int row_length, int batch) {
    if (active) sort_in_registers(keys, team, row_length, batch, 2, kSortedInRegisters);
    for (int size = 2 * kSortedInRegisters; size <= row_length; size *= 2) {
        for (int stride = size / 2; stride >= kSortedInRegisters; stride /= 2) {
            __syncthreads();
            if (active) sort_stage(keys, team, row_length, size, stride);
        }
        __syncthreads();
        if (active) sort_in_registers(keys, team, row_length, batch, size, size);
    }
}

/// Position of the first key from `begin` on whose value is at least `value`, `end` if none.
__device__ inline int first_at_least(const Key* keys, int begin, int end, int value) {
    while (begin < end) {
        const int middle = (begin + end) / 2;
        if (value_of(keys[middle]) < value) {
            begin = middle + 1;
        } else {
            end = middle;
        }
    }
    return begin;
}

/// #below + #(below or equal) of the i-th of `count` sorted keys.
__device__ inline int rank_of(const Key* keys, int i, int count) {
    const int value = value_of(keys[i]);
    int begin = i, end = i + 1;
    if (i > 0 && value_of(keys[i - 1]) == value) begin = first_at_least(keys, 0, i, value);
    if (end < count && value_of(keys[end]) == value) end = first_at_least(keys, end, count, value + 1);
    return begin + end;
}

__device__ inline double warp_sum(double value) {
    for (int offset = kWarpSize / 2; offset > 0; offset /= 2)
        value += __shfl_xor_sync(kAllLanes, value, offset);
    return value;
}

__device__ inline RankSums warp_sum(RankSums sums) {
    for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
        sums.count += __shfl_xor_sync(kAllLanes, sums.count, offset);
        sums.xy += __shfl_xor_sync(kAllLanes, sums.xy, offset);
        sums.xx += __shfl_xor_sync(kAllLanes, sums.xx, offset);
        sums.yy += __shfl_xor_sync(kAllLanes, sums.yy, offset);
    }
    return sums;
}

/// rho from sums over all samples that count. The ranks' mean is their count, and the division is the only
/// rounding.
__device__ inline float rho_of(const RankSums& sums) {
    const long long shift = sums.count * sums.count * sums.count;
    return static_cast<float>(correlation(static_cast<double>(sums.xy - shift),
                                          static_cast<double>(sums.xx - shift),
                                          static_cast<double>(sums.yy - shift)));
}

/// The threads of the block, and the memory they share.
struct Block {
    Key* keys;
    RankSums* rank_sums;
    double* losses;
    float* iou;
    int* iou_ranks;
    float* rho;

    __device__ Block(unsigned char* scratch, const Scratch& at)
        : keys(reinterpret_cast<Key*>(scratch + at.keys)),
          rank_sums(reinterpret_cast<RankSums*>(scratch + at.rank_sums)),
          losses(reinterpret_cast<double*>(scratch + at.losses)),
          iou(reinterpret_cast<float*>(scratch + at.iou)),
          iou_ranks(reinterpret_cast<int*>(scratch + at.iou_ranks)),
          rho(reinterpret_cast<float*>(scratch + at.rho)) {}
};

/// Keys of one layer's A_in, or of the IoU where `in_box` is null, in a whole row. Returns whether this layer
/// leaves out a sample that the IoU keeps.
__device__ inline bool write_keys(Key* keys, const Team& team, int row_length, int batch, const float* iou,
                                  const float* in_box) {
    bool dropped = false;
    const int step = kSortedInRegisters * team.warps;
    for (int begin = kSortedInRegisters * team.warp; begin < row_length; begin += step) {
        for (int i = begin + team.lane; i < begin + kSortedInRegisters; i += kWarpSize) {
            Key key = make_key(kLeftOut, i);
            if (i < batch && isfinite(iou[i])) {
                const float value = in_box ? in_box[i] : iou[i];
                if (isfinite(value)) {
                    key = key_of(value, i);
                } else {
                    dropped = true;
                }
            }
            keys[i] = key;
        }
    }
    return dropped;
}

/// What the samples that this layer alone leaves out add to the rank of `iou`. They are at the end of the
/// row.
__device__ inline int dropped_rank(const Key* keys, int batch, const float* all_iou, float iou) {
    int rank = 0;
    for (int i = batch - 1; value_of(keys[i]) == kLeftOut; --i) {
        const float other = all_iou[sample_of(keys[i])];
        rank += (other < iou) + (other <= iou);
    }
    return rank;
}

/// Spearman's rho of every layer, into out.rho and block.rho.
__device__ inline void batch_spearman(const BalancedLossArguments& p, const Block& block) {
    const int batch = static_cast<int>(p.in.batch), row_length = p.plan.row_length;
    const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
    const Team team = {warp / p.plan.warps_per_row, warp % p.plan.warps_per_row, p.plan.warps_per_row,
                       static_cast<int>(threadIdx.x) % kWarpSize};
    Key* const keys = block.keys + static_cast<int64_t>(team.row) * row_length;

    // Row 0 is the IoU, row l + 1 is layer l.
    for (int64_t first = 0; first <= p.in.layers; first += p.plan.rows) {
        const int64_t layer = first + team.row - 1;
        const bool active = team.row < p.plan.rows && layer < p.in.layers;
        bool dropped = false;
        if (active) {
            const float* const in_box = layer < 0 ? nullptr : p.in.in_box + layer * batch;
            dropped = write_keys(keys, team, row_length, batch, block.iou, in_box);
        }
        sort_row(keys, team, active, row_length, batch);
        const bool some_dropped = __syncthreads_or(dropped);

        if (active && layer < 0) {
            for (int i = team.member(); i < batch && value_of(keys[i]) != kLeftOut; i += team.members()) {
                block.iou_ranks[sample_of(keys[i])] = rank_of(keys, i, batch);
            }
        }
        __syncthreads();
        if (active && layer >= 0) {
            RankSums sums = {0, 0, 0, 0};
            for (int i = team.member(); i < batch && value_of(keys[i]) != kLeftOut; i += team.members()) {
                const int sample = sample_of(keys[i]);
                const long long x = rank_of(keys, i, batch);
                long long y = block.iou_ranks[sample];
                if (some_dropped) y -= dropped_rank(keys, batch, block.iou, block.iou[sample]);
                sums.count += 1;
                sums.xy += x * y;
                sums.xx += x * x;
                sums.yy += y * y;
            }
            sums = warp_sum(sums);
            if (team.lane == 0) block.rank_sums[warp] = sums;
        }
        __syncthreads();
        if (active && layer >= 0 && team.member() == 0) {
            RankSums sums = block.rank_sums[warp];
            for (int other = 1; other < team.warps; ++other) {
                const RankSums more = block.rank_sums[warp + other];
                sums.count += more.count;
                sums.xy += more.xy;
                sums.xx += more.xx;
                sums.yy += more.yy;
            }
            const float rho = rho_of(sums);
            block.rho[layer] = rho;
            p.out.rho[layer] = rho;
        }
        __syncthreads();
    }
}

/// One block of plan.threads. kShared: where the scratch memory is.
template <bool kShared>
__global__ void __launch_bounds__(kMaxWarps* kWarpSize) balanced_loss_kernel(const BalancedLossArguments p) {
    extern __shared__ __align__(16) unsigned char shared_memory[];
    const Block block(kShared ? shared_memory : p.workspace, p.plan.scratch);
    const bool ranked = p.plan.rows > 0;
    for (int64_t b = threadIdx.x; b < p.in.batch; b += blockDim.x) {
        const float iou = box_losses(p.in, p.weights, b, p.out);
        if (ranked) block.iou[b] = p.in.valid[b] && isfinite(iou) ? iou : NAN;
    }
    const float* rho = p.in.rho;
    if (ranked) {
        __syncthreads();
        batch_spearman(p, block);
        rho = block.rho;
    } else if (!p.weights.plain) {
        for (int64_t l = threadIdx.x; l < p.in.layers; l += blockDim.x) p.out.rho[l] = rho[l];
    }

    const RhoWeight<float> rho_weight(rho, p.weights.plain ? 0 : p.in.layers);
    double loss = 0;
    for (int64_t b = threadIdx.x; b < p.in.batch; b += blockDim.x) {
        loss += static_cast<double>(sample_objective(p.in, p.weights, rho_weight, b, p.out));
    }
    loss = warp_sum(loss);
    if (threadIdx.x % kWarpSize == 0) block.losses[threadIdx.x / kWarpSize] = loss;
    __syncthreads();
    if (threadIdx.x == 0) {
        double total = 0;
        for (unsigned warp = 0; warp < blockDim.x / kWarpSize; ++warp) total += block.losses[warp];
        *p.out.loss = static_cast<float>(total / static_cast<double>(p.in.batch > 0 ? p.in.batch : 1));
    }
}

}  // namespace attbalance
