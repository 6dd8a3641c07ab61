// `attention_terms` and `attention_terms_backward` on the CPU: checks, allocation and parallelism around
// rows.h.
//
// How the work is cut depends on the shapes alone, never on the number of threads, so that the results have
// the same bits for any number of them.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "../cpu_features.h"
#include "../huge_pages.h"
#include "../parallel.h"
#include "../tensors.h"
#include "attention_terms.h"
#include "check_region.h"
#include "region_weights.h"
#include "rows.h"

namespace attbalance {
namespace {

using Tensors = std::vector<Tensor>;
using Ints = std::vector<int64_t>;
using Flags = std::vector<bool>;
using OptionalTensor = std::optional<Tensor>;

template <typename A>
const RowKernels<A>& row_kernels() {
    constexpr bool kSingle = sizeof(A) == sizeof(float);
    const auto pick = [](const RowKernels<float>& f, const RowKernels<double>& d) -> const RowKernels<A>& {
        if constexpr (kSingle) {
            return f;
        } else {
            return d;
        }
    };
#if defined(__x86_64__)
    if (instruction_set() == InstructionSet::kAvx512) return pick(avx512::kFloat, avx512::kDouble);
    if (instruction_set() == InstructionSet::kAvx2) return pick(avx2::kFloat, avx2::kDouble);
#endif
    return pick(baseline::kFloat, baseline::kDouble);
}

const bool* check_padding(const OptionalTensor& padding, int64_t batch, int64_t tokens) {
    if (!padding) return nullptr;
    check(*padding, "padding", ScalarType::Bool, {batch, tokens});
    return data<const bool>(*padding);
}

/// The queries and keys of all layers, as pointers.
template <typename A>
struct Layers {
    struct Layer {
        const A* query;  // (B, D)
        const char* key;
        int64_t batch_stride;  // elements
        int64_t token_stride;
        Dtype dtype;
        double scale;
    };
    std::vector<Layer> layers;
    int64_t batch = 0, tokens = 0, dim = 0;

    Layers(const Tensors& query, const Tensors& key, const std::vector<double>& scale) {
        STD_TORCH_CHECK(query.size() == key.size() && scale.size() == key.size(),
                        "attbalance_ext: query, key and scale must have one entry per layer");
        for (size_t l = 0; l < key.size(); ++l) {
            const Tensor& k = key[l];
            STD_TORCH_CHECK(k.is_cpu() && k.dim() == 3, "attbalance_ext: key must be a CPU tensor (B, N, D)");
            if (l == 0) {
                batch = k.size(0);
                tokens = k.size(1);
                dim = k.size(2);
            }
            STD_TORCH_CHECK(k.size(0) == batch && k.size(1) == tokens && k.size(2) == dim,
                            "attbalance_ext: all layers must have the same shape");
            STD_TORCH_CHECK(k.stride(2) == 1 || dim <= 1,
                            "attbalance_ext: the last dimension of key must be contiguous");
            STD_TORCH_CHECK(in_double(dtype_of(k)) == (sizeof(A) == sizeof(double)),
                            "attbalance_ext: key is float64 exactly when query is");
            check(query[l], "query", kScalarType<A>, {batch, dim});
            layers.push_back({data<const A>(query[l]), data<const char>(k), k.stride(0), k.stride(1),
                              dtype_of(k), scale[l]});
        }
    }

