// Vectors of the widest registers this translation unit may use, on the compiler's vector extensions.
//
// A file that includes this header is compiled once for each instruction set, with ATTBALANCE_ISA naming the
// namespace its code lives in. Everything here is inside that namespace and nothing comes from the standard
// library: a shared inline function would be emitted by several of those files, and the linker would keep one
// of them, possibly one that the processor at hand cannot run.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "dtype.h"

namespace attbalance::ATTBALANCE_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <typename T, int kLanes>
struct LanesOf {
    typedef T type __attribute__((vector_size(sizeof(T) * kLanes)));
};

/// `kLanes` values of `T` as one value.
template <typename T, int kLanes>
using Lanes = typename LanesOf<T, kLanes>::type;

/// Number of values of `A` in a register.
template <typename A>
constexpr int kWidth = kVectorBytes / static_cast<int>(sizeof(A));

template <typename A>
using Vec = Lanes<A, kWidth<A>>;

template <typename To, typename From>
inline To bit_cast(const From& from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof(to));
    return to;
}

template <typename A>
inline Vec<A> splat(A value) {
    return Vec<A>{} + value;
}

// Widening and narrowing between a storage type and float lanes.

// Where the compiler is known to split a conversion of whole registers in two, the instruction is named. (In
// the maskz forms: GCC warns about the undefined source of the plain ones.)

template <int kLanes>
inline Lanes<uint32_t, kLanes> widened(Lanes<uint16_t, kLanes> v) {
#if defined(__AVX512F__)
    if constexpr (kLanes == 16) {
        return bit_cast<Lanes<uint32_t, 16>>(_mm512_maskz_cvtepu16_epi32(0xffff, bit_cast<__m256i>(v)));
    }
#endif
#if defined(__AVX2__)
    if constexpr (kLanes == 8)
        return bit_cast<Lanes<uint32_t, 8>>(_mm256_cvtepu16_epi32(bit_cast<__m128i>(v)));
#endif
    return __builtin_convertvector(v, Lanes<uint32_t, kLanes>);
}

/// The low halves.
template <int kLanes>
inline Lanes<uint16_t, kLanes> halved(Lanes<uint32_t, kLanes> v) {
#if defined(__AVX512F__)
    if constexpr (kLanes == 16) {
        return bit_cast<Lanes<uint16_t, 16>>(_mm512_maskz_cvtepi32_epi16(0xffff, bit_cast<__m512i>(v)));
    }
#endif
    return __builtin_convertvector(v, Lanes<uint16_t, kLanes>);
}

template <int kLanes>
inline Lanes<float, kLanes> bf16_to_float(Lanes<uint16_t, kLanes> v) {
    return bit_cast<Lanes<float, kLanes>>(widened<kLanes>(v) << 16);
}

/// Round to nearest even; NaN stays NaN.
template <int kLanes>
inline Lanes<uint16_t, kLanes> float_to_bf16(Lanes<float, kLanes> v) {
    using Bits = Lanes<uint32_t, kLanes>;
    const Bits bits = bit_cast<Bits>(v);
    const Bits rounded = (bits + (0x7fffu + ((bits >> 16) & 1u))) >> 16;
    const Bits quiet_nan = Bits{} + 0x7fc0u;
    return halved<kLanes>(v == v ? rounded : quiet_nan);
}

template <int kLanes>
inline Lanes<float, kLanes> fp16_to_float(Lanes<uint16_t, kLanes> v) {
#if defined(__AVX512F__)
    if constexpr (kLanes == 16)
        return bit_cast<Lanes<float, 16>>(_mm512_maskz_cvtph_ps(0xffff, bit_cast<__m256i>(v)));
#endif
#if defined(__F16C__)
    if constexpr (kLanes == 8) return bit_cast<Lanes<float, 8>>(_mm256_cvtph_ps(bit_cast<__m128i>(v)));
#endif
    // Shift the exponent and mantissa in place and rebias by a multiplication, which also normalises
    // subnormals.
    using Bits = Lanes<uint32_t, kLanes>;
    const Bits half = widened<kLanes>(v);
    const Bits magnitude = (half & 0x7fffu) << 13;
    const Lanes<float, kLanes> rebiased = bit_cast<Lanes<float, kLanes>>(magnitude) * 0x1p112f;
    const Bits special = magnitude | 0x7f800000u;
    const Bits finite = bit_cast<Bits>(rebiased);
    return bit_cast<Lanes<float, kLanes>>((magnitude >= 0x0f800000u ? special : finite) |
                                          ((half & 0x8000u) << 16));
}

