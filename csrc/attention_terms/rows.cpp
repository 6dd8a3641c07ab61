// The loops of rows.h. Compiled once for each instruction set, with ATTBALANCE_ISA naming the namespace.
#include "rows.h"

#include <math.h>

#include <limits>

#include "../simd.h"
#include "../vector_math.h"

namespace attbalance::ATTBALANCE_ISA {
namespace {

/// Tokens are handled in tiles: all scores of one first, then the softmax of all, then the weighted sum of
/// the keys, which the caches still have.
constexpr int64_t kTileBytes = 1 << 16;
constexpr int kMaxTile = 64;

/// Keys that are read at a time, from places of the tile that lie on different pages: processors fetch ahead
/// one stream of each page.
constexpr int kStreams = 4;

constexpr int64_t kCacheLine = 64;

template <typename A>
constexpr A kInfinity = std::numeric_limits<A>::infinity();

template <typename A>
constexpr A kNaN = std::numeric_limits<A>::quiet_NaN();

/// Tokens that are not padding.
template <typename K>
struct Tile {
    int count = 0;
    const K* key[kMaxTile];
    int64_t token[kMaxTile];
};

template <typename K>
int tile_tokens(int64_t dim) {
    const int64_t fitting = kTileBytes / (dim * static_cast<int64_t>(sizeof(K)));
    if (fitting >= kMaxTile) return kMaxTile;
    return fitting < kStreams ? kStreams : static_cast<int>(fitting / kStreams * kStreams);
}

template <typename A, typename K>
void collect(const Attention<A>& attention, int64_t begin, int64_t end, Tile<K>* tile) {
    const K* key = static_cast<const K*>(attention.key);
    tile->count = 0;
    for (int64_t j = begin; j < end; ++j) {
        if (attention.padding && attention.padding[j]) continue;
        tile->key[tile->count] = key + j * attention.key_stride;
        tile->token[tile->count] = j;
        ++tile->count;
    }
}

/// Bring `bytes` from `offset` bytes past `p` towards the core, into the L2 cache. Harmless beyond the end of
/// the keys.
inline void prefetch(const void* p, int64_t offset, int64_t bytes) {
    const uintptr_t first = reinterpret_cast<uintptr_t>(p) + static_cast<uintptr_t>(offset);
    for (int64_t i = 0; i < bytes; i += kCacheLine) {
        __builtin_prefetch(reinterpret_cast<const void*>(first + static_cast<uintptr_t>(i)), 0, 2);
    }
}

/// No float runs up more products than this before it is added to a double, whatever D and the vector width.
constexpr int64_t kMaxRun = 16;

/// query . key[i] for kStreams keys at once, which share the loads of the query.
template <typename A, typename K>
inline Lanes<double, kStreams> dot(const A* query, const K* const (&key)[kStreams], int64_t dim) {
    constexpr int kStep = kWidth<A>;
    Lanes<double, kStreams> total = {};
    for (int64_t d = 0; d < dim;) {
        const int64_t stop = dim - d > kMaxRun * kStep ? d + kMaxRun * kStep : dim;
        Vec<A> run[kStreams] = {};
        for (; d + kStep <= stop; d += kStep) {
            const Vec<A> q = load<A>(query + d);
            for (int i = 0; i < kStreams; ++i) run[i] += q * load<A>(key[i] + d);
        }
        if (d < stop) {
            const Vec<A> q = load_first<A>(query + d, stop - d);
            for (int i = 0; i < kStreams; ++i) run[i] += q * load_first<A>(key[i] + d, stop - d);
            d = stop;
        }
        total += sums_in_double<A>(run);
    }
    return total;
}

/// The scores of a tile.
template <typename A, typename K>
void dots(const Attention<A>& attention, const Tile<K>& tile, double* score) {
    const int64_t bytes = attention.dim * static_cast<int64_t>(sizeof(K));
    const int64_t next =
        tile_tokens<K>(attention.dim) * attention.key_stride * static_cast<int64_t>(sizeof(K));
    const int length = (tile.count + kStreams - 1) / kStreams;  // of a stream
    for (int i = 0; i < length; ++i) {
        int place[kStreams];
        const K* key[kStreams];
        for (int s = 0; s < kStreams; ++s) {
            place[s] = s * length + i < tile.count ? s * length + i : tile.count - 1;
            key[s] = tile.key[place[s]];
            if (attention.fetch_ahead) prefetch(key[s], next, bytes);
        }
        const Lanes<double, kStreams> found =
            attention.scale * dot<A, K>(attention.query, key, attention.dim);
        for (int s = 0; s < kStreams; ++s) score[place[s]] = found[s];
    }
}

/// The sums that a token may enter, with m, 1 - m and 1 of it.
enum { kIn, kOut, kTeacher, kSums };

/// The weights of a tile's tokens in one of the sums; 0 behind the last of them, up to a whole vector.
template <typename A>
struct Weights {
    alignas(
        64) A of[kMaxTile];  // first the share of each token that enters the sum, then the weight of its key
    A correction;            // what the sum so far is multiplied with
};

/// Take a tile into a softmax sum: shares become weights. score: (kMaxTile,), finite or not behind the tile's
/// end.
template <typename A>
void absorb(const double* score, int count, Weights<A>* weights, OnlineSum<A>* online) {
    constexpr int kStep = kWidth<A>;
    using Scores = Lanes<double, kStep>;
    const Scores none = Scores{} - kInfinity<double>;
    const auto entering = [&](int i) {
        return __builtin_convertvector(load<A>(weights->of + i), Scores) > 0;
    };
    const auto scores = [&](int i) {
        Scores s;
        std::memcpy(&s, score + i, sizeof(s));
        return s;
    };
    Scores top = Scores{} + online->max;
    for (int i = 0; i < count; i += kStep) {
        const Scores s = entering(i) ? scores(i) : none;
        top = s > top ? s : top;
    }
    double max = top[0];
    for (int i = 1; i < kStep; ++i) max = top[i] > max ? top[i] : max;
    const double correction = max == online->max ? 1.0 : ::exp(online->max - max);
    Vec<A> total = {};
    for (int i = 0; i < count; i += kStep) {
        // What does not enter gets a share of 0 of 1, not of exp(-inf): numbers that underflow are slow.
        const Scores below = entering(i) ? scores(i) - max : Scores{};
        const Vec<A> w = load<A>(weights->of + i) * exp<A>(__builtin_convertvector(below, Vec<A>));
        store<A, A>(weights->of + i, w);
        total += w;
    }
    online->sum = online->sum * correction + sum_in_double<A>(total);
    online->max = max;
    weights->correction = static_cast<A>(correction);
}

/// total[s] = correction * total[s] + sum_i weight[s][i] * key[i] for the first kCount sums, in kVectors
/// vectors of columns from `d` on.
template <typename A, typename K, int kCount, int kVectors>
inline void add_columns(const Tile<K>& tile, const Weights<A> (&weights)[kSums], A* const (&total)[kSums],
                        int64_t d) {
    constexpr int kStep = kWidth<A>;
    Vec<A> sum[kCount][kVectors] = {};
    for (int i = 0; i < tile.count; ++i) {
        for (int v = 0; v < kVectors; ++v) {
            const Vec<A> key = load<A>(tile.key[i] + d + v * kStep);
            for (int s = 0; s < kCount; ++s) sum[s][v] += weights[s].of[i] * key;
        }
    }
    for (int s = 0; s < kCount; ++s) {
        for (int v = 0; v < kVectors; ++v) {
            A* const out = total[s] + d + v * kStep;
            store<A, A>(out, weights[s].correction * load<A>(out) + sum[s][v]);
        }
    }
}

template <typename A, typename K, int kCount>
void add_keys(const Tile<K>& tile, const Weights<A> (&weights)[kSums], int64_t dim,
              A* const (&total)[kSums]) {
    constexpr int64_t kStep = kWidth<A>;
    constexpr int kVectors = 4;
    int64_t d = 0;
    for (; d + kVectors * kStep <= dim; d += kVectors * kStep)
        add_columns<A, K, kCount, kVectors>(tile, weights, total, d);
    for (; d + kStep <= dim; d += kStep) add_columns<A, K, kCount, 1>(tile, weights, total, d);
    if (d == dim) return;
    Vec<A> sum[kCount] = {};
    for (int i = 0; i < tile.count; ++i) {
        const Vec<A> key = load_first<A>(tile.key[i] + d, dim - d);
        for (int s = 0; s < kCount; ++s) sum[s] += weights[s].of[i] * key;
    }
    for (int s = 0; s < kCount; ++s) {
        const Vec<A> before = weights[s].correction * load_first<A>(total[s] + d, dim - d);
        store_first<A, A>(total[s] + d, before + sum[s], dim - d);
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
    const int step = tile_tokens<K>(attention.dim);
    double poison = 0;
    double score[kMaxTile];
    Tile<K> tile;
    for (int64_t j = begin; j < end; j += step) {
        collect(attention, j, j + step < end ? j + step : end, &tile);
        dots(attention, tile, score);
        for (int i = 0; i < tile.count; ++i) {
            scores[tile.token[i]] = score[i];
            poison += score[i] * 0;
        }
    }
    return poison;
}

template <typename A, typename K>
void forward(const Attention<A>& attention, int64_t begin, int64_t end, const A* weight,
             const double* teacher_scores, double* scores, Chunk<A>* chunk) {
    const int64_t dim = attention.dim;
    const int step = tile_tokens<K>(dim);
    start(dim, &chunk->in);
    start(dim, &chunk->out);
    start(dim, &chunk->teacher);
    chunk->poison = 0;
    alignas(64) double score[kMaxTile] = {}, teacher_score[kMaxTile] = {};
    A* const keys[kSums] = {chunk->in.keys, chunk->out.keys, chunk->teacher.keys};
    Weights<A> weights[kSums];
    Tile<K> tile;
    for (int64_t j = begin; j < end; j += step) {
        collect(attention, j, j + step < end ? j + step : end, &tile);
        dots(attention, tile, score);
        for (int i = 0; i < tile.count; ++i) {
            const int64_t token = tile.token[i];
            const A m = weight[token];
            scores[token] = score[i];
            chunk->poison += score[i] * 0;
            weights[kIn].of[i] = m;
            weights[kOut].of[i] = 1 - m;
            if (teacher_scores) {
                weights[kTeacher].of[i] = 1;
                teacher_score[i] = teacher_scores[token];
            }
        }
        for (int i = tile.count; i % kWidth<A> != 0; ++i)
            weights[kIn].of[i] = weights[kOut].of[i] = weights[kTeacher].of[i] = 0;
        absorb(score, tile.count, &weights[kIn], &chunk->in);
        absorb(score, tile.count, &weights[kOut], &chunk->out);
        if (teacher_scores) absorb(teacher_score, tile.count, &weights[kTeacher], &chunk->teacher);
        if (!chunk->in.keys) continue;
        if (teacher_scores) {
            add_keys<A, K, 3>(tile, weights, dim, keys);
        } else {
            add_keys<A, K, 2>(tile, weights, dim, keys);
        }
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

/// mean = sum over the chunks of their key sums, relative to `max`, divided by `total`: twice by its root,
/// because 1 / total overflows where all weights of a region are subnormal. May overwrite a chunk's sums.
template <typename A>
void merge_keys(const Chunk<A>* chunks, int64_t count, OnlineSum<A> Chunk<A>::* which, double max,
                double total, int64_t dim, A* mean) {
    const double root = total != 0 ? 1 / ::sqrt(total) : 0.0;
    const A factor = static_cast<A>(root);
    for (int64_t c = 0; c < count; ++c) {
        const OnlineSum<A>& part = chunks[c].*which;
        const A share = part.sum != 0 ? static_cast<A>(::exp(part.max - max) * root) : A(0);
        if (c == 0) {
            for (int64_t d = 0; d < dim; ++d) mean[d] = share * part.keys[d] * factor;
        } else {
            for (int64_t d = 0; d < dim; ++d) mean[d] += share * part.keys[d] * factor;
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
        total += ((x < 1) & (x > -1)) ? near : far;  // padding: x = 0, which adds 0
    }
    return static_cast<A>(sum_in_double<A>(total));
}

/// p - t = t expm1(x), elementwise.
template <typename A>
inline Vec<A> difference(Vec<A> log_p, Vec<A> log_t, Vec<A> p) {
    const Vec<A> x = log_p - log_t;
    const Vec<A> t = exp<A>(log_t);
    const Vec<A> near = t * (x + x * x * exp_remainder<A>(x));
    return ((x < 1) & (x > -1)) ? near : p - t;
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
    // Outside the region the exponent may be large, and 0 * inf must not arise; nor must m * inf, where m is
    // subnormal: the root of the exponential does not overflow.
    const Vec<A> root = exp<A>(m > 0 ? (log_p - row.stats[kLogInBox]) / 2 : Vec<A>{});
    const Vec<A> pin = m * root * root;
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
