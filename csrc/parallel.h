// Pieces of work at once, on PyTorch's threads: safe after fork(), computing as the calling thread does, and
// in an order that ThreadSanitizer knows.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <cstdint>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#define ATTBALANCE_UNSEEN __attribute__((no_sanitize("thread")))
#else
#define ATTBALANCE_UNSEEN
#endif

namespace attbalance {

/// Whether fork() made this process after it loaded the library. The threads of OpenMP stayed behind in the
/// parent then, and GNU's OpenMP waits for them for ever.
bool forked();

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

/// For as long as this lives, its thread computes with these settings; with its own again also after an
/// exception.
class WithFloatSettings {
  public:
    explicit WithFloatSettings(uint64_t settings) : own_(float_settings()) { set_float_settings(settings); }
    ~WithFloatSettings() { set_float_settings(own_); }
    WithFloatSettings(const WithFloatSettings&) = delete;
    WithFloatSettings& operator=(const WithFloatSettings&) = delete;

  private:
    uint64_t own_;
};

/// What orders a loop: the caller's writes, then the pieces, then what the caller does next; pieces have no
/// order among themselves. PyTorch and OpenMP are compiled without ThreadSanitizer, which has to be told.
class LoopOrder {
  public:
#if defined(__SANITIZE_THREAD__)
    LoopOrder() { __tsan_release(&begun_); }
    ~LoopOrder() { __tsan_acquire(&ended_); }
    void piece_begins() { __tsan_acquire(&begun_); }
    void piece_ends() { __tsan_release(&ended_); }

  private:
    char begun_ = 0, ended_ = 0;
#else
    void piece_begins() {}
    void piece_ends() {}
#endif
};

/// Calls `body(first, last)` for ranges that make up [0, count), of at least `grain` each, on several
/// threads. Those compute with the caller's settings: `torch.set_flush_denormal` reaches the calling thread
/// alone, and a result would depend on which thread made it.
template <typename F>
void parallel_for(int64_t count, int64_t grain, const F& body) {
    if (forked()) {
        if (count > 0) body(int64_t{0}, count);
        return;
    }
    const uint64_t settings = float_settings();
    LoopOrder order;
    // Unseen: what a piece is called with is read before it can say that it begins.
    const auto piece = [&](int64_t first, int64_t last) ATTBALANCE_UNSEEN {
        order.piece_begins();
        {
            const WithFloatSettings with(settings);
            body(first, last);
        }
        order.piece_ends();
    };
    torch::stable::parallel_for(0, count, grain, piece);
}

}  // namespace attbalance