    Attention<A> attention(int64_t l, int64_t b, const bool* padding) const {
        const Layer& layer = layers[l];
        return {layer.query + b * dim,
                layer.scale,
                layer.key + b * layer.batch_stride * element_bytes(layer.dtype),
                layer.token_stride,
                dim,
                padding ? padding + b * tokens : nullptr,
                needs_prefetch()};
    }
};

/// Rows are split into chunks where there are too few of them to keep many cores busy.
int64_t chunks_per_row(int64_t rows, int64_t tokens) {
    constexpr int64_t kEnoughRows = 32;
    constexpr int64_t kMinTokens = 64;
    const int64_t wanted = (kEnoughRows + rows - 1) / std::max<int64_t>(rows, 1);
    return std::clamp<int64_t>(wanted, 1, std::max<int64_t>(tokens / kMinTokens, 1));
}

using ForwardOutputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

template <typename A>
ForwardOutputs forward(const Tensors& query, const Tensors& key, const std::vector<double>& scale,
                       const Tensor& region, const Ints& grids, int64_t rule, const OptionalTensor& padding,
                       const Tensors& teacher_query, const Tensors& teacher_key,
                       const std::vector<double>& teacher_scale, bool need_key_means) {
    const Layers<A> student(query, key, scale);
    const Layers<A> teacher(teacher_query, teacher_key, teacher_scale);
    const bool with_teacher = !teacher.layers.empty();
    const int64_t layers = static_cast<int64_t>(student.layers.size());
    const int64_t batch = student.batch, tokens = student.tokens, dim = student.dim;
    STD_TORCH_CHECK(tokens > 0, "attbalance_ext: key has no tokens");
    STD_TORCH_CHECK(!with_teacher || (teacher.layers.size() == student.layers.size() &&
                                      teacher.batch == batch && teacher.tokens == tokens),
                    "attbalance_ext: the teacher must have the student's layers, batch and tokens");
    check_region(region, grids, rule, batch, tokens, kScalarType<A>);
    const bool* padded = check_padding(padding, batch, tokens);

    constexpr ScalarType kType = kScalarType<A>;
    const Tensor in_box = empty({layers, batch}, kType), rac = empty({layers, batch}, kType);
    const Tensor mrc = empty({layers, batch}, kType), valid = empty({batch}, ScalarType::Bool);
    const Tensor log_p = empty({layers, batch, tokens}, kType);
    const Tensor log_t = with_teacher ? empty({layers, batch, tokens}, kType) : empty({0}, kType);
    const Tensor scores = empty({layers, batch, tokens}, ScalarType::Double);
    const Tensor teacher_scores =
        with_teacher ? empty({layers, batch, tokens}, ScalarType::Double) : empty({0}, kType);
    const Tensor stats = empty({layers, batch, kStats}, kType);
    const Tensor key_means =
        need_key_means ? empty({layers, batch, kKeyMeans, dim}, kType) : empty({0}, kType);

    const RegionWeights<A> weights =
        region_weights<A>(region, grids, static_cast<Rule>(rule), padded, batch, tokens);
    for (int64_t b = 0; b < batch; ++b) data<bool>(valid)[b] = weights.states[b] != RegionState::kEmpty;

    const RowKernels<A>& kernels = row_kernels<A>();
    const int64_t rows = layers * batch;
    const int64_t splits = chunks_per_row(rows, tokens);
    std::vector<Chunk<A>> chunks(rows * splits);
    // With one chunk in a row its key sums grow where the means go; otherwise each chunk has its own.
    std::vector<A> key_sums(need_key_means && splits > 1 ? rows * splits * kKeyMeans * dim : 0);
    A* const sums = !need_key_means ? nullptr : splits > 1 ? key_sums.data() : data<A>(key_means);

    const auto run_chunk = [&](int64_t row, int64_t split) {
        const int64_t l = row / batch, b = row % batch;
        const int64_t begin = tokens * split / splits, end = tokens * (split + 1) / splits;
        Chunk<A>& chunk = chunks[row * splits + split];
        A* const sum = sums ? sums + (row * splits + split) * kKeyMeans * dim : nullptr;
        chunk.in.keys = sum ? sum + kMeanIn * dim : nullptr;
        chunk.out.keys = sum ? sum + kMeanOut * dim : nullptr;
        chunk.teacher.keys = sum ? sum + kMeanTeacher * dim : nullptr;
        chunk.teacher_poison = 0;
        double* const teacher_row = with_teacher ? data<double>(teacher_scores) + row * tokens : nullptr;
        if (with_teacher) {
            chunk.teacher_poison = kernels.scores[static_cast<int>(teacher.layers[l].dtype)](
                teacher.attention(l, b, padded), begin, end, teacher_row);
        }
        kernels.forward[static_cast<int>(student.layers[l].dtype)](
            student.attention(l, b, padded), begin, end, weights.row(b, tokens), teacher_row,
            data<double>(scores) + row * tokens, &chunk);
    };
    const auto finish_row = [&](int64_t row) {
        const int64_t b = row % batch;
        const RowResults<A> results = {
            data<const double>(scores) + row * tokens,
            with_teacher ? data<const double>(teacher_scores) + row * tokens : nullptr,
            data<A>(in_box) + row,
            data<A>(rac) + row,
            data<A>(mrc) + row,
            data<A>(stats) + row * kStats,
            data<A>(log_p) + row * tokens,
            with_teacher ? data<A>(log_t) + row * tokens : nullptr,
            need_key_means ? data<A>(key_means) + row * kKeyMeans * dim : nullptr,
        };
        kernels.finish(chunks.data() + row * splits, splits, tokens, dim, weights.states[b],
                       padded ? padded + b * tokens : nullptr, results);
    };

    parallel_for(rows * splits, 1, [&](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; ++i) {
            run_chunk(i / splits, i % splits);
            if (splits == 1) finish_row(i);
        }
    });
    if (splits > 1) {
        for (int64_t row = 0; row < rows; ++row) finish_row(row);
    }
    return {in_box, rac, mrc, valid, log_p, log_t, stats, key_means};
}

ForwardOutputs attention_terms(const Tensors& query, const Tensors& key, const std::vector<double>& scale,
                               const Tensor& region, const Ints& grids, int64_t rule,
                               const OptionalTensor& padding, const Tensors& teacher_query,
                               const Tensors& teacher_key, const std::vector<double>& teacher_scale,
                               bool need_key_means) {
    STD_TORCH_CHECK(!query.empty(), "attbalance_ext: attention_terms needs at least one layer");
    const auto run = query[0].scalar_type() == ScalarType::Double ? forward<double> : forward<float>;
    return run(query, key, scale, region, grids, rule, padding, teacher_query, teacher_key, teacher_scale,
               need_key_means);
}

using BackwardOutputs = std::tuple<Tensors, Tensors, Tensor>;

/// Gradients of more bytes than this are not expected to be in an L2 cache when the next operator reads them.
constexpr int64_t kCachedBytes = 4 << 20;

/// Where one layer's dK goes. Its rows of D values are consecutive: batch-first or sequence-first.
struct KeyGradient {
    int64_t layer;
    Dtype dtype;
    bool sequence_first;
    char* out;
};

/// dK of these layers in one stream, in the order of its storage. What could not stay in the caches anyway is
/// written past them; less than that is left there for the next operator. coefficients: (L, B, N).
template <typename A>
void write_key_gradients(const RowKernels<A>& kernels, const std::vector<KeyGradient>& key_gradients,
                         const A* coefficients, const Tensors& query, int64_t batch, int64_t tokens,
                         int64_t dim) {
    int64_t bytes = 0;
    for (const KeyGradient& target : key_gradients)
        bytes += batch * tokens * dim * element_bytes(target.dtype);
    const bool past_caches = bytes > kCachedBytes;
    constexpr int64_t kRowsPerPiece = 64;
    const int64_t pieces = (batch * tokens + kRowsPerPiece - 1) / kRowsPerPiece;
    parallel_for(static_cast<int64_t>(key_gradients.size()) * pieces, 1, [&](int64_t first, int64_t last) {
        for (int64_t piece = first; piece < last; ++piece) {
            const KeyGradient& target = key_gradients[piece / pieces];
            const A* const q = data<const A>(query[target.layer]);
            const A* const c = coefficients + target.layer * batch * tokens;
            const auto outer = kernels.outer[static_cast<int>(target.dtype)];
            const int64_t row_bytes = dim * element_bytes(target.dtype);
            const int64_t stop = std::min((piece % pieces + 1) * kRowsPerPiece, batch * tokens);
            for (int64_t row = piece % pieces * kRowsPerPiece; row < stop;) {
                // A run of rows that share a sample (batch-first) or a token (sequence-first).
                const int64_t run = target.sequence_first ? batch : tokens;
                const int64_t position = row % run;
                const int64_t count = std::min(run - position, stop - row);
                char* const out = target.out + row * row_bytes;
                if (target.sequence_first) {
                    outer(c + position * tokens + row / run, tokens, q + position * dim, dim, count, dim,
                          past_caches, out);
                } else {
                    outer(c + row, 1, q + row / run * dim, 0, count, dim, past_caches, out);
                }
                row += count;
            }
        }
    });
}

template <typename A>
BackwardOutputs backward(const Tensor& grad_in_box, const Tensor& grad_rac, const Tensor& grad_mrc,
                         const Tensors& query, const std::vector<double>& scale, const Tensor& region,
                         const Ints& grids, int64_t rule, const OptionalTensor& padding, const Tensor& in_box,
                         const Tensor& log_p, const Tensor& log_t, const Tensor& stats,
                         const Tensor& key_means, const Ints& key_dtype, const Flags& sequence_first,
                         const Flags& need_query, const Flags& need_key, bool need_dot) {
    constexpr ScalarType kType = kScalarType<A>;
    const int64_t layers = static_cast<int64_t>(query.size());
    STD_TORCH_CHECK(log_p.dim() == 3, "attbalance_ext: scores must be (L, B, N)");
    const int64_t batch = log_p.size(1), tokens = log_p.size(2), dim = query[0].size(1);
    for (const size_t entries :
         {scale.size(), key_dtype.size(), sequence_first.size(), need_query.size(), need_key.size()}) {
        STD_TORCH_CHECK(entries == query.size(), "attbalance_ext: every list must have one entry per layer");
    }
    for (const Tensor& q : query) check(q, "query", kType, {batch, dim});
    check(grad_in_box, "grad_in_box", kType, {layers, batch});
    check(grad_rac, "grad_rac", kType, {layers, batch});
    check(grad_mrc, "grad_mrc", kType, {layers, batch});
    check(in_box, "in_box", kType, {layers, batch});
    check(log_p, "scores", kType, {layers, batch, tokens});
    check(stats, "stats", kType, {layers, batch, kStats});
    const bool with_teacher = log_t.dim() == 3;
    if (with_teacher) check(log_t, "teacher_scores", kType, {layers, batch, tokens});
    const bool with_means = std::find(need_query.begin(), need_query.end(), true) != need_query.end();
    if (with_means) check(key_means, "key_means", kType, {layers, batch, kKeyMeans, dim});
    check_region(region, grids, rule, batch, tokens, kType);
    const bool* padded = check_padding(padding, batch, tokens);

    Tensors grad_query, grad_key;
    std::vector<A*> query_out(layers, nullptr);
    std::vector<KeyGradient> key_gradients;
    for (int64_t l = 0; l < layers; ++l) {
        if (need_query[l]) {
            grad_query.push_back(empty({batch, dim}, kType));
            query_out[l] = data<A>(grad_query.back());
        }
        if (!need_key[l]) continue;
        STD_TORCH_CHECK(key_dtype[l] >= 0 && key_dtype[l] < kDtypes, "attbalance_ext: unknown dtype code ",
                        key_dtype[l]);
        const Dtype dtype = static_cast<Dtype>(key_dtype[l]);
        STD_TORCH_CHECK(in_double(dtype) == (sizeof(A) == sizeof(double)),
                        "attbalance_ext: key is float64 exactly when query is");
        if (sequence_first[l]) {
            grad_key.push_back(
                empty_strided({batch, tokens, dim}, {dim, batch * dim, 1}, scalar_type(dtype)));
        } else {
            grad_key.push_back(empty({batch, tokens, dim}, scalar_type(dtype)));
        }
        advise_huge_pages(grad_key.back(), batch * tokens * dim * element_bytes(dtype));
        key_gradients.push_back({l, dtype, sequence_first[l], data<char>(grad_key.back())});
    }

    const RowKernels<A>& kernels = row_kernels<A>();
    const RegionWeights<A> weights =
        region_weights<A>(region, grids, static_cast<Rule>(rule), padded, batch, tokens);
    // The gradient by query . key.
    const bool with_coefficients = need_dot || !key_gradients.empty();
    const Tensor coefficients = with_coefficients ? empty({layers, batch, tokens}, kType) : empty({0}, kType);

    parallel_for(layers * batch, 1, [&](int64_t first, int64_t last) {
        for (int64_t row = first; row < last; ++row) {
            const int64_t l = row / batch, b = row % batch;
            const RowGradient<A> gradient = {
                data<const A>(grad_in_box)[row],
                data<const A>(grad_rac)[row],
                data<const A>(grad_mrc)[row],
                static_cast<A>(scale[l]),
                data<const A>(in_box)[row],
                data<const A>(stats) + row * kStats,
                data<const A>(log_p) + row * tokens,
                with_teacher ? data<const A>(log_t) + row * tokens : nullptr,
                weights.row(b, tokens),
                padded ? padded + b * tokens : nullptr,
                with_means ? data<const A>(key_means) + row * kKeyMeans * dim : nullptr,
            };
            if (need_dot || need_key[l])
                kernels.score_gradient(gradient, tokens, data<A>(coefficients) + row * tokens);
            if (query_out[l]) kernels.query_gradient(gradient, dim, query_out[l] + b * dim);
        }
    });

    write_key_gradients(kernels, key_gradients, data<const A>(coefficients), query, batch, tokens, dim);
    return {grad_query, grad_key, need_dot ? coefficients : empty({0}, kType)};
}

BackwardOutputs attention_terms_backward(
    const Tensor& grad_in_box, const Tensor& grad_rac, const Tensor& grad_mrc, const Tensors& query,
    const std::vector<double>& scale, const Tensor& region, const Ints& grids, int64_t rule,
    const OptionalTensor& padding, const Tensor& in_box, const Tensor& scores, const Tensor& teacher_scores,
    const Tensor& stats, const Tensor& key_means, const Ints& key_dtype, const Flags& sequence_first,
    const Flags& need_query, const Flags& need_key, bool need_dot) {
    STD_TORCH_CHECK(!query.empty(), "attbalance_ext: attention_terms_backward needs at least one layer");
    const auto run = query[0].scalar_type() == ScalarType::Double ? backward<double> : backward<float>;
    return run(grad_in_box, grad_rac, grad_mrc, query, scale, region, grids, rule, padding, in_box, scores,
               teacher_scores, stats, key_means, key_dtype, sequence_first, need_query, need_key, need_dot);
}

}  // namespace
}  // namespace attbalance

STABLE_TORCH_LIBRARY_IMPL(attbalance_ext, CPU, m) {
    m.impl("attention_terms.cpu", TORCH_BOX(&attbalance::attention_terms));
    m.impl("attention_terms_backward.cpu", TORCH_BOX(&attbalance::attention_terms_backward));
}
