// Rows of stored values (float, bfloat16, half) in registers: 128-bit memory access, arithmetic in float. No
// torch header.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "../dtype.h"
#include "warp.h"

namespace attbalance {

template <typename K>
__device__ __forceinline__ float widen(unsigned bits);

template <>
__device__ __forceinline__ float widen<float>(unsigned bits) {
    return __uint_as_float(bits);
}

template <>
__device__ __forceinline__ float widen<BFloat16>(unsigned bits) {
    return __uint_as_float(bits << 16);
}

template <>
__device__ __forceinline__ float widen<Float16>(unsigned bits) {
    return __half2float(__ushort_as_half(static_cast<unsigned short>(bits)));
}

/// The bits of `value` rounded to nearest, ties to even.
template <typename K>
__device__ __forceinline__ unsigned narrow(float value);

template <>
__device__ __forceinline__ unsigned narrow<float>(float value) {
    return __float_as_uint(value);
}

template <>
__device__ __forceinline__ unsigned narrow<BFloat16>(float value) {
    return __bfloat16_as_ushort(__float2bfloat16_rn(value));
}

template <>
__device__ __forceinline__ unsigned narrow<Float16>(float value) {
    return __half_as_ushort(__float2half_rn(value));
}

/// Stored values in 16 bytes.
template <typename K>
constexpr int kVector = 16 / static_cast<int>(sizeof(K));

/// The columns of a row that one lane holds: chunk c has kVector<K> of them from column(c, lane) on, so that
/// a warp's loads of a chunk are consecutive. The last chunks may lie beyond a row of `dim` values.
template <typename K, int kElements>
struct LaneColumns {
    static constexpr int kChunks = kElements / kVector<K>;

    static __device__ __forceinline__ int column(int chunk, int lane) {
        return (chunk * kWarpSize + lane) * kVector<K>;
    }
};

/// One lane's part of a stored row, as it is in memory. `dim` and the row's address are multiples of 16
/// bytes.
template <typename K, int kElements>
struct PackedRow {
    using Columns = LaneColumns<K, kElements>;
    uint4 chunk[Columns::kChunks];

    /// Beyond `dim` the row's first columns stand in, so that no load needs a condition.
    __device__ __forceinline__ void load(const uint4* row, int dim, int lane) {
#pragma unroll
        for (int c = 0; c < Columns::kChunks; ++c) {
            const int place = Columns::column(c, lane) < dim ? c * kWarpSize + lane : 0;
            chunk[c] = __ldg(row + place);
        }
    }

    __device__ __forceinline__ void store(uint4* row, int dim, int lane) const {
#pragma unroll
        for (int c = 0; c < Columns::kChunks; ++c) {
            if (Columns::column(c, lane) < dim) row[c * kWarpSize + lane] = chunk[c];
        }
    }

    __device__ __forceinline__ void unpack(float (&values)[kElements]) const {
        constexpr int kPerWord = kVector<K> / 4;
#pragma unroll
        for (int c = 0; c < Columns::kChunks; ++c) {
            const unsigned word[4] = {chunk[c].x, chunk[c].y, chunk[c].z, chunk[c].w};
#pragma unroll
            for (int w = 0; w < 4; ++w) {
                float* const out = values + c * kVector<K> + w * kPerWord;
                if constexpr (kPerWord == 1) {
                    out[0] = widen<K>(word[w]);
                } else {
                    out[0] = widen<K>(word[w] & 0xffffu);
                    out[1] = widen<K>(word[w] >> 16);
                }
            }
        }
    }

    __device__ __forceinline__ void pack(const float (&values)[kElements]) {
        constexpr int kPerWord = kVector<K> / 4;
#pragma unroll
        for (int c = 0; c < Columns::kChunks; ++c) {
            unsigned word[4];
#pragma unroll
            for (int w = 0; w < 4; ++w) {
                const float* const in = values + c * kVector<K> + w * kPerWord;
                if constexpr (kPerWord == 1) {
                    word[w] = narrow<K>(in[0]);
                } else {
                    word[w] = narrow<K>(in[0]) | narrow<K>(in[1]) << 16;
                }
            }
            chunk[c] = make_uint4(word[0], word[1], word[2], word[3]);
        }
    }
};

/// One lane's part of a row of floats, any alignment; 0 from `dim` on.
template <typename K, int kElements>
__device__ __forceinline__ void load_floats(const float* row, int dim, int lane, float (&values)[kElements]) {
#pragma unroll
    for (int c = 0; c < LaneColumns<K, kElements>::kChunks; ++c) {
        const int d = LaneColumns<K, kElements>::column(c, lane);
#pragma unroll
        for (int v = 0; v < kVector<K>; ++v) values[c * kVector<K> + v] = d < dim ? row[d + v] : 0.0f;
    }
}

/// Value `i` of stored values whose type is known at run time only.
__device__ __forceinline__ float load_value(const void* values, Dtype dtype, int64_t i) {
    if (dtype == Dtype::kFloat32) return static_cast<const float*>(values)[i];
    const unsigned bits = static_cast<const uint16_t*>(values)[i];
    return dtype == Dtype::kBFloat16 ? widen<BFloat16>(bits) : widen<Float16>(bits);
}

__device__ __forceinline__ void store_value(void* values, Dtype dtype, int64_t i, float value) {
    if (dtype == Dtype::kFloat32) {
        static_cast<float*>(values)[i] = value;
    } else {
        const unsigned bits = dtype == Dtype::kBFloat16 ? narrow<BFloat16>(value) : narrow<Float16>(value);
        static_cast<uint16_t*>(values)[i] = static_cast<uint16_t>(bits);
    }
}

}  // namespace attbalance