/// Round to nearest even; overflow gives infinity; NaN stays NaN.
template <int kLanes>
inline Lanes<uint16_t, kLanes> float_to_fp16(Lanes<float, kLanes> v) {
#if defined(__AVX512F__)
    if constexpr (kLanes == 16) {
        return bit_cast<Lanes<uint16_t, 16>>(
            _mm512_maskz_cvtps_ph(0xffff, bit_cast<__m512>(v), _MM_FROUND_TO_NEAREST_INT));
    }
#endif
#if defined(__F16C__)
    if constexpr (kLanes == 8) {
        return bit_cast<Lanes<uint16_t, 8>>(_mm256_cvtps_ph(bit_cast<__m256>(v), _MM_FROUND_TO_NEAREST_INT));
    }
#endif
    using Bits = Lanes<uint32_t, kLanes>;
    using Floats = Lanes<float, kLanes>;
    const Bits bits = bit_cast<Bits>(v);
    const Bits sign = (bits >> 16) & 0x8000u;
    const Bits magnitude = bits & 0x7fffffffu;
    // Normal results: rebias the exponent (the constant is (15 - 127) << 23) and round the 13 dropped bits.
    const Bits normal = (magnitude + 0xc8000fffu + ((magnitude >> 13) & 1u)) >> 13;
    // Subnormal results: adding 0.5 leaves the mantissa, already rounded, in the low bits of the sum.
    const Bits subnormal = bit_cast<Bits>(bit_cast<Floats>(magnitude) + 0.5f) - 0x3f000000u;
    Bits result = magnitude < 0x38800000u ? subnormal : normal;
    result = magnitude >= 0x477ff000u ? Bits{} + 0x7c00u : result;
    result = magnitude > 0x7f800000u ? Bits{} + 0x7e00u : result;
    return halved<kLanes>(result | sign);
}

// Loads and stores, between a storage type `K` and vectors of the arithmetic type `A`.

/// A vector widened from `K`, which is `A` itself, or 16 bits for `A` = float.
template <typename A, typename K>
inline Vec<A> load(const K* p) {
    if constexpr (sizeof(K) == 2) {
        static_assert(sizeof(A) == sizeof(float));
        Lanes<uint16_t, kWidth<A>> raw;
        std::memcpy(&raw, p, sizeof(raw));
        if constexpr (K::kIsBFloat16) {
            return bf16_to_float<kWidth<A>>(raw);
        } else {
            return fp16_to_float<kWidth<A>>(raw);
        }
    } else {
        static_assert(sizeof(A) == sizeof(K));
        Vec<A> v;
        std::memcpy(&v, p, sizeof(v));
        return v;
    }
}

/// A vector as it is stored: rounded to `K`, which is `A` itself, or 16 bits for `A` = float.
template <typename K, typename A>
inline auto narrowed(Vec<A> v) {
    if constexpr (sizeof(K) == 2) {
        static_assert(sizeof(A) == sizeof(float));
        if constexpr (K::kIsBFloat16) {
            return float_to_bf16<kWidth<A>>(v);
        } else {
            return float_to_fp16<kWidth<A>>(v);
        }
    } else {
        static_assert(sizeof(A) == sizeof(K));
        return v;
    }
}

template <typename K, typename A>
inline void store(K* p, Vec<A> v) {
    const auto raw = narrowed<K, A>(v);
    std::memcpy(p, &raw, sizeof(raw));
}

