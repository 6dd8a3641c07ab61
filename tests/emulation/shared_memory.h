// The dynamic shared memory of the block that runs.
#pragma once

#include <cstddef>
#include <cstdint>

namespace emulation {

/// Guard what lies behind the first `bytes`, for the blocks of one launch: by AddressSanitizer where that is
/// on, else by a pattern that `check_shared_memory` looks for.
void guard_shared_memory(size_t bytes);

/// Fill it for a new block.
void fill_shared_memory(size_t bytes, uint8_t fill);

/// Raise std::runtime_error if a block wrote past its `bytes`.
void check_shared_memory(size_t bytes);

}  // namespace emulation
