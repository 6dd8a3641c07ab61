// The dynamic shared memory of the block that runs.
#pragma once

#include <cstddef>
#include <cstdint>

namespace emulation {

/// Fill `bytes` of it for a new block, and guard the rest: by AddressSanitizer where that is on, else by a
/// pattern that `check_shared_memory` looks for.
void prepare_shared_memory(size_t bytes, uint8_t fill);

/// Raise std::runtime_error if the block wrote past its `bytes`.
void check_shared_memory(size_t bytes);

}  // namespace emulation
