// Errors that a sanitiser must find, each beside its right form: without them a quiet run proves nothing.
#include <cstdint>
#include <cstdlib>
#include <numeric>
#include <vector>

#include "parallel.h"

#define CONTROL extern "C" __attribute__((visibility("default")))

namespace attbalance {

bool forked() {
    return false;
}

}  // namespace attbalance

/// Threads of a loop add to one sum.
CONTROL int64_t racing_pieces(int64_t count) {
    int64_t sum = 0;
    attbalance::parallel_for(count, 1, [&](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; ++i) sum += i;
    });
    return sum;
}

/// Each to a place of its own, which is read after the loop.
CONTROL int64_t separate_pieces(int64_t count) {
    std::vector<int64_t> values(count);
    attbalance::parallel_for(count, 1, [&](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; ++i) values[i] = i;
    });
    return std::accumulate(values.begin(), values.end(), int64_t{0});
}

/// Calls at once add to one sum.
CONTROL void racing_calls(int64_t count) {
    static volatile int64_t sum = 0;
    for (int64_t i = 0; i < count; ++i) sum = sum + i;
}

/// Reads one of nine values.
CONTROL int read_value(int place) {
    const std::vector<int> values(9, 1);
    return values.data()[place];
}

CONTROL int next_number(int number) {
    return number + 1;
}

void* volatile last_block;

/// A hundred of them: what is left of an address in a register or on the stack hides one.
CONTROL void leak(int bytes) {
    for (int i = 0; i < 100; ++i) last_block = std::malloc(bytes);
    last_block = nullptr;
}
