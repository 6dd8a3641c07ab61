"""The CUDA kernels on a machine without a GPU: the same sources compiled for the host, threads as fibres.

    from tests.emulation import emulated_cuda
    with emulated_cuda() as device:
        attention_terms(..., backend="cuda")  # CPU tensors
    device.launches()

Checks, allocation, launch configuration and registration are the product's own (csrc/<op>/cuda.cu); the toolkit's
headers and csrc/cuda/current_device.h are replaced by those in include/. Found and reported as errors: barriers and
warp operations that not all threads reach, lanes that are read though their mask does not name them, writes past a
block's shared memory, launches that the hardware would refuse. Shared memory starts as NaN. Hidden dependence on the
order of threads or blocks shows when the orders are changed. Timing, races within one turn, memory consistency and
the hardware's own rounding of expf and the like do not show.
"""

from tests.emulation.device import Device, Launch, emulated_cuda
from tests.emulation.guard import guarded

__all__ = ["Device", "Launch", "emulated_cuda", "guarded"]
