#include "shared_memory.h"

#include <cstring>
#include <stdexcept>
#include <string>

#include "emulator.h"

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

namespace {

constexpr size_t kGuard = 4096;

}  // namespace

namespace attbalance {

/// What kernels declare as `extern __shared__`.
alignas(1024) unsigned char shared_memory[emulation::kSharedAtMost + kGuard];

}  // namespace attbalance

namespace emulation {
namespace {

using attbalance::shared_memory;

#ifndef __SANITIZE_ADDRESS__
/// What the guarded part repeats: NaN to who reads it as float or bfloat16, and written by no kernel by
/// chance.
constexpr unsigned char kPattern[4] = {0xa5, 0xa5, 0xa5, 0x7f};
#endif

}  // namespace

void fill_shared_memory(size_t bytes, uint8_t fill) {
    std::memset(shared_memory, fill, bytes);
}

#ifdef __SANITIZE_ADDRESS__

void guard_shared_memory(size_t bytes) {
    ASAN_UNPOISON_MEMORY_REGION(shared_memory, sizeof(shared_memory));
    ASAN_POISON_MEMORY_REGION(shared_memory + bytes, sizeof(shared_memory) - bytes);
}

void check_shared_memory(size_t) {}

#else

void guard_shared_memory(size_t bytes) {
    for (size_t i = bytes; i < sizeof(shared_memory); ++i) shared_memory[i] = kPattern[(i - bytes) % 4];
}

void check_shared_memory(size_t bytes) {
    const unsigned char* const guard = shared_memory + bytes;
    const size_t size = sizeof(shared_memory) - bytes;
    // The first period, then each byte against the one a period before it.
    if (std::memcmp(guard, kPattern, 4) == 0 && std::memcmp(guard, guard + 4, size - 4) == 0) return;
    size_t i = 0;
    while (guard[i] == kPattern[i % 4]) ++i;
    throw std::runtime_error("wrote at byte " + std::to_string(bytes + i) +
                             " of shared memory, of which it has " + std::to_string(bytes));
}

#endif

}  // namespace emulation
