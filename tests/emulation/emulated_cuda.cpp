// The module that registers the emulated operators: csrc/*/cuda.cu are linked into it.
#include "controls.h"

PYBIND11_MODULE(_emulated_cuda, module) {
    emulation::bind_controls(module);
}
