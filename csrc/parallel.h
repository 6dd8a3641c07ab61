// Pieces of work at once, on PyTorch's threads: safe after fork(), and in an order that ThreadSanitizer
// knows.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <cstdint>

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
/// threads.
template <typename F>
void parallel_for(int64_t count, int64_t grain, const F& body) {
    if (forked()) {
        if (count > 0) body(int64_t{0}, count);
        return;
    }
    LoopOrder order;
    // Unseen: what a piece is called with is read before it can say that it begins.
    const auto piece = [&](int64_t first, int64_t last) ATTBALANCE_UNSEEN {
        order.piece_begins();
        body(first, last);
        order.piece_ends();
    };
    torch::stable::parallel_for(0, count, grain, piece);
}

}  // namespace attbalance
