// What Python sees of the emulated device.
#pragma once

#include <pybind11/pybind11.h>

namespace emulation {

/// Adds `configure`, `launches` and `clear_launches` to the module.
void bind_controls(pybind11::module_& module);

}  // namespace emulation
