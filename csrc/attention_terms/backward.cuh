// Backward: dK, or the factors it is made of, from the scores; dq from the key means. Reads no key.
#pragma once

#include <cuda_runtime.h>
#include <math.h>

#include <cstdint>

#include "row_math.cuh"

namespace attbalance {

/// What the gradients of a row have in common.
struct RowGradient {
    float region;  // 2 g_rac - g_in A_in: what RAC and A_in together put on p - pin; 0 where the region is
                   // empty
    float mrc;
    float in_box;
    float out_of_box;
    float log_in_box;
};

__device__ __forceinline__ RowGradient row_gradient(const BackwardArguments& a, int row) {
    const float* const stats = a.stats + static_cast<int64_t>(row) * kStats;
    RowGradient g = {0, a.grad_mrc[row], a.in_box[row], stats[kOutOfBox], stats[kLogInBox]};
    if (g.log_in_box != -INFINITY) g.region = 2 * a.grad_rac[row] - a.grad_in_box[row] * g.in_box;
    return g;
}

/// dL/ds_j of a token that is not padding.
__device__ __forceinline__ float score_gradient(const BackwardArguments& a, const RowGradient& g, int row,
                                                int token) {
    const int64_t place = static_cast<int64_t>(row) * a.tokens + token;
    const float m = clamped(region_weight(a.region, row % a.batch, token, a.tokens));
    const float log_p = a.log_p[place];
    const float p = expf(log_p);
    // Outside the region the exponent may be large, and 0 * inf must not arise; nor must m * inf, where m is
    // subnormal: the root of the exponential does not overflow.
    const float root = m > 0 ? expf((log_p - g.log_in_box) * 0.5f) : 0.0f;
    const float pin = m * root * root;
    // p - pin = p (1 - m) - A_out pin keeps its digits where A_in tends to 1.
    float gradient = g.region * (p * (1 - m) - g.out_of_box * pin);
    if (a.log_t) {
        const float log_t = a.log_t[place];
        const float x = log_p - log_t, t = expf(log_t);
        const bool near = x > -1 && x < 1;
        gradient += g.mrc * (near ? t * fmaf(x * x, exp_remainder(x), x) : p - t);
    }
    return gradient;
}

/// dL/dq of a row, from its key means. All threads of the block.
__device__ __forceinline__ void write_query_gradient(const BackwardArguments& a, const RowGradient& g,
                                                     int row, const BackwardLayer& layer) {
    const float* const means = a.key_means + static_cast<int64_t>(row) * kKeyMeans * a.dim;
    float* const out = layer.grad_query + static_cast<int64_t>(row % a.batch) * a.dim;
    for (int d = threadIdx.x; d < a.dim; d += kThreads) {
        const float in = means[kMeanIn * a.dim + d], outside = means[kMeanOut * a.dim + d];
        float gradient = g.region * (outside - g.out_of_box * in);
        if (a.log_t) gradient += g.mrc * ((outside + g.in_box * in) - means[kMeanTeacher * a.dim + d]);
        out[d] = layer.scale * gradient;
    }
}

/// One block's part of the backward pass: a tile of tokens of one row.
struct BackwardTile {
    int row;
    int first;  // token
    int count;  // of tokens; 0 where nothing of theirs is asked for
    int64_t b;
    const BackwardLayer& layer;

    __device__ __forceinline__ explicit BackwardTile(const BackwardArguments& a)
        : row(static_cast<int>(blockIdx.x) / a.tiles),
          first(static_cast<int>(blockIdx.x) % a.tiles * a.tile),
          count(0),
          b(row % a.batch),
          layer(a.layer[row / a.batch]) {
        if (layer.grad_key || a.grad_dot) count = min(a.tile, a.tokens - first);
    }
};

/// dL/d(q . k_j) = scale * dL/ds_j of the tile's tokens, in shared memory and where it is asked for. Ends
/// with a barrier.
__device__ __forceinline__ void make_coefficients(const BackwardArguments& a, const BackwardTile& tile,
                                                  const RowGradient& g, float* coefficients) {
    const int own = static_cast<int>(threadIdx.x);
    if (own < tile.count) {
        const bool padded = a.padding && a.padding[tile.b * a.tokens + tile.first + own];
        const float coefficient =
            padded ? 0.0f : tile.layer.scale * score_gradient(a, g, tile.row, tile.first + own);
        coefficients[own] = coefficient;
        if (a.grad_dot) {
            a.grad_dot[static_cast<int64_t>(tile.row) * a.tokens + tile.first + own] = coefficient;
        }
    }
    __syncthreads();
}

/// 0 at padding, whatever the query.
__device__ __forceinline__ float scaled(float coefficient, float query) {
    return coefficient != 0 ? coefficient * query : 0.0f;
}

/// dK and dq of one tile of tokens of one row.
template <typename K, int kElements>
__global__ void __launch_bounds__(kThreads) backward_rows(const __grid_constant__ BackwardArguments a) {
    extern __shared__ __align__(16) unsigned char shared_memory[];
    float* const coefficients = reinterpret_cast<float*>(shared_memory);  // (a.tile,)
    const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
    const BackwardTile tile(a);
    const BackwardLayer& layer = tile.layer;
    const RowGradient g = row_gradient(a, tile.row);
    float query[kElements];
    load_floats<K>(layer.query + tile.b * a.dim, a.dim, lane, query);
    make_coefficients(a, tile, g, coefficients);
    uint4* const out = static_cast<uint4*>(layer.grad_key) + tile.b * (layer.batch_stride / kVector<K>);
    const int64_t stride = layer.token_stride / kVector<K>;
    const int rows = layer.grad_key ? tile.count : 0;
    for (int i = warp; i < rows; i += kWarps) {
        float values[kElements];
#pragma unroll
        for (int e = 0; e < kElements; ++e) values[e] = scaled(coefficients[i], query[e]);
        PackedRow<K, kElements> packed;
        packed.pack(values);
        packed.store(out + (tile.first + i) * stride, a.dim, lane);
    }
    if (layer.grad_query && tile.first == 0) write_query_gradient(a, g, tile.row, layer);
}

/// `backward_rows` for any D and alignment, each layer with its own dtype: single values are stored.
__global__ void __launch_bounds__(kThreads) backward_any(const __grid_constant__ BackwardArguments a) {
    extern __shared__ __align__(16) unsigned char shared_memory[];
    float* const coefficients = reinterpret_cast<float*>(shared_memory);  // (a.tile,)
    const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
    const BackwardTile tile(a);
    const BackwardLayer& layer = tile.layer;
    const RowGradient g = row_gradient(a, tile.row);
    make_coefficients(a, tile, g, coefficients);
    const float* const query = layer.query + tile.b * a.dim;
    const int rows = layer.grad_key ? tile.count : 0;
    for (int i = warp; i < rows; i += kWarps) {
        const int64_t place = tile.b * layer.batch_stride + (tile.first + i) * layer.token_stride;
        for (int d = lane; d < a.dim; d += kWarpSize) {
            store_value(layer.grad_key, layer.dtype, place + d, scaled(coefficients[i], query[d]));
        }
    }
    if (layer.grad_query && tile.first == 0) write_query_gradient(a, g, tile.row, layer);
}

}  // namespace attbalance
