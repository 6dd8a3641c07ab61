// How the one block of the CUDA kernel is laid out: a function of the shapes alone. No torch or CUDA header.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>

#include "../cuda/warp.h"

namespace attbalance {

/// Sums of products of ranks over one (layer, warp). Ranks are #below + #(below or equal), twice the average
/// rank less 1, so everything is an integer: the order of summation does not matter.
struct RankSums {
    long long count, xy, xx, yy;
};

/// What the block shares, in bytes from the start of its scratch memory.
struct Scratch {
    int64_t keys;       // (rows, row_length) sort keys, 8 bytes
    int64_t rank_sums;  // (warps,) RankSums
    int64_t losses;     // (warps,) double
    int64_t iou;        // (B,) float
    int64_t iou_ranks;  // (B,) int
    int64_t rho;        // (L,) float
    int64_t bytes;      // all of it
};

struct BalancedLossPlan {
    int threads;
    int rows;  // rows of values, of the L + 1 to be ranked, sorted at a time; 0: there is no ranking
    int warps_per_row;
    int row_length;  // a power of two, at least B
    Scratch scratch;
    bool in_shared;  // the scratch memory is shared memory, else a workspace in global memory
};

constexpr int kMaxWarps = 32;
constexpr int kSortedInRegisters = 64;        // keys that a warp sorts without shared memory, two a lane
constexpr int64_t kMaxBatch = 1 << 20;        // beyond, sums of products of ranks overflow 64 bits
constexpr int64_t kSharedUnasked = 48 << 10;  // what a kernel gets without asking for more
constexpr int64_t kMaxShared = 99 << 10;      // what a block may have on every architecture from sm_80 on

inline Scratch scratch_of(int64_t batch, int64_t layers, int64_t rows, int64_t row_length) {
    Scratch scratch = {};
    int64_t end = 0;
    const auto take = [&end](int64_t bytes) { return std::exchange(end, end + (bytes + 7) / 8 * 8); };
    scratch.keys = take(rows * row_length * 8);
    scratch.rank_sums = take(rows > 0 ? kMaxWarps * static_cast<int64_t>(sizeof(RankSums)) : 0);
    scratch.losses = take(kMaxWarps * 8);
    scratch.iou = take(rows > 0 ? batch * 4 : 0);
    scratch.iou_ranks = take(rows > 0 ? batch * 4 : 0);
    scratch.rho = take(rows > 0 ? layers * 4 : 0);
    scratch.bytes = end;
    return scratch;
}

/// As many rows at a time as shared memory holds and warps can sort, in rounds of equal size; where not one
/// row fits, in global memory. `ranked`: rho comes from this batch.
inline BalancedLossPlan plan_balanced_loss(int64_t batch, int64_t layers, bool ranked) {
    const int64_t sample_warps = std::clamp<int64_t>((batch + kWarpSize - 1) / kWarpSize, 1, kMaxWarps);
    if (!ranked)
        return {static_cast<int>(sample_warps) * kWarpSize, 0, 0, 0, scratch_of(batch, layers, 0, 0), true};
    int64_t row_length = kSortedInRegisters;
    while (row_length < batch) row_length *= 2;
    const int64_t all_rows = layers + 1;
    int64_t rows = std::min<int64_t>(all_rows, kMaxWarps);
    const int64_t room = kMaxShared - scratch_of(batch, layers, 1, row_length).bytes;
    const bool in_shared = room >= 0;
    if (in_shared) rows = std::min(rows, 1 + room / (row_length * 8));
    const int64_t rounds = (all_rows + rows - 1) / rows;
    rows = (all_rows + rounds - 1) / rounds;
    const int64_t warps_per_row = std::min(row_length / kSortedInRegisters, kMaxWarps / rows);
    return {static_cast<int>(std::max(sample_warps, rows * warps_per_row)) * kWarpSize,
            static_cast<int>(rows),
            static_cast<int>(warps_per_row),
            static_cast<int>(row_length),
            scratch_of(batch, layers, rows, row_length),
            in_shared};
}

}  // namespace attbalance
