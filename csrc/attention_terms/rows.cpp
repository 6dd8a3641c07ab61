// The loops of rows.h. Compiled once for each instruction set, with ATTBALANCE_ISA naming the namespace.
#include "rows.h"

#include <math.h>

#include <limits>

#include "../simd.h"
#include "../vector_math.h"

namespace attbalance::ATTBALANCE_ISA {
namespace {

/// Tokens are handled in blocks that fit in the L1 cache, so that the weighted sum of the keys finds them
/// there.
constexpr int64_t kBlockBytes = 16 * 1024;
constexpr int kMaxBlock = 64;
constexpr int64_t kCacheLine = 64;

/// Padding of per-block arrays, so that they can be walked in whole vectors.
constexpr int kBlockCapacity = kMaxBlock + 16;

template <typename A>
constexpr A kInfinity = std::numeric_limits<A>::infinity();

template <typename A>
constexpr A kNaN = std::numeric_limits<A>::quiet_NaN();

/// The tokens of a block that are not padding.
template <typename K>
struct Block {
    int count = 0;
    const K* key[kMaxBlock];
    int64_t token[kMaxBlock];
};

template <typename K>
int block_tokens(int64_t dim) {
    const int64_t fitting = kBlockBytes / (dim * static_cast<int64_t>(sizeof(K)));
    if (fitting >= kMaxBlock) return kMaxBlock;
    return fitting < 4 ? 4 : static_cast<int>(fitting / 4 * 4);
}

template <typename A, typename K>
void collect(const Attention<A>& attention, int64_t begin, int64_t end, Block<K>* block) {
    const K* key = static_cast<const K*>(attention.key);
    block->count = 0;
    for (int64_t j = begin; j < end; ++j) {
        if (attention.padding && attention.padding[j]) continue;
        block->key[block->count] = key + j * attention.key_stride;
        block->token[block->count] = j;
        ++block->count;
    }
}

/// Bring `bytes` from `offset` bytes past `p` towards the core, into the L2 cache: the L1 cache holds the
/// block at work. Harmless beyond the end of the keys.
inline void prefetch(const void* p, int64_t offset, int64_t bytes) {
    const uintptr_t first = reinterpret_cast<uintptr_t>(p) + static_cast<uintptr_t>(offset);
    for (int64_t i = 0; i < bytes; i += kCacheLine) {
        __builtin_prefetch(reinterpret_cast<const void*>(first + static_cast<uintptr_t>(i)), 0, 2);
    }
}

/// out[i] = scale * query . key[i] for kTokens keys at once, which share the loads of the query.
template <typename A, typename K, int kTokens>
inline void dot(const A* query, A scale, const K* const* key, int64_t dim, A* out) {
    constexpr int kStep = kWidth<A>;
    Vec<A> total[kTokens] = {};
    int64_t d = 0;
    for (; d + kStep <= dim; d += kStep) {
        const Vec<A> q = load<A>(query + d);
        for (int i = 0; i < kTokens; ++i) total[i] += q * load<A>(key[i] + d);
    }
    if (d < dim) {
        const Vec<A> q = load_first<A>(query + d, dim - d);
        for (int i = 0; i < kTokens; ++i) total[i] += q * load_first<A>(key[i] + d, dim - d);
    }
    for (int i = 0; i < kTokens; ++i) out[i] = scale * sum<A>(total[i]);
}

template <typename A, typename K>
void dots(const Attention<A>& attention, const Block<K>& block, A* out) {
    // The next block is on its way while this one is worked on: the processor's own prefetchers stop at page
    // ends, and rest while the weighted sums run from the cache.
    const int64_t next =
        block_tokens<K>(attention.dim) * attention.key_stride * static_cast<int64_t>(sizeof(K));
    const int64_t bytes = attention.dim * static_cast<int64_t>(sizeof(K));
    int i = 0;
    for (; i + 4 <= block.count; i += 4) {
        for (int t = 0; t < 4; ++t) prefetch(block.key[i + t], next, bytes);
        dot<A, K, 4>(attention.query, attention.scale, block.key + i, attention.dim, out + i);
    }
    for (; i < block.count; ++i) {
        dot<A, K, 1>(attention.query, attention.scale, block.key + i, attention.dim, out + i);
    }
}

/// total = correction * total + sum_i weight[i] * key[i], walking the keys column by column.
template <typename A, typename K>
void weighted_sum(const K* const* key, const A* weight, int count, A correction, int64_t dim, A* total) {
    constexpr int kStep = kWidth<A>;
    constexpr int kColumns = 4;
    int64_t d = 0;
    for (; d + kColumns * kStep <= dim; d += kColumns * kStep) {
        Vec<A> column[kColumns];
        for (int c = 0; c < kColumns; ++c) column[c] = correction * load<A>(total + d + c * kStep);
        for (int i = 0; i < count; ++i) {
            for (int c = 0; c < kColumns; ++c) column[c] += weight[i] * load<A>(key[i] + d + c * kStep);
        }
        for (int c = 0; c < kColumns; ++c) store<A, A>(total + d + c * kStep, column[c]);
    }
    for (; d + kStep <= dim; d += kStep) {
        Vec<A> column = correction * load<A>(total + d);
        for (int i = 0; i < count; ++i) column += weight[i] * load<A>(key[i] + d);
        store<A, A>(total + d, column);
    }
    if (d < dim) {
        Vec<A> column = correction * load_first<A>(total + d, dim - d);
        for (int i = 0; i < count; ++i) column += weight[i] * load_first<A>(key[i] + d, dim - d);
        store_first<A, A>(total + d, column, dim - d);
    }
}

/// Tokens of a block that enter one of the sums, with their scores and weights.
template <typename A, typename K>
struct Members {
    int count = 0;
    const K* key[kMaxBlock];
    alignas(kVectorBytes) A score[kBlockCapacity];
    alignas(kVectorBytes) A weight[kBlockCapacity];

