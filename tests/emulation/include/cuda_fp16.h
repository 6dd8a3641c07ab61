// float16 as 16 bits of storage with conversions, as in the toolkit.
#pragma once

#include <cuda_runtime.h>

struct __half {
    unsigned short storage;
};

inline __half __ushort_as_half(unsigned short bits) {
    return {bits};
}
inline unsigned short __half_as_ushort(__half value) {
    return value.storage;
}

inline float __half2float(__half value) {
    const unsigned sign = (value.storage & 0x8000u) << 16;
    const unsigned exponent = (value.storage >> 10) & 0x1fu, fraction = value.storage & 0x3ffu;
    if (exponent == 0) return copysignf(ldexpf(static_cast<float>(fraction), -24), __uint_as_float(sign));
    const unsigned wide = exponent == 0x1fu ? 0xffu : exponent + 112;
    return __uint_as_float(sign | wide << 23 | fraction << 13);
}

/// To the nearest, ties to even; every NaN becomes the one that the hardware makes.
inline __half __float2half_rn(float value) {
    const unsigned bits = __float_as_uint(value), size = bits & 0x7fffffffu;
    const unsigned sign = (bits >> 16) & 0x8000u;
    unsigned half;
    if (size > 0x7f800000u) {
        return {0x7fff};
    } else if (size >= 0x47800000u) {  // 2^16
        half = 0x7c00u;
    } else if (size >= 0x38800000u) {  // 2^-14, the smallest normal float16; rounding up may reach infinity
        half = (size - 0x38000000u + 0xfffu + ((size >> 13) & 1u)) >> 13;
    } else {
        half = static_cast<unsigned>(nearbyintf(ldexpf(__uint_as_float(size), 24)));
    }
    return {static_cast<unsigned short>(sign | half)};
}
