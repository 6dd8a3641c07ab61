// bfloat16 as 16 bits of storage with conversions, as in the toolkit.
#pragma once

#include <cuda_runtime.h>

struct __nv_bfloat16 {
    unsigned short storage;
};

inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short bits) {
    return {bits};
}
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 value) {
    return value.storage;
}
inline float __bfloat162float(__nv_bfloat16 value) {
    return __uint_as_float(static_cast<unsigned>(value.storage) << 16);
}

/// To the nearest, ties to even; every NaN becomes the one that the hardware makes.
inline __nv_bfloat16 __float2bfloat16_rn(float value) {
    const unsigned bits = __float_as_uint(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return {0x7fff};
    return {static_cast<unsigned short>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}
