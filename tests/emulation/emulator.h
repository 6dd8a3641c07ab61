// The emulated device: its settings, what was launched on it, and running one kernel.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace emulation {

constexpr unsigned kWarp = 32;

/// Of one block on an H100. More than the first needs cudaFuncSetAttribute.
constexpr size_t kSharedByDefault = 48 << 10;
constexpr size_t kSharedAtMost = 227 << 10;

enum class Order { kForward, kReversed, kShuffled };

struct Settings {
    int multiprocessors = 132;
    Order blocks = Order::kForward;
    Order threads = Order::kForward;  // of a block, between two places where they wait for each other
    uint64_t seed = 0;                // of shuffled orders
    uint8_t shared_fill = 0xff;       // each byte of fresh shared memory; 0xff makes NaN of every float type
};

struct Launch {
    std::string kernel;  // its name with template arguments
    dim3 grid;
    dim3 block;
    size_t shared_bytes;
};

Settings& settings();
std::vector<Launch>& launches();

/// 0 ... count - 1 as `order` has them.
std::vector<uint64_t> arrange(uint64_t count, Order order, uint64_t seed);

/// The index of item `i` in a box of this size, x fastest.
inline uint3 unravel(uint64_t i, dim3 size) {
    return {static_cast<unsigned>(i % size.x), static_cast<unsigned>(i / size.x % size.y),
            static_cast<unsigned>(i / size.x / size.y)};
}

inline uint64_t volume(dim3 size) {
    return uint64_t{size.x} * size.y * size.z;
}

}  // namespace emulation
