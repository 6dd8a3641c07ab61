// One (layer, sample) of `attention_terms`: the loops that touch keys and tokens, behind a table of functions
// for each instruction set. `A` is the arithmetic type: float for keys of 16 or 32 bits, double for double.
// No torch header.
#pragma once

#include <cstdint>

#include "../dtype.h"
#include "attention_terms.h"

namespace attbalance {

/// One query against the tokens of one sample. Scores are scale * query . key, and are kept in double until
/// the softmax has taken their maximum off: rounding a score of 50 to float would cost the KL divergence of a
/// teacher that almost agrees its digits.
template <typename A>
struct Attention {
    const A* query;  // (D,)
    double scale;
    const void* key;      // token 0
    int64_t key_stride;   // elements from token to token; the D elements of a token are contiguous
    int64_t dim;          // D
    const bool* padding;  // (N,), true = ignore; null: none
    bool fetch_ahead;     // whether to prefetch keys: see needs_prefetch()
};

/// A softmax sum over some tokens, relative to the largest score so far, and the weighted sum of their keys.
template <typename A>
struct OnlineSum {
    double max;  // -inf: no token yet
    double sum;  // sum_j w_j exp(s_j - max)
    A* keys;     // (D,) sum_j w_j exp(s_j - max) k_j, or null
};

/// What a chunk of tokens contributes to its row. Together `in` and `out` cover every token:
/// p m + p (1 - m) = p.
template <typename A>
struct Chunk {
    OnlineSum<A> in;       // w_j = m_j
    OnlineSum<A> out;      // w_j = 1 - m_j
    OnlineSum<A> teacher;  // w_j = 1, with the teacher's scores over the student's keys
    double poison;         // 0, or NaN where a student score is not finite
    double teacher_poison;
};

/// The scores of a row, and where its results go.
template <typename A>
struct RowResults {
    const double* scores;          // (N,), anything at padding
    const double* teacher_scores;  // (N,) or null
    A* in_box;
    A* rac;
    A* mrc;
    A* stats;      // (4,), see Stat
    A* log_p;      // (N,), 0 at padding
    A* log_t;      // (N,), 0 at padding; null without a teacher
    A* key_means;  // (3, D), see KeyMean, or null
};

/// A row of the backward pass.
template <typename A>
struct RowGradient {
    A grad_in_box;
    A grad_rac;
    A grad_mrc;
    A scale;
    A in_box;
    const A* stats;       // (4,)
    const A* log_p;       // (N,)
    const A* log_t;       // (N,) or null
    const A* weight;      // (N,) m
    const bool* padding;  // (N,) or null
    const A* key_means;   // (3, D) or null
};

/// Arrays are indexed by the storage type of the keys (Dtype); entries that do not go with `A` are null.
template <typename A>
struct RowKernels {
    /// Write the scores of the tokens in [begin, end) that are not padding.
    /// Returns 0, or NaN where one is not finite.
    double (*scores[kDtypes])(const Attention<A>& attention, int64_t begin, int64_t end, double* scores);

    /// The same scores, and the softmax sums and key sums of the chunk: reads each key from memory once.
    /// weight: (N,) m, in [0, 1]. teacher_scores: (N,) or null. The chunk's sums start from nothing.
    void (*forward[kDtypes])(const Attention<A>& attention, int64_t begin, int64_t end, const A* weight,
                             const double* teacher_scores, double* scores, Chunk<A>* chunk);

    /// Merge the chunks of a row, in order, into its terms and what the backward pass needs.
    void (*finish)(const Chunk<A>* chunks, int64_t count, int64_t tokens, int64_t dim, RegionState region,
                   const bool* padding, const RowResults<A>& results);

    /// scale * dL/ds_j for every token of a row, 0 at padding.
    void (*score_gradient)(const RowGradient<A>& row, int64_t tokens, A* coefficients);

    /// dL/dq (D,) of a row, from its key means.
    void (*query_gradient)(const RowGradient<A>& row, int64_t dim, A* grad_query);

    /// Write `count` consecutive rows of D stored values, row i being
    /// coefficients[i * coefficient_stride] * (query + i * query_stride).
    /// `past_caches` writes straight to memory, which saves reading the lines first.
    void (*outer[kDtypes])(const A* coefficients, int64_t coefficient_stride, const A* query,
                           int64_t query_stride, int64_t count, int64_t dim, bool past_caches, void* out);
};

// clang-format off
#define ATTBALANCE_DECLARE_ROW_KERNELS(isa)    \
    namespace isa {                            \
    extern const RowKernels<float> kFloat;     \
    extern const RowKernels<double> kDouble;   \
    }
// clang-format on

ATTBALANCE_DECLARE_ROW_KERNELS(baseline)
#if defined(__x86_64__)
ATTBALANCE_DECLARE_ROW_KERNELS(avx2)
ATTBALANCE_DECLARE_ROW_KERNELS(avx512)
#endif

#undef ATTBALANCE_DECLARE_ROW_KERNELS

}  // namespace attbalance