/// As `store`, past the caches where the processor can. `p` is aligned to what is stored; `end_of_stream`
/// must follow.
template <typename K, typename A>
inline void stream(K* p, Vec<A> v) {
    const auto raw = narrowed<K, A>(v);
#if defined(__AVX512F__)
    if constexpr (sizeof(raw) == 64)
        return _mm512_stream_si512(reinterpret_cast<__m512i*>(p), bit_cast<__m512i>(raw));
#endif
#if defined(__AVX__)
    if constexpr (sizeof(raw) == 32)
        return _mm256_stream_si256(reinterpret_cast<__m256i*>(p), bit_cast<__m256i>(raw));
#endif
#if defined(__SSE2__)
    if constexpr (sizeof(raw) == 16)
        return _mm_stream_si128(reinterpret_cast<__m128i*>(p), bit_cast<__m128i>(raw));
#endif
    std::memcpy(p, &raw, sizeof(raw));
}

/// Make streamed stores visible in order with what follows.
inline void end_of_stream() {
#if defined(__SSE2__)
    _mm_sfence();
#endif
}

/// The first `count` < kWidth values, 0 in the other lanes. Nothing beyond them is touched.
template <typename A, typename K>
inline Vec<A> load_first(const K* p, int64_t count) {
    K buffer[kWidth<A>] = {};
    for (int64_t i = 0; i < count; ++i) buffer[i] = p[i];
    return load<A>(buffer);
}

template <typename K, typename A>
inline void store_first(K* p, Vec<A> v, int64_t count) {
    K buffer[kWidth<A>];
    store<K, A>(buffer, v);
    for (int64_t i = 0; i < count; ++i) p[i] = buffer[i];
}

// Reductions.

/// Sums of every fourth lane.
template <typename A, int kLanes>
inline Lanes<A, 4> four_sums(Lanes<A, kLanes> v) {
    if constexpr (kLanes <= 4) {
        Lanes<A, 4> four = {};
        for (int i = 0; i < kLanes; ++i) four[i] = v[i];
        return four;
    } else {
        Lanes<A, kLanes / 2> half[2];
        std::memcpy(half, &v, sizeof(v));
        return four_sums<A, kLanes / 2>(half[0] + half[1]);
    }
}

/// The sum of all lanes; its last additions, of the largest numbers, in double.
template <typename A>
inline double sum_in_double(Vec<A> v) {
    const Lanes<A, 4> four = four_sums<A, kWidth<A>>(v);
    double total = 0;
    for (int i = 0; i < 4; ++i) total += static_cast<double>(four[i]);
    return total;
}

/// `sum_in_double` of four vectors at once, with the same bits.
template <typename A>
inline Lanes<double, 4> sums_in_double(const Vec<A> (&v)[4]) {
    Lanes<A, 4> row[4];
    for (int i = 0; i < 4; ++i) row[i] = four_sums<A, kWidth<A>>(v[i]);
    const Lanes<A, 4> low01 = __builtin_shufflevector(row[0], row[1], 0, 4, 1, 5);
    const Lanes<A, 4> low23 = __builtin_shufflevector(row[2], row[3], 0, 4, 1, 5);
    const Lanes<A, 4> high01 = __builtin_shufflevector(row[0], row[1], 2, 6, 3, 7);
    const Lanes<A, 4> high23 = __builtin_shufflevector(row[2], row[3], 2, 6, 3, 7);
    // lane i of each row
    const Lanes<A, 4> lane[4] = {__builtin_shufflevector(low01, low23, 0, 1, 4, 5),
                                 __builtin_shufflevector(low01, low23, 2, 3, 6, 7),
                                 __builtin_shufflevector(high01, high23, 0, 1, 4, 5),
                                 __builtin_shufflevector(high01, high23, 2, 3, 6, 7)};
    Lanes<double, 4> total = {};
    for (int i = 0; i < 4; ++i) total += __builtin_convertvector(lane[i], Lanes<double, 4>);
    return total;
}

template <typename A>
inline A max(Vec<A> v) {
    A result = v[0];
    for (int i = 1; i < kWidth<A>; ++i) result = v[i] > result ? v[i] : result;
    return result;
}

}  // namespace attbalance::ATTBALANCE_ISA
