"""The native code under the compiler's sanitisers: `make sanitize`, and a short form of it among the tests.

AddressSanitizer and UndefinedBehaviorSanitizer watch the CPU library and the emulated CUDA kernels while the tests of
both ops run, ThreadSanitizer the CPU library while four threads of Python call it, each with four threads of PyTorch's.
PyTorch, OpenMP and Python are not compiled with them: a sanitiser sees what our code does, and the heap of all.
What OpenMP orders is told to ThreadSanitizer (csrc/parallel.h), so that races in our loops show and none is suppressed.
controls.cpp has an error of each kind, which must be found.
"""
