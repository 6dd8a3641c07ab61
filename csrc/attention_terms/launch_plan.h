// How a call of `attention_terms` is cut into blocks on a GPU: pure functions of shapes and of the number of
// multiprocessors, so that the same call gives the same bits on the same device. No torch header.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../cuda/warp.h"

namespace attbalance {

/// Threads of a block, in every kernel of this op.
constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;

/// Blocks that a multiprocessor is given, at least, where there is enough work.
constexpr int64_t kBlocksPerMultiprocessor = 2;

/// Columns up to which a warp holds whole rows of keys in its registers.
constexpr int64_t kMaxWideDim = 1024;

/// Values of a row that each lane holds: 8, 16, 24 or 32.
constexpr int lane_elements(int64_t dim) {
    return static_cast<int>((dim + 255) / 256 * 8);
}

/// Blocks that may share a row of the forward pass.
constexpr int64_t kMaxSplits = 16;

/// Blocks that share the tokens of one row of the forward pass. With more than one, a second kernel merges
/// what they found.
inline int64_t forward_splits(int64_t rows, int64_t tokens, int64_t multiprocessors) {
    constexpr int64_t kMinTokens = 4 * kWarps;  // one group of loads for each warp
    const int64_t wanted = kBlocksPerMultiprocessor * multiprocessors / std::max<int64_t>(rows, 1);
    return std::clamp<int64_t>(std::min(wanted, tokens / kMinTokens), 1, kMaxSplits);
}

/// Tokens of a row that one block of the backward pass writes: a power of two, at most one for each thread.
inline int64_t backward_tile(int64_t rows, int64_t tokens, int64_t multiprocessors) {
    constexpr int64_t kMinTile = 2 * kWarps;
    int64_t tile = kThreads;
    while (tile > kMinTile &&
           rows * ((tokens + tile - 1) / tile) < 2 * kBlocksPerMultiprocessor * multiprocessors) {
        tile /= 2;
    }
    return tile;
}

}  // namespace attbalance
