// Marks functions that host and CUDA code share.
#pragma once

#if defined(__CUDACC__)
#define ATTBALANCE_HOST_DEVICE __host__ __device__
#else
#define ATTBALANCE_HOST_DEVICE
#endif
