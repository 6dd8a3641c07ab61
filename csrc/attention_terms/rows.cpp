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

/// No float runs up more products than this before it is added to a double, whatever D and the vector width.
constexpr int kMaxRun = 16;

/// out[i] = scale * query . key[i] for kTokens keys at once, which share the loads of the query.
template <typename A, typename K, int kTokens>
inline void dot(const A* query, double scale, const K* const* key, int64_t dim, double* out) {
    constexpr int kStep = kWidth<A>;
    double total[kTokens] = {};
    for (int64_t d = 0; d < dim;) {
        const int64_t stop = dim - d > kMaxRun * kStep ? d + kMaxRun * kStep : dim;
        Vec<A> run[kTokens] = {};
        for (; d + kStep <= stop; d += kStep) {
            const Vec<A> q = load<A>(query + d);
            for (int i = 0; i < kTokens; ++i) run[i] += q * load<A>(key[i] + d);
        }
        if (d < stop) {
            const Vec<A> q = load_first<A>(query + d, stop - d);
            for (int i = 0; i < kTokens; ++i) run[i] += q * load_first<A>(key[i] + d, stop - d);
            d = stop;
        }
        for (int i = 0; i < kTokens; ++i) total[i] += sum_in_double<A>(run[i]);
    }
    for (int i = 0; i < kTokens; ++i) out[i] = scale * total[i];
}

template <typename A, typename K>
void dots(const Attention<A>& attention, const Block<K>& block, double* out) {
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
    double score[kBlockCapacity];
    A weight[kBlockCapacity];

    void add(const K* k, double s, A w) {
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
        members->score[i] = -kInfinity<double>;
        members->weight[i] = 0;
    }
    Vec<double> largest = splat(online->max);
    for (int i = 0; i < members->count; i += kWidth<double>) {
        const Vec<double> s = load<double>(members->score + i);
        largest = s > largest ? s : largest;
    }
    const double new_max = max<double>(largest);
    const double correction = ::exp(online->max - new_max);
    Vec<A> total = {};
    for (int i = 0; i < members->count; i += kStep) {
        A below[kStep];
        for (int lane = 0; lane < kStep; ++lane)
            below[lane] = static_cast<A>(members->score[i + lane] - new_max);
        const Vec<A> w = load<A>(members->weight + i) * exp<A>(load<A>(below));
        store<A, A>(members->weight + i, w);
        total += w;
    }
    online->sum = online->sum * correction + sum_in_double<A>(total);
    online->max = new_max;
    if (online->keys) {
        weighted_sum(members->key, members->weight, members->count, static_cast<A>(correction), dim,
                     online->keys);
    }
}

template <typename A>
void start(int64_t dim, OnlineSum<A>* online) {
    online->max = -kInfinity<double>;
    online->sum = 0;
    if (online->keys) {
        for (int64_t d = 0; d < dim; ++d) online->keys[d] = 0;
    }
}

