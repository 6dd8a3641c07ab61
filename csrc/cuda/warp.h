// The warp, for host and device code. No torch or CUDA header.
#pragma once

namespace attbalance {

constexpr int kWarpSize = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

}  // namespace attbalance
