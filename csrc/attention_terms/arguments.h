// What the kernels of `attention_terms` are given, by value, and what their blocks leave to each other. A row
// is one (layer, sample). No torch header.
#pragma once

#include <math.h>

#include <cstdint>

#include "../dtype.h"
#include "attention_terms.h"
#include "region.h"

namespace attbalance {

/// Layers of one launch: what fits in the 4 KiB of arguments that every architecture takes.
constexpr int kLaunchLayers = 16;

constexpr int kMaxGrids = 16;

/// A float and what rounding left of it: hi + lo. Scores reach 50, where a float's last digit is worth more
/// than the KL divergence of a teacher that almost agrees. Where a score is not finite, lo is NaN: it makes
/// the sum it enters NaN, and with it every result of its row.
struct alignas(8) Score {
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

enum RegionBits : unsigned { kSomeWeight = 1, kNotANumberWeight = 2 };

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
    unsigned region;     // of RegionBits, over tokens that are not padding
};

constexpr Partial kNoTokens = {{-INFINITY, 0}, {-INFINITY, 0}, {-INFINITY, 0}, 0};

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

static_assert(sizeof(ForwardArguments) <= 4096, "more than a launch's arguments may hold");

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
    float* grad_dot;         // (L, B, N) or null
};

static_assert(sizeof(BackwardArguments) <= 4096, "more than a launch's arguments may hold");

}  // namespace attbalance
