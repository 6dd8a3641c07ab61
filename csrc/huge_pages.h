// Huge pages for large outputs.
#pragma once

#include <cstdint>

#include "tensors.h"

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace attbalance {

/// Ask the kernel to back `bytes` of a tensor about to be written with huge pages. The allocator of PyTorch
/// returns large blocks to the system, so every step's gradients may live on fresh memory, and then one page
/// fault for each 4 KiB costs several times what writing them does. Neighbouring tensors that were advised
/// share huge pages. Only a hint: where it fails, nothing changes.
inline void advise_huge_pages([[maybe_unused]] const Tensor& tensor, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    constexpr int64_t kWorthwhile = 1 << 20;
    if (bytes < kWorthwhile) return;
    const uintptr_t page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
    const uintptr_t begin = reinterpret_cast<uintptr_t>(data<char>(tensor));
    const uintptr_t first = begin / page * page;
    const uintptr_t last = (begin + static_cast<uintptr_t>(bytes) + page - 1) / page * page;
    madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

}  // namespace attbalance