    void add(const K* k, A s, A w) {
        key[count] = k;
        score[count] = s;
        weight[count] = w;
        ++count;
    }
};

template <typename A, typename K>
void absorb(Members<A, K>* members, int64_t dim, OnlineSum<A>* online) {
    if (members->count == 0) return;
    constexpr int kStep = kWidth<A>;
    for (int i = members->count; i % kStep != 0; ++i) {
        members->score[i] = -kInfinity<A>;
        members->weight[i] = 0;
    }
    Vec<A> largest = splat(online->max);
    for (int i = 0; i < members->count; i += kStep) {
        const Vec<A> s = load<A>(members->score + i);
        largest = s > largest ? s : largest;
    }
    const A new_max = max<A>(largest);
    const A correction = static_cast<A>(::exp(static_cast<double>(online->max - new_max)));
    Vec<A> total = {};
    for (int i = 0; i < members->count; i += kStep) {
        const Vec<A> w = load<A>(members->weight + i) * exp<A>(load<A>(members->score + i) - new_max);
        store<A, A>(members->weight + i, w);
        total += w;
    }
    online->sum = online->sum * static_cast<double>(correction) + static_cast<double>(sum<A>(total));
    online->max = new_max;
    if (online->keys)
        weighted_sum(members->key, members->weight, members->count, correction, dim, online->keys);
}

template <typename A>
void start(int64_t dim, OnlineSum<A>* online) {
    online->max = -kInfinity<A>;
    online->sum = 0;
    if (online->keys) {
        for (int64_t d = 0; d < dim; ++d) online->keys[d] = 0;
    }
}

template <typename A, typename K>
A scores(const Attention<A>& attention, int64_t begin, int64_t end, A* scores) {
    const int step = block_tokens<K>(attention.dim);
    A poison = 0;
    A score[kMaxBlock];
    Block<K> block;
    for (int64_t j = begin; j < end; j += step) {
        const int64_t stop = j + step < end ? j + step : end;
        if (attention.padding) {
            for (int64_t i = j; i < stop; ++i) scores[i] = 0;
        }
        collect(attention, j, stop, &block);
        dots(attention, block, score);
        for (int i = 0; i < block.count; ++i) {
            scores[block.token[i]] = score[i];
            poison += score[i] * 0;
        }
    }
    return poison;
}

template <typename A, typename K>
void forward(const Attention<A>& attention, int64_t begin, int64_t end, const A* weight,
             const A* teacher_scores, A* scores, Chunk<A>* chunk) {
    const int step = block_tokens<K>(attention.dim);
    const bool with_teacher = teacher_scores != nullptr;
    start(attention.dim, &chunk->in);
    start(attention.dim, &chunk->out);
    start(attention.dim, &chunk->teacher);
    chunk->poison = 0;
    A score[kMaxBlock];
    Block<K> block;
    for (int64_t j = begin; j < end; j += step) {
        const int64_t stop = j + step < end ? j + step : end;
        if (attention.padding) {
            for (int64_t i = j; i < stop; ++i) scores[i] = 0;
        }
        collect(attention, j, stop, &block);
        dots(attention, block, score);
        Members<A, K> in, out, teacher;
        for (int i = 0; i < block.count; ++i) {
            const int64_t token = block.token[i];
            const A m = weight[token];
            scores[token] = score[i];
            chunk->poison += score[i] * 0;
            if (m > 0) in.add(block.key[i], score[i], m);
            if (m < 1) out.add(block.key[i], score[i], 1 - m);
            if (with_teacher) teacher.add(block.key[i], teacher_scores[token], 1);
        }
        absorb(&in, attention.dim, &chunk->in);
        absorb(&out, attention.dim, &chunk->out);
        absorb(&teacher, attention.dim, &chunk->teacher);
    }
}

/// The chunks' sums of one kind as one sum, relative to the largest score of all.
template <typename A>
struct Merged {
    A max = -kInfinity<A>;
    double sum = 0;
};

template <typename A>
Merged<A> merge(const Chunk<A>* chunks, int64_t count, OnlineSum<A> Chunk<A>::* which) {
    Merged<A> merged;
    for (int64_t c = 0; c < count; ++c) {
        const A max = (chunks[c].*which).max;
        if (max > merged.max) merged.max = max;
    }
    for (int64_t c = 0; c < count; ++c) {
        const OnlineSum<A>& part = chunks[c].*which;
        if (part.sum != 0) merged.sum += part.sum * ::exp(static_cast<double>(part.max - merged.max));
    }
    return merged;
}

/// mean = factor * sum over the chunks of their key sums, brought to the merged maximum. May overwrite a
/// chunk's sums.
template <typename A>
void merge_keys(const Chunk<A>* chunks, int64_t count, OnlineSum<A> Chunk<A>::* which, A max, double factor,
                int64_t dim, A* mean) {
    for (int64_t c = 0; c < count; ++c) {
        const OnlineSum<A>& part = chunks[c].*which;
        const double relative = part.sum != 0 ? ::exp(static_cast<double>(part.max - max)) : 0.0;
        const A share = static_cast<A>(factor * relative);
        if (c == 0) {
            for (int64_t d = 0; d < dim; ++d) mean[d] = share * part.keys[d];
        } else {
            for (int64_t d = 0; d < dim; ++d) mean[d] += share * part.keys[d];
        }
    }
}

/// scores -= shift where a token is not padding. The maximum goes first: what is left is small, so that log p
/// keeps its digits where p matters.
template <typename A>
void to_log_probabilities(A max, A log_sum, int64_t tokens, const bool* padding, A* scores) {
    if (padding) {
        for (int64_t j = 0; j < tokens; ++j) scores[j] = padding[j] ? 0 : (scores[j] - max) - log_sum;
    } else {
        for (int64_t j = 0; j < tokens; ++j) scores[j] = (scores[j] - max) - log_sum;
    }
}

/// t (e^x - 1 - x) with x = log p - log t, elementwise.
template <typename A>
inline Vec<A> divergence(Vec<A> log_p, Vec<A> log_t) {
    const Vec<A> x = log_p - log_t;
    const Vec<A> t = exp<A>(log_t);
    const Vec<A> far = exp<A>(log_p) - t - t * x;
    const Vec<A> near = t * x * x * exp_remainder<A>(x);
    return (x < 1) & (x > -1) ? near : far;
}

/// p - t = t expm1(x), elementwise.
template <typename A>
inline Vec<A> difference(Vec<A> log_p, Vec<A> log_t, Vec<A> p) {
    const Vec<A> x = log_p - log_t;
    const Vec<A> t = exp<A>(log_t);
    const Vec<A> near = t * (x + x * x * exp_remainder<A>(x));
    return (x < 1) & (x > -1) ? near : p - t;
}

/// KL(t || p). Padding holds log p = log t = 0 and so adds exactly 0.
template <typename A>
A kl_divergence(const A* log_p, const A* log_t, int64_t tokens) {
    constexpr int kStep = kWidth<A>;
    Vec<A> total = {};
    int64_t j = 0;
    for (; j + kStep <= tokens; j += kStep) total += divergence<A>(load<A>(log_p + j), load<A>(log_t + j));
    if (j < tokens) {
        total += divergence<A>(load_first<A>(log_p + j, tokens - j), load_first<A>(log_t + j, tokens - j));
    }
    return sum<A>(total);
}

template <typename A>
void finish(const Chunk<A>* chunks, int64_t count, int64_t tokens, int64_t dim, RegionState region,
            const bool* padding, const RowResults<A>& results) {
    const Merged<A> in = merge(chunks, count, &Chunk<A>::in);
    const Merged<A> out = merge(chunks, count, &Chunk<A>::out);
    const Merged<A> teacher = merge(chunks, count, &Chunk<A>::teacher);
    A poison = 0, teacher_poison = 0;
    for (int64_t c = 0; c < count; ++c) {
        poison += chunks[c].poison;
        teacher_poison += chunks[c].teacher_poison;
    }
    const bool any_token = in.sum != 0 || out.sum != 0;

    const A max = in.max > out.max ? in.max : out.max;
    const double in_relative = in.sum != 0 ? ::exp(static_cast<double>(in.max - max)) : 0.0;
    const double out_relative = out.sum != 0 ? ::exp(static_cast<double>(out.max - max)) : 0.0;
    const double total = in.sum * in_relative + out.sum * out_relative;
    const double log_total = any_token ? ::log(total) : 0.0;
    const double out_of_box = any_token ? out.sum * out_relative / total : 0.0;
    double in_box = 0.0, log_in_box = -kInfinity<double>;
    if (region == RegionState::kSome) {
        in_box = in.sum * in_relative / total;
        log_in_box = in_box > 0.5 ? ::log1p(-out_of_box)
                                  : (static_cast<double>(in.max) - static_cast<double>(max)) + ::log(in.sum) -
                                        log_total;
    }
    A in_region_poison = region == RegionState::kEmpty ? 0 : poison;
    if (region == RegionState::kNotANumber) in_region_poison = kNaN<A>;

    *results.in_box = static_cast<A>(in_box) + in_region_poison;
    *results.rac =
        (region == RegionState::kEmpty ? 0 : static_cast<A>(0 - 2 * log_in_box)) + in_region_poison;
    results.stats[kLogSumExp] = any_token ? static_cast<A>(static_cast<double>(max) + log_total) + poison : 0;
    results.stats[kLogInBox] = static_cast<A>(log_in_box) + in_region_poison;
    results.stats[kOutOfBox] = static_cast<A>(out_of_box) + poison + in_region_poison;
    results.stats[kTeacherLogSumExp] = 0;

    to_log_probabilities(max, static_cast<A>(log_total) + poison, tokens, padding, results.scores);
    *results.mrc = 0;
    if (results.teacher_scores && any_token) {
        const double log_teacher = ::log(teacher.sum);
        results.stats[kTeacherLogSumExp] =
            static_cast<A>(static_cast<double>(teacher.max) + log_teacher) + teacher_poison;
        to_log_probabilities(teacher.max, static_cast<A>(log_teacher) + teacher_poison, tokens, padding,
                             results.teacher_scores);
        *results.mrc = kl_divergence(results.scores, results.teacher_scores, tokens);
    }

    if (!results.key_means) return;
    const double in_factor = in.sum != 0 ? 1 / in.sum : 0.0;
    const double out_factor = out.sum != 0 ? out_relative / total : 0.0;
    const double teacher_factor = teacher.sum != 0 ? 1 / teacher.sum : 0.0;
    merge_keys(chunks, count, &Chunk<A>::in, in.max, in_factor, dim, results.key_means + kMeanIn * dim);
    merge_keys(chunks, count, &Chunk<A>::out, out.max, out_factor, dim, results.key_means + kMeanOut * dim);
    merge_keys(chunks, count, &Chunk<A>::teacher, teacher.max, teacher_factor, dim,
               results.key_means + kMeanTeacher * dim);
}

/// 2 g_rac - g_in A_in: what RAC and A_in together put on p - pin. 0 where the region is empty.
template <typename A>
A region_gradient(const RowGradient<A>& row) {
    return row.stats[kLogInBox] == -kInfinity<A> ? 0 : 2 * row.grad_rac - row.grad_in_box * row.in_box;
}

template <typename A>
inline Vec<A> score_gradient_lanes(const RowGradient<A>& row, A a, Vec<A> log_p, Vec<A> log_t, Vec<A> m) {
    const Vec<A> p = exp<A>(log_p);
    // Outside the region the exponent may be large, and 0 * inf must not arise.
    const Vec<A> pin = m * exp<A>(m > 0 ? log_p - row.stats[kLogInBox] : Vec<A>{});
    // p - pin = p (1 - m) - A_out pin keeps its digits where A_in tends to 1.
    Vec<A> gradient = a * (p * (1 - m) - row.stats[kOutOfBox] * pin);
    if (row.teacher_scores) gradient += row.grad_mrc * difference<A>(log_p, log_t, p);
    return row.scale * gradient;
}

template <typename A>
void score_gradient(const RowGradient<A>& row, int64_t tokens, A* coefficients) {
    constexpr int kStep = kWidth<A>;
    const A a = region_gradient(row);
    const A* log_t = row.teacher_scores ? row.teacher_scores : row.scores;
    int64_t j = 0;
    for (; j + kStep <= tokens; j += kStep) {
        store<A, A>(coefficients + j, score_gradient_lanes<A>(row, a, load<A>(row.scores + j),
                                                              load<A>(log_t + j), load<A>(row.weight + j)));
    }
    if (j < tokens) {
        const int64_t left = tokens - j;
        store_first<A, A>(
            coefficients + j,
            score_gradient_lanes<A>(row, a, load_first<A>(row.scores + j, left),
                                    load_first<A>(log_t + j, left), load_first<A>(row.weight + j, left)),
            left);
    }
    if (row.padding) {
        for (int64_t i = 0; i < tokens; ++i) {
            if (row.padding[i]) coefficients[i] = 0;
        }
    }
}

template <typename A>
void query_gradient(const RowGradient<A>& row, int64_t dim, A* grad_query) {
    const A a = region_gradient(row);
    const A out_of_box = row.stats[kOutOfBox];
    const A* in = row.key_means + kMeanIn * dim;
    const A* out = row.key_means + kMeanOut * dim;
    const A* teacher = row.key_means + kMeanTeacher * dim;
    for (int64_t d = 0; d < dim; ++d) grad_query[d] = row.scale * (a * (out[d] - out_of_box * in[d]));
    if (!row.teacher_scores) return;
    for (int64_t d = 0; d < dim; ++d) {
        grad_query[d] += row.scale * (row.grad_mrc * (out[d] + row.in_box * in[d] - teacher[d]));
    }
}

/// One row of `outer`.
template <typename A, typename K, bool kStream>
inline void scaled_copy(A coefficient, const A* query, int64_t dim, K* out) {
    constexpr int kStep = kWidth<A>;
    int64_t d = 0;
    for (; d + kStep <= dim; d += kStep) {
        const Vec<A> v = coefficient * load<A>(query + d);
        if constexpr (kStream) {
            stream<K, A>(out + d, v);
        } else {
            store<K, A>(out + d, v);
        }
    }
    if (d < dim) store_first<K, A>(out + d, coefficient * load_first<A>(query + d, dim - d), dim - d);
}

template <typename A, typename K>
void outer(const A* coefficients, int64_t coefficient_stride, const A* query, int64_t query_stride,
           int64_t count, int64_t dim, bool past_caches, void* out) {
    K* row = static_cast<K*>(out);
    const bool aligned =
        (reinterpret_cast<uintptr_t>(out) | static_cast<uintptr_t>(dim * sizeof(K))) % kCacheLine == 0;
    if (past_caches && aligned) {
        for (int64_t i = 0; i < count; ++i, row += dim) {
            scaled_copy<A, K, true>(coefficients[i * coefficient_stride], query + i * query_stride, dim, row);
        }
        end_of_stream();
    } else {
        for (int64_t i = 0; i < count; ++i, row += dim) {
            scaled_copy<A, K, false>(coefficients[i * coefficient_stride], query + i * query_stride, dim,
                                     row);
        }
    }
}

}  // namespace

// Functions by the storage type of the keys, in the order of Dtype.
constexpr RowKernels<float> kFloat = {
    {scores<float, float>, scores<float, BFloat16>, scores<float, Float16>, nullptr},
    {forward<float, float>, forward<float, BFloat16>, forward<float, Float16>, nullptr},
    finish<float>,
    score_gradient<float>,
    query_gradient<float>,
    {outer<float, float>, outer<float, BFloat16>, outer<float, Float16>, nullptr},
};

constexpr RowKernels<double> kDouble = {
    {nullptr, nullptr, nullptr, scores<double, double>},
    {nullptr, nullptr, nullptr, forward<double, double>},
    finish<double>,
    score_gradient<double>,
    query_gradient<double>,
    {nullptr, nullptr, nullptr, outer<double, double>},
};

}  // namespace attbalance::ATTBALANCE_ISA
