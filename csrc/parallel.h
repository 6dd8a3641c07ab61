// A parallel loop whose threads compute as the calling one does.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <cstdint>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace attbalance {

/// How this thread rounds, and whether it flushes subnormal numbers to 0.
inline uint64_t float_settings() {
#if defined(__x86_64__)
    return _mm_getcsr();
#elif defined(__aarch64__)
    uint64_t settings;
    __asm__ volatile("mrs %0, fpcr" : "=r"(settings));
    return settings;
#else
    return 0;
#endif
}

inline void set_float_settings([[maybe_unused]] uint64_t settings) {
#if defined(__x86_64__)
    _mm_setcsr(static_cast<unsigned>(settings));
#elif defined(__aarch64__)
    __asm__ volatile("msr fpcr, %0" : : "r"(settings));
#endif
}

/// body(first, last) over parts of [begin, end), of `grain` at least. Such settings belong to a thread, and
/// `torch.set_flush_denormal` reaches the calling one alone: without this a result would depend on which
/// thread made it.
template <typename Body>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const Body& body) {
    const uint64_t settings = float_settings();
    torch::stable::parallel_for(begin, end, grain, [&](int64_t first, int64_t last) {
        const uint64_t own = float_settings();
        set_float_settings(settings);
        body(first, last);
        set_float_settings(own);
    });
}

}  // namespace attbalance
