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

/// Float and bfloat16 read it as NaN, and no kernel writes it by chance.
constexpr unsigned char kPattern[4] = {0xa5, 0xa5, 0xa5, 0x7f};

}  // namespace

#ifdef __SANITIZE_ADDRESS__

void prepare_shared_memory(size_t bytes, uint8_t fill) {
    ASAN_UNPOISON_MEMORY_REGION(shared_memory, sizeof(shared_memory));
    std::memset(shared_memory, fill, bytes);
    ASAN_POISON_MEMORY_REGION(shared_memory + bytes, sizeof(shared_memory) - bytes);
}

void check_shared_memory(size_t) {}

#else

void prepare_shared_memory(size_t bytes, uint8_t fill) {
    std::memset(shared_memory, fill, bytes);
    for (size_t i = bytes; i < sizeof(shared_memory); ++i) shared_memory[i] = kPattern[i % 4];
}

void check_shared_memory(size_t bytes) {
    for (size_t i = bytes; i < sizeof(shared_memory); ++i) {
        if (shared_memory[i] != kPattern[i % 4]) {
            throw std::runtime_error("wrote at byte " + std::to_string(i) +
                                     " of shared memory, of which it has " + std::to_string(bytes));
        }
    }
}

#endif

}  // namespace emulation
