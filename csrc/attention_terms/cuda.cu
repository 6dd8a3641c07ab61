// `attention_terms` and `attention_terms_backward` on a GPU: checks, allocation and launches around
// kernels.cuh. Nothing here waits for the device or copies to it.
#include <current_device.h>
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <array>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "../tensors.h"
#include "check_region.h"
#include "kernels.cuh"

namespace attbalance {
namespace {

using Tensors = std::vector<Tensor>;
using Ints = std::vector<int64_t>;
using Flags = std::vector<bool>;
using OptionalTensor = std::optional<Tensor>;

constexpr ScalarType kFloat = ScalarType::Float;

/// L, B, N and D of a call, within what the kernels index with int.
struct Shape {
    int64_t layers, batch, tokens, dim;

    void check_limits() const {
        constexpr int64_t kMost = std::numeric_limits<int>::max();
        STD_TORCH_CHECK(tokens > 0 && dim > 0, "attbalance_ext: key has no tokens or no columns");
        STD_TORCH_CHECK(batch <= kMost && tokens <= kMost && dim <= kMost / kKeyMeans &&
                            layers * batch <= kMost / std::max<int64_t>(kThreads, tokens / kWarps + 1),
                        "attbalance_ext: too many samples, tokens or columns for the CUDA kernels");
    }
};

RegionArguments region_arguments(const Tensor& region, const Ints& grids, int64_t rule, const Shape& shape,
                                 Place place) {
    check_region(region, grids, rule, shape.batch, shape.tokens, kFloat, place);
    STD_TORCH_CHECK(grids.size() <= 2 * kMaxGrids, "attbalance_ext: at most ", kMaxGrids, " grids");
    RegionArguments arguments = {};
    arguments.rule = static_cast<Rule>(rule);
    (grids.empty() ? arguments.weights : arguments.boxes) = data<const float>(region);
    for (size_t g = 0; g < grids.size() / 2; ++g) {
        arguments.grid[g] = {static_cast<int>(grids[2 * g]), static_cast<int>(grids[2 * g + 1])};
    }
    return arguments;
}

const bool* padding_argument(const OptionalTensor& padding, const Shape& shape, Place place) {
    if (!padding) return nullptr;
    check(*padding, "padding", ScalarType::Bool, {shape.batch, shape.tokens}, place);
    return data<const bool>(*padding);
}

Score as_score(double value) {
    const float hi = static_cast<float>(value);
    return {hi, static_cast<float>(value - hi)};
}

std::vector<KeysArguments> keys_arguments(const Tensors& query, const Tensors& key,
                                          const std::vector<double>& scale, const Shape& shape, Place place) {
    STD_TORCH_CHECK(query.size() == key.size() && scale.size() == key.size(),
                    "attbalance_ext: query, key and scale must have one entry per layer");
    std::vector<KeysArguments> layers;
    for (size_t l = 0; l < key.size(); ++l) {
        const Tensor& k = key[l];
        check_place(k, "key", place);
        STD_TORCH_CHECK(
            k.dim() == 3 && k.size(0) == shape.batch && k.size(1) == shape.tokens && k.size(2) == shape.dim,
            "attbalance_ext: all layers must have keys of the same shape (B, N, D)");
        STD_TORCH_CHECK(k.stride(2) == 1 || shape.dim <= 1,
                        "attbalance_ext: the last dimension of key must be contiguous");
        STD_TORCH_CHECK(!in_double(dtype_of(k)), "attbalance_ext: the CUDA kernels do not take float64");
        check(query[l], "query", kFloat, {shape.batch, shape.dim}, place);
        layers.push_back({data<const float>(query[l]), data<const void>(k), k.stride(0), k.stride(1),
                          as_score(scale[l]), dtype_of(k)});
    }
    return layers;
}

/// Whether 128-bit access can reach every row of D values that starts at `base` plus multiples of these
/// strides, and the stride of tokens is an int in units of 16 bytes.
bool is_wide(const void* base, int64_t batch_stride, int64_t token_stride, Dtype dtype, const Shape& shape) {
    const int64_t vector = 16 / element_bytes(dtype);
    return reinterpret_cast<uintptr_t>(base) % 16 == 0 && shape.dim % vector == 0 &&
           shape.dim <= kMaxWideDim && (shape.batch <= 1 || batch_stride % vector == 0) &&
           (shape.tokens <= 1 ||
            (token_stride % vector == 0 && token_stride / vector <= std::numeric_limits<int>::max()));
}

bool is_wide(const KeysArguments& keys, const Shape& shape) {
    return is_wide(keys.key, keys.batch_stride, keys.token_stride, keys.dtype, shape);
}

/// The kernel for a storage type and a width, out of a table made at compile time; null where there is none.
template <typename Table>
auto pick(const Table& table, Dtype dtype, int64_t dim) {
    return table[static_cast<size_t>(dtype)][static_cast<size_t>(std::max(lane_elements(dim), 8) / 8 - 1)];
}

template <typename K, bool kTeacher>
constexpr std::array<void (*)(ForwardArguments), 4> forward_widths() {
    if constexpr (kTeacher && sizeof(K) == sizeof(float)) {
        // The widest rows of float do not fit in the registers twice.
        return {forward_rows<K, 8, kTeacher>, forward_rows<K, 16, kTeacher>, forward_rows<K, 24, kTeacher>,
                nullptr};
    } else {
        return {forward_rows<K, 8, kTeacher>, forward_rows<K, 16, kTeacher>, forward_rows<K, 24, kTeacher>,
                forward_rows<K, 32, kTeacher>};
    }
}

template <bool kTeacher>
auto forward_kernel(Dtype dtype, int64_t dim) {
    static constexpr std::array kTable = {forward_widths<float, kTeacher>(),
                                          forward_widths<BFloat16, kTeacher>(),
                                          forward_widths<Float16, kTeacher>()};
    return pick(kTable, dtype, dim);
}

template <typename K>
constexpr std::array<void (*)(BackwardArguments), 4> backward_widths() {
    return {backward_rows<K, 8>, backward_rows<K, 16>, backward_rows<K, 24>, backward_rows<K, 32>};
}

auto backward_kernel(Dtype dtype, int64_t dim) {
    static constexpr std::array kTable = {backward_widths<float>(), backward_widths<BFloat16>(),
                                          backward_widths<Float16>()};
    return pick(kTable, dtype, dim);
}

dim3 blocks(int64_t count) {
    return {static_cast<unsigned>(count), 1, 1};
}

constexpr dim3 kBlock = {kThreads, 1, 1};

/// End of the run of layers from `first` on that one launch can take: at most kLaunchLayers, all alike.
template <typename Alike>
int64_t end_of_launch(int64_t first, int64_t layers, const Alike& alike) {
    int64_t last = first + 1;
    while (last < layers && last - first < kLaunchLayers && alike(first, last)) ++last;
    return last;
}

using ForwardOutputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

ForwardOutputs attention_terms(const Tensors& query, const Tensors& key, const std::vector<double>& scale,
                               const Tensor& region, const Ints& grids, int64_t rule,
                               const OptionalTensor& padding, const Tensors& teacher_query,
                               const Tensors& teacher_key, const std::vector<double>& teacher_scale,
                               bool need_key_means) {
    STD_TORCH_CHECK(!key.empty() && key[0].dim() == 3,
                    "attbalance_ext: attention_terms needs at least one layer with a key (B, N, D)");
    const CurrentDevice device(key[0]);
    const Place place = device.place();
    const Shape shape = {static_cast<int64_t>(key.size()), key[0].size(0), key[0].size(1), key[0].size(2)};
    shape.check_limits();
    const auto [layers, batch, tokens, dim] = shape;
    const bool with_teacher = !teacher_key.empty();
    STD_TORCH_CHECK(!with_teacher || teacher_key.size() == key.size(),
                    "attbalance_ext: the teacher must have the student's layers");
    const std::vector<KeysArguments> student = keys_arguments(query, key, scale, shape, place);
    const std::vector<KeysArguments> teacher =
        keys_arguments(teacher_query, teacher_key, teacher_scale, shape, place);

    const int64_t splits = forward_splits(layers * batch, tokens, device.multiprocessors());
    const auto floats = [&](std::initializer_list<int64_t> sizes) { return empty(sizes, kFloat, place); };
    const Tensor in_box = floats({layers, batch}), rac = floats({layers, batch}),
                 mrc = floats({layers, batch});
    const Tensor valid = empty({batch}, ScalarType::Bool, place);
    const Tensor log_p = floats({layers, batch, tokens});
    const Tensor log_t = with_teacher ? floats({layers, batch, tokens}) : floats({0});
    const Tensor stats = floats({layers, batch, kStats});
    const Tensor key_means = need_key_means ? floats({layers, batch, kKeyMeans, dim}) : floats({0});
    // The workspace, one tensor: a row's scores of student and teacher, its parts, their key sums.
    const bool shared_rows = splits > 1;
    const int64_t score_floats = layers * batch * tokens * 2;
    const int64_t partial_floats = shared_rows ? layers * batch * splits * int64_t{sizeof(Partial) / 4} : 0;
    const int64_t sum_floats = shared_rows && need_key_means ? layers * batch * splits * kKeyMeans * dim : 0;
    const Tensor workspace = floats({(with_teacher ? 2 : 1) * score_floats + partial_floats + sum_floats});
    float* const scores = data<float>(workspace);
    float* const teacher_scores = scores + score_floats;
    float* const partials = with_teacher ? teacher_scores + score_floats : teacher_scores;
    float* const key_sums = partials + partial_floats;

    ForwardArguments common = {};
    common.region = region_arguments(region, grids, rule, shape, place);
    common.padding = padding_argument(padding, shape, place);
    common.batch = static_cast<int>(batch);
    common.tokens = static_cast<int>(tokens);
    common.dim = static_cast<int>(dim);
    common.splits = static_cast<int>(splits);

    const auto wide_kernel = [&](Dtype dtype) {
        return with_teacher ? forward_kernel<true>(dtype, shape.dim)
                            : forward_kernel<false>(dtype, shape.dim);
    };
    const auto wide = [&](int64_t l) {
        return is_wide(student[l], shape) && wide_kernel(student[l].dtype) &&
               (!with_teacher || (teacher[l].dtype == student[l].dtype && is_wide(teacher[l], shape)));
    };
    const auto alike = [&](int64_t a, int64_t b) {
        return wide(a) == wide(b) && (!wide(a) || student[a].dtype == student[b].dtype);
    };
    for (int64_t first = 0; first < layers;) {
        const int64_t last = end_of_launch(first, layers, alike);
        const int64_t rows = (last - first) * batch, skipped = first * batch;
        ForwardArguments a = common;
        std::copy(student.begin() + first, student.begin() + last, a.student);
        if (with_teacher) std::copy(teacher.begin() + first, teacher.begin() + last, a.teacher);
        a.in_box = data<float>(in_box) + skipped;
        a.rac = data<float>(rac) + skipped;
        a.mrc = data<float>(mrc) + skipped;
        a.valid = first == 0 ? data<bool>(valid) : nullptr;
        a.log_p = data<float>(log_p) + skipped * tokens;
        a.log_t = with_teacher ? data<float>(log_t) + skipped * tokens : nullptr;
        a.stats = data<float>(stats) + skipped * kStats;
        a.key_means = need_key_means ? data<float>(key_means) + skipped * kKeyMeans * dim : nullptr;
        a.scores = reinterpret_cast<Score*>(scores) + skipped * tokens;
        a.teacher_scores =
            with_teacher ? reinterpret_cast<Score*>(teacher_scores) + skipped * tokens : nullptr;
        a.partials = shared_rows ? reinterpret_cast<Partial*>(partials) + skipped * splits : nullptr;
        a.key_sums = !need_key_means ? nullptr
                     : shared_rows   ? key_sums + skipped * splits * kKeyMeans * dim
                                     : a.key_means;
        const cudaStream_t stream = device.stream();
        if (wide(first)) {
            launch("forward_rows", wide_kernel(student[first].dtype), blocks(rows * splits), kBlock,
                   forward_rows_shared_bytes(dim), stream, a);
        } else {
            launch("forward_any", forward_any, blocks(rows * splits), kBlock, sizeof(AnyShared), stream, a);
        }
        if (shared_rows) {
            launch("finish_rows", finish_rows, blocks(rows), kBlock, sizeof(FinishShared), stream, a);
        }
        first = last;
    }
    return {in_box, rac, mrc, valid, log_p, log_t, stats, key_means};
}

using BackwardOutputs = std::tuple<Tensors, Tensors, Tensor>;

BackwardOutputs attention_terms_backward(const Tensor& grad_in_box, const Tensor& grad_rac,
                                         const Tensor& grad_mrc, const Tensors& query,
                                         const std::vector<double>& scale, const Tensor& region,
                                         const Ints& grids, int64_t rule, const OptionalTensor& padding,
                                         const Tensor& in_box, const Tensor& log_p, const Tensor& log_t,
                                         const Tensor& stats, const Tensor& key_means, const Ints& key_dtype,
                                         const Flags& sequence_first, const Flags& need_query,
                                         const Flags& need_key, bool need_dot) {
    STD_TORCH_CHECK(
        !query.empty() && query[0].dim() == 2 && log_p.dim() == 3,
        "attbalance_ext: attention_terms_backward needs at least one query (B, D) and scores (L, B, N)");
    const CurrentDevice device(log_p);
    const Place place = device.place();
    const Shape shape = {static_cast<int64_t>(query.size()), log_p.size(1), log_p.size(2), query[0].size(1)};
    shape.check_limits();
    const auto [layers, batch, tokens, dim] = shape;
    for (const size_t entries :
         {scale.size(), key_dtype.size(), sequence_first.size(), need_query.size(), need_key.size()}) {
        STD_TORCH_CHECK(entries == query.size(), "attbalance_ext: every list must have one entry per layer");
    }
    for (const Tensor& q : query) check(q, "query", kFloat, {batch, dim}, place);
    check(grad_in_box, "grad_in_box", kFloat, {layers, batch}, place);
    check(grad_rac, "grad_rac", kFloat, {layers, batch}, place);
    check(grad_mrc, "grad_mrc", kFloat, {layers, batch}, place);
    check(in_box, "in_box", kFloat, {layers, batch}, place);
    check(log_p, "scores", kFloat, {layers, batch, tokens}, place);
    check(stats, "stats", kFloat, {layers, batch, kStats}, place);
    const bool with_teacher = log_t.dim() == 3;
    if (with_teacher) check(log_t, "teacher_scores", kFloat, {layers, batch, tokens}, place);
    const auto any = [](const Flags& flags) {
        return std::find(flags.begin(), flags.end(), true) != flags.end();
    };
    const bool with_means = any(need_query);
    if (with_means) check(key_means, "key_means", kFloat, {layers, batch, kKeyMeans, dim}, place);

    Tensors grad_query, grad_key;
    std::vector<BackwardLayer> targets;
    for (int64_t l = 0; l < layers; ++l) {
        STD_TORCH_CHECK(
            key_dtype[l] >= 0 && key_dtype[l] < kDtypes && !in_double(static_cast<Dtype>(key_dtype[l])),
            "attbalance_ext: the CUDA kernels do not take keys of dtype code ", key_dtype[l]);
        BackwardLayer target = {
            data<const float>(query[l]),     nullptr, nullptr, 0, 0, static_cast<float>(scale[l]),
            static_cast<Dtype>(key_dtype[l])};
        if (need_query[l]) {
            grad_query.push_back(empty({batch, dim}, kFloat, place));
            target.grad_query = data<float>(grad_query.back());
        }
        if (need_key[l]) {
            target.batch_stride = sequence_first[l] ? dim : tokens * dim;
            target.token_stride = sequence_first[l] ? batch * dim : dim;
            grad_key.push_back(empty_strided({batch, tokens, dim},
                                             {target.batch_stride, target.token_stride, 1},
                                             scalar_type(target.dtype), place));
            target.grad_key = data<void>(grad_key.back());
        }
        targets.push_back(target);
    }
    const Tensor grad_dot =
        need_dot ? empty({layers, batch, tokens}, kFloat, place) : empty({0}, kFloat, place);

    BackwardArguments common = {};
    common.region = region_arguments(region, grids, rule, shape, place);
    common.padding = padding_argument(padding, shape, place);
    common.batch = static_cast<int>(batch);
    common.tokens = static_cast<int>(tokens);
    common.dim = static_cast<int>(dim);

    const auto wide = [&](int64_t l) {
        const BackwardLayer& t = targets[l];
        return is_wide(t.grad_key, t.batch_stride, t.token_stride, t.dtype, shape);
    };
    const auto alike = [&](int64_t a, int64_t b) {
        return wide(a) == wide(b) && (!wide(a) || targets[a].dtype == targets[b].dtype);
    };
    for (int64_t first = 0; first < layers;) {
        const int64_t last = end_of_launch(first, layers, alike);
        const int64_t rows = (last - first) * batch, skipped = first * batch;
        const bool keys =
            std::find(need_key.begin() + first, need_key.begin() + last, true) != need_key.begin() + last;
        BackwardArguments a = common;
        std::copy(targets.begin() + first, targets.begin() + last, a.layer);
        a.tile = static_cast<int>(backward_tile(rows, tokens, device.multiprocessors()));
        a.tiles = keys || need_dot ? static_cast<int>((tokens + a.tile - 1) / a.tile) : 1;
        a.grad_in_box = data<const float>(grad_in_box) + skipped;
        a.grad_rac = data<const float>(grad_rac) + skipped;
        a.grad_mrc = data<const float>(grad_mrc) + skipped;
        a.in_box = data<const float>(in_box) + skipped;
        a.log_p = data<const float>(log_p) + skipped * tokens;
        a.log_t = with_teacher ? data<const float>(log_t) + skipped * tokens : nullptr;
        a.stats = data<const float>(stats) + skipped * kStats;
        a.key_means = with_means ? data<const float>(key_means) + skipped * kKeyMeans * dim : nullptr;
        a.grad_dot = need_dot ? data<float>(grad_dot) + skipped * tokens : nullptr;
        const bool is_wide_launch = wide(first);
        const auto kernel = is_wide_launch ? backward_kernel(targets[first].dtype, dim) : backward_any;
        launch(is_wide_launch ? "backward_rows" : "backward_any", kernel, blocks(rows * a.tiles), kBlock,
               a.tile * sizeof(float), device.stream(), a);
        first = last;
    }
    return {grad_query, grad_key, grad_dot};
}

}  // namespace
}  // namespace attbalance

STABLE_TORCH_LIBRARY_IMPL(attbalance_ext, ATTBALANCE_DISPATCH_KEY, m) {
    m.impl("attention_terms.cuda", TORCH_BOX(&attbalance::attention_terms));
    m.impl("attention_terms_backward.cuda", TORCH_BOX(&attbalance::attention_terms_backward));
}
