#include "controls.h"
PYBIND11_MODULE(_tiny_kernels, module) {
    emulation::bind_controls(module);
}