template <typename A, typename K>
double scores(const Attention<A>& attention, int64_t begin, int64_t end, double* scores) {
    const int step = block_tokens<K>(attention.dim);
    double poison = 0;
    double score[kMaxBlock];
    Block<K> block;
    for (int64_t j = begin; j < end; j += step) {
        collect(attention, j, j + step < end ? j + step : end, &block);
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
             const double* teacher_scores, double* scores, Chunk<A>* chunk) {
    const int step = block_tokens<K>(attention.dim);
    const bool with_teacher = teacher_scores != nullptr;
    start(attention.dim, &chunk->in);
    start(attention.dim, &chunk->out);
    start(attention.dim, &chunk->teacher);
    chunk->poison = 0;
    double score[kMaxBlock];
    Block<K> block;
    for (int64_t j = begin; j < end; j += step) {
        collect(attention, j, j + step < end ? j + step : end, &block);
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
struct Merged {
    double max = -kInfinity<double>;
    double sum = 0;

    /// The sum relative to another maximum, not below this one.
    double relative_to(double other) const { return sum != 0 ? sum * ::exp(max - other) : 0.0; }
};

template <typename A>
Merged merge(const Chunk<A>* chunks, int64_t count, OnlineSum<A> Chunk<A>::* which) {
    Merged merged;
    for (int64_t c = 0; c < count; ++c) {
        const double max = (chunks[c].*which).max;
        if (max > merged.max) merged.max = max;
    }
    for (int64_t c = 0; c < count; ++c) {
        const OnlineSum<A>& part = chunks[c].*which;
        if (part.sum != 0) merged.sum += part.sum * ::exp(part.max - merged.max);
    }
    return merged;
}

/// mean = sum over the chunks of their key sums, relative to `max`, divided by `total`. May overwrite a
/// chunk's sums.
template <typename A>
void merge_keys(const Chunk<A>* chunks, int64_t count, OnlineSum<A> Chunk<A>::* which, double max,
                double total, int64_t dim, A* mean) {
    for (int64_t c = 0; c < count; ++c) {
        const OnlineSum<A>& part = chunks[c].*which;
        const A share = part.sum != 0 ? static_cast<A>(::exp(part.max - max) / total) : A(0);
        if (c == 0) {
            for (int64_t d = 0; d < dim; ++d) mean[d] = share * part.keys[d];
        } else {
            for (int64_t d = 0; d < dim; ++d) mean[d] += share * part.keys[d];
        }
    }
}

/// log p = score - lse, 0 at padding.
template <typename A>
void log_softmax(const double* scores, double log_sum_exp, int64_t tokens, const bool* padding, A* log_p) {
    for (int64_t j = 0; j < tokens; ++j) {
        log_p[j] = padding && padding[j] ? A(0) : static_cast<A>(scores[j] - log_sum_exp);
    }
}

/// KL(t || p) = sum_j t_j (e^x_j - 1 - x_j), x = log p - log t. x is formed in double: where teacher and
/// student almost agree it is what is left of two large numbers.
template <typename A>
A kl_divergence(const RowResults<A>& row, double log_sum_exp, double teacher_log_sum_exp, int64_t tokens,
                const bool* padding) {
    constexpr int kStep = kWidth<A>;
    Vec<A> total = {};
    for (int64_t j = 0; j < tokens; j += kStep) {
        const int64_t count = tokens - j < kStep ? tokens - j : kStep;
        A difference[kStep] = {}, log_p[kStep] = {}, log_t[kStep] = {};
        for (int64_t i = 0; i < count; ++i) {
            if (padding && padding[j + i]) continue;
            const double s = row.scores[j + i] - log_sum_exp,
                         t = row.teacher_scores[j + i] - teacher_log_sum_exp;
            difference[i] = static_cast<A>(s - t);
            log_p[i] = static_cast<A>(s);
            log_t[i] = static_cast<A>(t);
        }
        const Vec<A> x = load<A>(difference);
        const Vec<A> t = exp<A>(load<A>(log_t));
        const Vec<A> far = exp<A>(load<A>(log_p)) - t - t * x;
        const Vec<A> near = t * x * x * exp_remainder<A>(x);
        total += (x < 1) & (x > -1) ? near : far;  // padding: x = 0, which adds 0
    }
    return static_cast<A>(sum_in_double<A>(total));
}

/// p - t = t expm1(x), elementwise.
template <typename A>
inline Vec<A> difference(Vec<A> log_p, Vec<A> log_t, Vec<A> p) {
    const Vec<A> x = log_p - log_t;
    const Vec<A> t = exp<A>(log_t);
    const Vec<A> near = t * (x + x * x * exp_remainder<A>(x));
    return (x < 1) & (x > -1) ? near : p - t;
}

template <typename A>
void finish(const Chunk<A>* chunks, int64_t count, int64_t tokens, int64_t dim, RegionState region,
            const bool* padding, const RowResults<A>& results) {
    const Merged in = merge(chunks, count, &Chunk<A>::in);
    const Merged out = merge(chunks, count, &Chunk<A>::out);
    const Merged teacher = merge(chunks, count, &Chunk<A>::teacher);
    double poison = 0, teacher_poison = 0;
    for (int64_t c = 0; c < count; ++c) {
        poison += chunks[c].poison;
        teacher_poison += chunks[c].teacher_poison;
    }
    const bool any_token = in.sum != 0 || out.sum != 0;

    const double max = in.max > out.max ? in.max : out.max;
    const double total = in.relative_to(max) + out.relative_to(max);
    const double log_total = any_token ? ::log(total) : 0.0;
    const double log_sum_exp = any_token ? max + log_total + poison : 0.0;
    const double out_of_box = any_token ? out.relative_to(max) / total : 0.0;
    double in_box = 0, rac = 0, log_in_box = -kInfinity<double>;
    if (region == RegionState::kSome) {
        in_box = in.relative_to(max) / total + poison;
        log_in_box =
            in_box > 0.5 ? ::log1p(-out_of_box) : (in.max - max) + ::log(in.sum) - log_total + poison;
        rac = 0 - 2 * log_in_box;
    } else if (region == RegionState::kNotANumber) {
        in_box = rac = log_in_box = kNaN<double>;
    }
    *results.in_box = static_cast<A>(in_box);
    *results.rac = static_cast<A>(rac);
    results.stats[kLogSumExp] = static_cast<A>(log_sum_exp);
    results.stats[kLogInBox] = static_cast<A>(log_in_box);
    results.stats[kOutOfBox] =
        static_cast<A>(region == RegionState::kNotANumber ? kNaN<double> : out_of_box + poison);
    results.stats[kTeacherLogSumExp] = 0;
    log_softmax(results.scores, log_sum_exp, tokens, padding, results.log_p);

    *results.mrc = 0;
    if (results.teacher_scores) {
        const double teacher_log_sum_exp =
            any_token ? teacher.max + ::log(teacher.sum) + teacher_poison : 0.0;
        results.stats[kTeacherLogSumExp] = static_cast<A>(teacher_log_sum_exp);
        log_softmax(results.teacher_scores, teacher_log_sum_exp, tokens, padding, results.log_t);
        *results.mrc = kl_divergence(results, log_sum_exp, teacher_log_sum_exp, tokens, padding);
    }

    if (!results.key_means) return;
    merge_keys(chunks, count, &Chunk<A>::in, in.max, in.sum, dim, results.key_means + kMeanIn * dim);
    merge_keys(chunks, count, &Chunk<A>::out, max, total, dim, results.key_means + kMeanOut * dim);
    merge_keys(chunks, count, &Chunk<A>::teacher, teacher.max, teacher.sum + teacher_poison, dim,
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
    if (row.log_t) gradient += row.grad_mrc * difference<A>(log_p, log_t, p);
    return row.scale * gradient;
}

template <typename A>
void score_gradient(const RowGradient<A>& row, int64_t tokens, A* coefficients) {
    constexpr int kStep = kWidth<A>;
    const A a = region_gradient(row);
    const A* log_t = row.log_t ? row.log_t : row.log_p;
    int64_t j = 0;
    for (; j + kStep <= tokens; j += kStep) {
        store<A, A>(coefficients + j, score_gradient_lanes<A>(row, a, load<A>(row.log_p + j),
                                                              load<A>(log_t + j), load<A>(row.weight + j)));
    }
    if (j < tokens) {
        const int64_t left = tokens - j;
        store_first<A, A>(
            coefficients + j,
            score_gradient_lanes<A>(row, a, load_first<A>(row.log_p + j, left),
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
    if (!row.log_t) return;
    for (int64_t d = 0; d < dim; ++d) {
        grad_query[d] += row.scale * (row.grad_mrc * (out[d] + row.in_box * in[d] - teacher[d]));
    }
}

/// One row of `outer`. A coefficient of 0 gives 0 whatever the query: padding must not see that it is not
/// finite.
template <typename A, typename K, bool kStream>
inline void scaled_copy(A coefficient, const A* query, int64_t dim, K* out) {
    constexpr int kStep = kWidth<A>;
    const bool zero = coefficient == 0;
    int64_t d = 0;
    for (; d + kStep <= dim; d += kStep) {
        const Vec<A> v = zero ? Vec<A>{} : coefficient * load<A>(query + d);
        if constexpr (kStream) {
            stream<K, A>(out + d, v);
        } else {
            store<K, A>(out + d, v);
        }
    }
    if (d < dim) {
        const Vec<A> v = zero ? Vec<A>{} : coefficient * load_first<A>(query + d, dim - d);
        store_first<K, A>(out + d, v, dim - d);
    }
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
