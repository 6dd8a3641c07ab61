// exp and its relatives on vectors. Compiled once for each instruction set (see simd.h).
#pragma once

#include "simd.h"

namespace attbalance::ATTBALANCE_ISA {

template <typename A>
struct ExpConstants;

template <>
struct ExpConstants<float> {
    using Int = int32_t;
    static constexpr float kLowest = -105.0f;  // exp rounds to 0 from here down
    static constexpr float kHighest = 89.0f;   // and to infinity from here up
    static constexpr float kLog2e = 1.44269504088896341f;
    static constexpr float kLn2High = 0.693359375f;  // few bits: n * kLn2High is exact
    static constexpr float kLn2Low = -2.12194440e-4f;
    static constexpr float kRound =
        0x1.8p23f;  // adding it rounds to an integer, kept in the low mantissa bits
    static constexpr int kMantissa = 23;
    static constexpr int kBias = 127;
    static constexpr int kExpDegree = 7;        // of the Taylor polynomial on |r| <= ln(2) / 2
    static constexpr int kRemainderDegree = 9;  // of (e^x - 1 - x) / x^2 on |x| <= 1
};

template <>
struct ExpConstants<double> {
    using Int = int64_t;
    static constexpr double kLowest = -746.0;
    static constexpr double kHighest = 710.0;
    static constexpr double kLog2e = 1.44269504088896340736;
    static constexpr double kLn2High = 0x1.62e42fee00000p-1;
    static constexpr double kLn2Low = 0x1.a39ef35793c76p-33;
    static constexpr double kRound = 0x1.8p52;
    static constexpr int kMantissa = 52;
    static constexpr int kBias = 1023;
    static constexpr int kExpDegree = 13;
    static constexpr int kRemainderDegree = 17;
};

/// 1 / n!
constexpr double inverse_factorial(int n) {
    double result = 1;
    for (int i = 2; i <= n; ++i) result /= i;
    return result;
}

/// sum over k = 0..kDegree of x^k / (k + kShift)!
template <typename A, int kLanes, int kShift, int kDegree, int k = 0>
inline Lanes<A, kLanes> exp_series(Lanes<A, kLanes> x) {
    constexpr A kCoefficient = static_cast<A>(inverse_factorial(k + kShift));
    if constexpr (k == kDegree) {
        return Lanes<A, kLanes>{} + kCoefficient;
    } else {
        return exp_series<A, kLanes, kShift, kDegree, k + 1>(x) * x + kCoefficient;
    }
}

/// e^x to about 1 ulp, subnormal results included. exp(-inf) = 0, exp(NaN) = NaN.
template <typename A, int kLanes = kWidth<A>>
inline Lanes<A, kLanes> exp(Lanes<A, kLanes> x) {
    using Values = Lanes<A, kLanes>;
    using C = ExpConstants<A>;
    using Int = typename C::Int;
    using Ints = Lanes<Int, kLanes>;
    x = x < C::kLowest ? Values{} + C::kLowest : x;
    x = x > C::kHighest ? Values{} + C::kHighest : x;
    const Values shifted = x * C::kLog2e + C::kRound;
    const Values n = shifted - C::kRound;
    const Ints exponent = bit_cast<Ints>(shifted) - bit_cast<Int>(C::kRound);
    const Values r = (x - n * C::kLn2High) - n * C::kLn2Low;
    const Values mantissa = exp_series<A, kLanes, 0, C::kExpDegree>(r);
    // Two factors, because 2^n alone would overflow or lose bits at either end of the range.
    const Ints first = exponent >> 1;
    const Ints second = exponent - first;
    const Values scale_first = bit_cast<Values>((first + C::kBias) << C::kMantissa);
    const Values scale_second = bit_cast<Values>((second + C::kBias) << C::kMantissa);
    return mantissa * scale_first * scale_second;
}

/// (e^x - 1 - x) / x^2 for |x| <= 1, without cancellation.
template <typename A>
inline Vec<A> exp_remainder(Vec<A> x) {
    return exp_series<A, kWidth<A>, 2, ExpConstants<A>::kRemainderDegree>(x);
}

}  // namespace attbalance::ATTBALANCE_ISA
